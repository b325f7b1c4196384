"""Runs on a store of int8 codes: as good as on the store they were made of, and resumed exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from featurestore.store import FeatureStore
from featurestore.upkeep.remake import recode
from tests.trainer.runs.stores.short import Places, dense, train_on
from trainer.errors import CheckpointError

pytestmark = pytest.mark.long  # they train whole runs


@pytest.fixture(scope="module")
def recoded(make_places: Callable[[Path], Places], tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Samples, a store, and one of its codes in `int8`."""
    places = make_places(tmp_path_factory.mktemp("int8"))
    recode(FeatureStore.open(places.folder / "features"), places.folder / "int8", "int8")
    return places


def run(places: Places, name: str, store: str = "int8", **changes: Any) -> Path:
    return train_on(places, name, store, **changes)


@pytest.fixture(scope="module")
def whole(recoded: Places) -> Path:
    """A run on the codes that nothing has interrupted."""
    return run(recoded, "whole")


def test_a_run_learns_what_it_learns_from_the_numbers(recoded: Places, whole: Path) -> None:
    runs = {"int8": whole, "features": run(recoded, "on-features", "features")}
    metrics = {store: json.loads((path / "report.json").read_text())["metrics"] for store, path in runs.items()}
    assert metrics["int8"]["logloss"] == pytest.approx(metrics["features"]["logloss"], abs=0.01)
    assert metrics["int8"]["logloss"] != metrics["features"]["logloss"]
    mine, theirs = dense(runs["int8"]), dense(runs["features"])
    (name,) = [name for name in mine if name.endswith("shared.layers.0.weight") and not name.startswith("adam")]
    moved = (mine[name] - theirs[name]).norm() / theirs[name].norm()
    assert 0 < moved < 0.3  # trained in the units of the numbers, not of the codes


def test_resumption_is_exact_and_knows_the_codec(recoded: Places, whole: Path) -> None:
    run(recoded, "halves", train__max_steps=12)
    halves = run(recoded, "halves", run__resume="latest")
    mine, theirs = dense(halves), dense(whole)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    recode(FeatureStore.open(recoded.folder / "features"), recoded.folder / "other", "int8", sample_rows=5)
    with pytest.raises(CheckpointError, match=r"store\.codec is '\w{64}' here, '\w{64}' in the checkpoint"):
        run(recoded, "halves", "other", run__resume="latest", train__max_steps=36)
    with pytest.raises(CheckpointError, match=r"store\.dtype is 'float32' here, 'int8'"):
        run(recoded, "halves", "features", run__resume="latest", train__max_steps=36)
