"""Runs on a compact store: resumed exactly, scaled by one number in common, refused with another basis."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featurestore.format.rows import FeatureRows
from featurestore.store import FeatureStore
from featurestore.upkeep.remake import remake
from tests.trainer.runs.stores.short import Places, dense, train_on
from trainer.errors import CheckpointError

DIMS = 6

pytestmark = pytest.mark.long  # it trains whole runs


@pytest.fixture(scope="module")
def reduced(make_places: Callable[[Path], Places], tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Samples, a store, and two of its components in `compact` and `half`."""
    places = make_places(tmp_path_factory.mktemp("compact"))
    for name, dtype in (("compact", "float32"), ("half", "float16")):
        remake(FeatureStore.open(places.folder / "features"), places.folder / name, dims=DIMS, dtype=dtype)
    return places


def run(places: Places, name: str, store: str = "compact", **changes: Any) -> Path:
    return train_on(places, name, store, **changes)


def scales(folder: Path) -> torch.Tensor:
    (found,) = [value for name, value in dense(folder).items() if name.endswith("inverse_std_D")]
    return found


@pytest.fixture(scope="module")
def whole(reduced: Places) -> Path:
    """A run on the components that nothing has interrupted."""
    return run(reduced, "whole")


def test_resumption_is_exact_and_knows_the_basis(reduced: Places, whole: Path) -> None:
    run(reduced, "halves", train__max_steps=12)
    halves = run(reduced, "halves", run__resume="latest")
    mine, theirs = dense(halves), dense(whole)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    store = FeatureStore.open(reduced.folder / "features")
    store.put(FeatureRows.of(["more"], np.ones((1, 16), np.float32)))
    remake(store, reduced.folder / "other", dims=DIMS, dtype="float32")
    with pytest.raises(CheckpointError, match=r"stores\.images\.basis is '\w{64}' here, '\w{64}' in the checkpoint"):
        run(reduced, "halves", "other", run__resume="latest", train__max_steps=36)
    with pytest.raises(CheckpointError, match=r"stores\.images\.dim is 16 here, 6"):
        run(reduced, "halves", "features", run__resume="latest", train__max_steps=36)


def test_components_in_float16_are_as_good_and_scaled_alike(reduced: Places, whole: Path) -> None:
    runs = {"compact": whole, "half": run(reduced, "on-half", "half")}
    metrics = {name: json.loads((path / "report.json").read_text())["metrics"] for name, path in runs.items()}
    assert metrics["half"]["logloss"] == pytest.approx(metrics["compact"]["logloss"], abs=0.01)
    assert len(set(scales(runs["compact"]).tolist())) == 1 and len(scales(runs["half"])) == DIMS
    assert scales(runs["half"])[0] == pytest.approx(float(scales(runs["compact"])[0]), rel=0.01)
    full = run(reduced, "full", "features", train__max_steps=1)
    assert len(set(scales(full).tolist())) > 1, "features of all numbers are scaled each by its own"
