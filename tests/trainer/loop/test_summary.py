"""What a run tells: progress and TensorBoard's file, also on a full disk, and the figures of its report."""

import io
from pathlib import Path

import pytest

from featurestore.console.output import figure
from tests.faulty import full_from
from tests.trainer.whole_runs import drawn_scalars
from trainer.comm import SoloComm
from trainer.engine.engine import StepResult
from trainer.loop.summary import (
    EventsFile,
    ProgressLog,
    StepTotals,
    gather,
)
from trainer.stages import Stages


def test_figures_are_those_that_tensorboard_shows(tmp_path: Path) -> None:
    file = EventsFile(tmp_path / "made", 1)
    file.add(1, {"train/loss": 0.5, "images/owner skew": 2})
    file.add(2, {"train/loss": 0.25})
    assert drawn_scalars(tmp_path / "made") == {"train/loss": [(1, 0.5), (2, 0.25)], "images/owner skew": [(1, 2.0)]}


def test_a_run_that_is_continued_hides_what_an_earlier_start_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    earlier = EventsFile(tmp_path, 0)
    for step in (1, 2, 3):
        earlier.add(step, {"loss": step})
    later = EventsFile(tmp_path, 2)
    later.add(2, {"loss": 20})
    assert drawn_scalars(tmp_path) == {"loss": [(1, 1.0), (2, 20.0)]}


def test_what_a_full_disk_cuts_is_told_and_what_comes_after_it_is_read(tmp_path: Path) -> None:
    file = EventsFile(tmp_path, 0)
    file.add(1, {"loss": 1.0})
    (written,) = tmp_path.iterdir()
    with full_from(written.stat().st_size + 10), pytest.raises(OSError, match="File too large"):
        file.add(2, {"loss": 2.0, "auc": 0.5})
    file.add(3, {"loss": 3.0})
    assert drawn_scalars(tmp_path) == {"loss": [(1, 1.0), (3, 3.0)]}


def test_one_warning_for_all_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    (tmp_path / "events").touch()  # where a folder is needed
    with ProgressLog(tmp_path / "events", 0, 3) as progress:
        progress.step(1, {"loss": 0.5}, {"auc": 0.5})
        progress.step(2, {"loss": 0.5}, {"auc": 0.5})
        progress.console.file = Full()
        progress.say("a line")
        progress.step(3, {"loss": 0.5}, {})
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" cannot")[0] for line in told] == [
        "warning: figures for TensorBoard",
        "warning: output",
    ]


STEP = StepResult(loss=0.5, num_samples=100, learning_rate=0.1)


def totals_of(*seconds: float) -> StepTotals:
    """Steps of 100 samples, each of which took so long."""
    totals = StepTotals()
    for each in seconds:
        totals.seconds["compute"] = totals.seconds.get("compute", 0.0) + each
        totals.add(STEP, 0, 0)
    return totals


def test_throughput_leaves_the_first_step_out() -> None:
    totals = totals_of(10.0, 0.5, 0.5)
    assert totals.steady == (200, 1.0)
    figures = gather(SoloComm(), totals, Stages())
    assert (figures["samples_per_s"], figures["samples"], figures["steps"]) == (200.0, 300, 3)


def test_throughput_of_one_step_is_its_own_and_of_none_is_none() -> None:
    assert gather(SoloComm(), totals_of(2.0), Stages())["samples_per_s"] == 50.0
    assert gather(SoloComm(), totals_of(), Stages())["samples_per_s"] is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(11_410.4, "11,410"), (1_000.0, "1,000"), (999.94, "999.9"), (0.0001, "0.0001"), (0.69317, "0.6932")],
)
def test_numbers_are_printed_without_exponent(value: float, text: str) -> None:
    assert figure(value) == text


def test_rest_is_what_no_stage_of_the_step_accounts_for() -> None:
    stages = Stages()
    for name, seconds in (("wait for the next batch", 9.0), ("gather", 7.0), ("embed images", 0.2), ("rest", 5.0)):
        stages.add(name, seconds)
    stages.add_rest(0.5)
    assert stages.last_ms()["rest"] == pytest.approx(300)
    stages.add_rest(0.1)
    assert stages.last_ms()["rest"] == 0
