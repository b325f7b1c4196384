"""Runs whose folder is on S3: trained, continued from nothing but it, read by every command, and by one writer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from featurestore.published.paths import FarPath, RunPath, run_path
from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.main import train
from trainer.runs.checkpoint import read_state
from trainer.runs.folder import find_checkpoint, finished

Places = Any


@pytest.fixture
def run_on(places: Places, tmp_path: Path) -> Callable[..., RunPath]:
    """Trains six steps, with three checkpoints."""

    def train_on(folder: object, name: str = "a", **changes: Any) -> RunPath:
        steps = {"train__max_steps": 6, "train__checkpoint_every": 2, "model__compute_dtype": "float32"}
        settings = places.settings(run__dir=folder, run__name=name, **{**steps, **changes})
        train(load_config(settings=settings), SoloComm())
        return run_path(str(folder)) / name

    return train_on


def tensors(run: RunPath) -> dict[str, torch.Tensor]:
    path = find_checkpoint(run)
    files = [path / name for name in read_state(path).files]
    return {name: tensor for file in files for name, tensor in load(file.read_bytes()).items()}


def assert_same(found: RunPath, expected: RunPath) -> None:
    mine, theirs = tensors(found), tensors(expected)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    reports = [json.loads((run / "report.json").read_bytes()) for run in (found, expected)]
    assert reports[0]["metrics"] == reports[1]["metrics"]


def test_a_run_on_s3_is_that_of_a_disk(run_on: Callable[..., RunPath], s3_url: str, tmp_path: Path) -> None:
    far, near = run_on(s3_url), run_on(tmp_path)
    assert isinstance(far, FarPath)
    assert_same(far, near)
    assert {each.name for each in far.iterdir()} == {"checkpoints", "config.yaml", "report.json", "tensorboard"}
    assert [each.name for each in finished(far / "checkpoints")] == [f"step-{step:08}" for step in (2, 4, 6)]
    events = (far / "tensorboard").iterdir()
    assert len(events) == 1 and len(events[0].read_bytes()) > 500
    assert not list(tmp_path.glob("**/s3*"))
