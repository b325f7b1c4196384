"""What a run's folder says, read for all that look at runs: checkpoints, images without features, mistakes."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.checkpoints import of_step
from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.errors import CheckpointError, ConfigError
from trainer.main import train
from trainer.runs.saved import open_trained, read_run

Places = Any


@pytest.fixture(scope="module")
def run(make_places: Callable[[Path], Places], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, each of which left a checkpoint."""
    places = make_places(tmp_path_factory.mktemp("trained"))
    changes = {"train__max_steps": 3, "train__checkpoint_every": 1}
    train(load_config(settings=places.settings(run__name="a", **changes)), SoloComm())
    return Path(places.folder) / "runs" / "a"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(run, tmp_path / "a")


def test_an_earlier_checkpoint_is_opened_by_its_step(run: Path) -> None:
    with contextlib.closing(open_trained(run, SoloComm(), which="2")) as trained:
        assert (trained.saved.checkpoint, trained.engine.num_steps, trained.saved.state.step) == (of_step(run, 2), 2, 2)


def test_a_folder_of_runs_is_not_a_run(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run's folder: .*; it holds the runs a"):
        read_run(run.parent)


@pytest.mark.parametrize(
    ("trained_with", "opened_with"), [("error", "zeros"), ("zeros", "zeros"), ("learned", "learned")]
)
def test_images_without_a_feature_stop_nothing(copy: Path, trained_with: str, opened_with: str) -> None:
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("missing: learned", f"missing: {trained_with}"))
    saved = read_run(copy)
    assert (saved.missing_in_training, saved.config.data.missing) == (trained_with, opened_with)
    assert [bool(saved.notes_on_missing(count)) for count in (0, 3)] == [False, True]  # it met none
    report = (copy / "report.json").read_text()
    (copy / "report.json").write_text(report.replace('"missing_lookups": 0', '"missing_lookups": 4'))
    assert bool(read_run(copy).notes_on_missing(3)) == (trained_with == "error")


def test_a_configuration_that_is_not_the_checkpoints_is_refused(copy: Path) -> None:
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("visual_width: 12", "visual_width: 13"))
    with pytest.raises(CheckpointError, match=r"model\.visual_width is 13 here, 12 in the checkpoint"):
        open_trained(copy, SoloComm())
