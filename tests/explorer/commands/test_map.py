"""python -m explorer map: the points of the page's map as a file, whole or not there."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from explorer.__main__ import app
from explorer.data import projection
from featurestore import FeatureStore
from tests.explorer.world import World


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without UMAP's compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def project(vectors_NV: Any, tell: Any) -> Any:
        return vectors_NV[:, :2].copy()

    monkeypatch.setattr(projection, "umap_in_process", project)


def command(*options: object) -> Result:
    return CliRunner().invoke(app, ["map", *map(str, options)])


def test_points_of_a_run_or_of_a_store(world: World, tmp_path: Path) -> None:
    keys = FeatureStore.open(world.store).snapshot().keys().tolist()
    for name, of in {"run": ("--run", world.runs / "both"), "store": ("--store", world.store)}.items():
        out = tmp_path / f"{name}.parquet"
        done = command(out, *of, "--samples", world.samples)
        assert done.exit_code == 0, done.output
        assert f"{len(keys):,} images, laid out by umap: {out}" in done.stdout
        table = pq.read_table(out)
        assert sorted(table["key"].to_pylist()) == keys
        assert np.isfinite(table["error"].to_numpy()).any() == (name == "run")


def test_a_place_that_cannot_be_written(world: World, tmp_path: Path) -> None:
    failed = command(tmp_path / "no" / "map.parquet", "--run", world.runs / "both")
    assert failed.exit_code == 2
    assert not (tmp_path / "no").exists()
