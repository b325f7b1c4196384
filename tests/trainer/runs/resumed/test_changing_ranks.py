"""Runs that are killed and go on with other numbers of ranks: no step, sample or row is lost or taken twice

In float64, where rounding hides nothing, they end with the same parameters, optimisers, ID rows and predictions as an
undisturbed run. What other types make of sums in another order: docs/TROUBLE.md.
"""

import itertools
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.ranks import Forks, TorchRanks, ranks_of
from tests.trainer.checkpoints import steps_of, tensors_of
from tests.trainer.runs.resumed.legs import TIMEOUT_S, TOLERANCE, WORKER, Killed, assert_no_step_or_sample_is_lost
from trainer.evaluation.predict import predict_run
from trainer.runs.checkpoint import read_state
from trainer.runs.folder import find_checkpoint

Places = Any

pytestmark = pytest.mark.services


def assert_same_in_float64(found: Path, expected: Path) -> None:
    """All that is trained, and its predictions apart: rounding that the model cannot see is none that a user sees."""
    mine, theirs = tensors_of(found), tensors_of(expected)
    assert mine.keys() == theirs.keys()
    assert theirs["user/0000/weight"].dtype == torch.float64
    apart = {name: float((mine[name].double() - theirs[name].double()).abs().max()) for name in theirs}
    assert {name: value for name, value in apart.items() if value > TOLERANCE} == {}
    logits = [predict_run(run).logit_N for run in (found, expected)]
    np.testing.assert_allclose(*logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("optim", "ranks", "last"),
    [
        ({"optim__ids": "adam", "optim__ids_restart": True}, (TorchRanks(3), 1), "two_ranks"),
        pytest.param({"optim__ids": "rowwise_adam"}, (4, 1), "two_ranks", marks=pytest.mark.slow),
        pytest.param({"optim__ids": "adam", "optim__ids_restart": True}, (3, 1), "two_ranks", marks=pytest.mark.slow),
        pytest.param({"optim__ids": "adam"}, (TorchRanks(3), 2), "two_torch_ranks", marks=pytest.mark.slow),
    ],
    ids=["torchrun, alone, horovod", "plain", "adam", "torchrun, horovod, torch"],
)
def test_killed_with_other_ranks_each_time(
    settings_of: Callable[..., list[str]],
    tmp_path: Path,
    optim: dict[str, Any],
    ranks: tuple[int, int],
    last: str,
    forks: Forks,
    request: pytest.FixtureRequest,
) -> None:
    steps = 80
    undisturbed = Killed(tmp_path / "undisturbed", settings_of(tmp_path / "undisturbed", steps, 1000, **optim))
    whole = undisturbed.leg(0, ranks=1)
    killed = Killed(tmp_path / "killed", settings_of(tmp_path / "killed", steps, 10, **optim))
    first = forks if isinstance(ranks[0], TorchRanks) else None  # the others' launcher is horovodrun itself
    legs = [killed.leg(0, ranks[0], die_at=55, forks=first), killed.leg(1, ranks[1], die_at=68, forks=forks)]
    legs.append(killed.leg_of(request.getfixturevalue(last), len(legs)))
    assert [leg.first_step for leg in legs] == [1, 51, 61]
    assert_no_step_or_sample_is_lost(legs, whole, steps)
    assert_same_in_float64(killed.run, undisturbed.run)
    assert read_state(find_checkpoint(killed.run)).num_ranks == 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_thousand_steps_and_ten_kills_at_any_moment(settings_of: Callable[..., list[str]], tmp_path: Path) -> None:
    """A rank or the launcher gets SIGKILL from outside, whatever it does just then."""
    steps, draw = 2_040, random.Random(0)
    undisturbed = Killed(tmp_path / "undisturbed", settings_of(tmp_path / "undisturbed", steps, 10_000))
    whole = undisturbed.leg(0, ranks=1)
    killed = Killed(tmp_path / "killed", settings_of(tmp_path / "killed", steps, 50))
    legs = []
    for number, ranks in zip(range(10), itertools.cycle([4, 1, 2]), strict=False):
        process = killed.start(number, ranks)
        wait_for_checkpoint(killed.run, (number + 1) * steps // 12, process)
        time.sleep(draw.uniform(0, 0.3))
        victims = [process.pid] if ranks == 1 else [process.pid, *(each.pid for each in ranks_of(process, str(WORKER)))]
        kill_and_wait(process, draw.choice(victims))
        legs.append(killed.seen(number, ranks))
    legs.append(killed.leg(10, ranks=2))
    assert_no_step_or_sample_is_lost(legs, whole, steps)
    assert_same_in_float64(killed.run, undisturbed.run)


def wait_for_checkpoint(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    """Until there is one of that step or a later one."""
    end = time.monotonic() + TIMEOUT_S
    while not any(found >= step for found in steps_of(run)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def kill_and_wait(process: "subprocess.Popen[str]", victim: int) -> None:
    """Kills one process of a job and waits until all of them are gone."""
    job = psutil.Process(process.pid).children(recursive=True)
    psutil.Process(victim).kill()
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    _, alive = psutil.wait_procs(job, timeout=60)
    assert alive == []
