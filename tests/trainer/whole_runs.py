"""Whole runs of one rank in this process, and what they left behind."""

import json
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.checkpoints import tensors_of
from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.main import train

# Of the runs of one rank and of two; their numbers are compared, so the type of the products is not the machine's.
SHARED = {"data__global_batch_size": 32, "train__epochs": 3, "model__compute_dtype": "float64"}
Places = Any


def run_alone(places: Places, **changes: Any) -> Path:
    """Train in this process; returns the run's folder."""
    config = load_config(settings=places.settings(**changes))
    train(config, SoloComm())
    return Path(config.run.dir) / str(config.run.name)


def assert_same(found: Path, expected: Path) -> None:
    """Check that two runs ended with the same bits in every parameter, optimiser state and ID row."""
    mine, theirs = tensors_of(found), tensors_of(expected)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def report_of(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


def drawn_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder: step and value."""
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
