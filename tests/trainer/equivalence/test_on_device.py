"""The check of a GPU against the CPU, run on the CPU: what it prints, and that it can fail."""

from itertools import count
from pathlib import Path

import pytest
import torch

from tests.trainer.main_worker import before_steps
from tests.trainer.standing_ranks import run
from tests.variants import STEPS
from trainer.engine.engine import Engine, PreparedBatch

pytestmark = pytest.mark.long
SCRIPT = str(Path(__file__).with_name("on_device.py"))


def test_the_cpu_trains_as_the_cpu() -> None:
    code, said = run([SCRIPT, "--device", "cpu", "--only", "images_none"])
    assert code == 0, said
    assert said.splitlines() == ["images_none/float64: same", "all trained on cpu as on the CPU"]


def test_no_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, said = run([SCRIPT])
    assert code == 1 and said.startswith("error: no GPU found")


@pytest.mark.parametrize(
    ("first", "says"), [(STEPS, "a loss differs from the CPU's"), (2 * STEPS, "the losses of two runs")]
)
def test_other_losses_are_told(first: int, says: str) -> None:
    """The first run on the device has other labels than that on the CPU, or the second one alone."""
    numbers = count(1)

    def otherwise(_: Engine, prepared: PreparedBatch) -> None:
        number = next(numbers)
        prepared.batch.label_B[0] = number > first and number % 2

    with before_steps(otherwise):
        code, said = run([SCRIPT, "--device", "cpu", "--only", "images_none"])
    of_run, end = said.splitlines()
    assert code == 1 and says in of_run and end == "error: 1 variants train otherwise on cpu"
