"""python -m explorer map: the points of the page's map as a file, whole or not there."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from explorer.__main__ import app
from featurestore import FeatureStore
from tests.explorer.world import World


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def command(*options: object) -> Result:
    return CliRunner().invoke(app, ["map", *map(str, options)])


def test_points_of_a_run_or_of_a_store(world: World, tmp_path: Path) -> None:
    keys = FeatureStore.open(world.store).snapshot().keys().tolist()
    for name, of in {"run": ("--run", world.runs / "both"), "store": ("--store", world.store)}.items():
        out = tmp_path / f"{name}.parquet"
        done = command(out, *of, "--samples", world.samples)
        assert done.exit_code == 0, done.output
        assert f"{len(keys):,} images: {out}" in done.stdout
        table = pq.read_table(out)
        assert sorted(table["key"].to_pylist()) == keys
        assert np.isfinite(table["error"].to_numpy()).any() == (name == "run")


def test_a_place_that_cannot_be_written(world: World, tmp_path: Path) -> None:
    failed = command(tmp_path / "no" / "map.parquet", "--run", world.runs / "both")
    assert failed.exit_code == 2
    assert not (tmp_path / "no").exists()
