"""TensorBoard's file and lines of progress on a disk that is full: told once, and whole for TensorBoard."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands.calls import call
from tests.trainer.loop.full_disk import full_from
from tests.trainer.whole_runs import drawn_scalars
from trainer.loop.summary import TENSORBOARD, EventsFile, ProgressLog


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

    (tmp_path / TENSORBOARD).touch()  # where a folder is needed
    with ProgressLog(tmp_path, 0, 3) as progress:
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


@pytest.mark.long
def test_a_run_whose_figures_cannot_be_written_is_trained_to_its_end(places: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / TENSORBOARD).touch()
    settings = places.settings(run__dir=tmp_path, run__name="a", train__max_steps=4, train__log_every=1)
    called = call(["trainer.main", *(f"--set={each}" for each in settings)])
    assert (called.code, called.trace) == (0, "") and called.err.count("warning: figures") == 1, called.err
    assert json.loads((tmp_path / "a" / "report.json").read_text())["global_step"] == 4
