"""Whole runs of one rank in this process, and what they left behind."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from featurestore.published.paths import RunPath
from tests.trainer.checkpoints import assert_same_tensors, tensors_of
from tests.trainer.conftest import Places
from tests.trainer.main_worker import before_steps
from trainer.comm import SoloComm
from trainer.config import load_config
from trainer.engine.engine import Engine
from trainer.main import train


def run_alone(places: Places, **changes: Any) -> Path:
    """Train in this process; returns the run's folder."""
    config = load_config(settings=places.settings(**changes))
    train(config, SoloComm())
    return Path(config.run.dir) / str(config.run.name)


def trained_beside(folder: Path) -> dict[str, Any]:
    """Train three steps with the settings that a job has written beside the samples of a folder; return the report."""
    own = Places(folder).settings(run__name="own", train__max_steps=3)
    config = load_config(folder / "samples/settings.yaml", [each for each in own if "model.tables" not in each])
    train(config, SoloComm())
    report = report_of(folder / "runs/own")
    assert report["global_step"] == 3 and math.isfinite(report["metrics"]["logloss"])
    return report


@contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """The run in the block is interrupted in the place of its next step after so many."""

    def interrupt(engine: Engine, _: object) -> None:
        if engine.num_steps == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), before_steps(interrupt):
        yield


def assert_same(found: RunPath, expected: RunPath, *, metrics: bool = False) -> None:
    """Check that two runs ended with the same bits in every parameter, optimiser state and ID row, and in metrics."""
    assert_same_tensors(tensors_of(found), tensors_of(expected))
    assert not metrics or report_of(found)["metrics"] == report_of(expected)["metrics"]


def report_of(run: RunPath) -> dict[str, Any]:
    return json.loads((run / "report.json").read_bytes())


def drawn_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder: step and value."""
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


_RANK_METRICS = {"auc", "gauc", "new_ad_auc", "new_ad_gauc"}


def alike(name: str, value: Any, within: float = 1e-4) -> Any:
    """What to compare another run's metric of that name with: a log loss within `within`, a rank metric within .03.

    A rank metric is no continuous number: where two logits change places, it moves by one over its pairs, 1 % and more
    of a few dozen impressions. Only the log loss can tell rounding from a mistake. Counts are compared as they are.
    """
    if not isinstance(value, float):
        return value
    return pytest.approx(value, abs=0.03 if name in _RANK_METRICS else within)


def all_alike(metrics: Mapping[str, Any], within: float = 1e-4) -> dict[str, Any]:
    """`alike` of each metric, to be compared with another run's metrics."""
    return {name: alike(name, value, within) for name, value in metrics.items()}
