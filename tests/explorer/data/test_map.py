"""Maps: every image or an even sample, how often the test samples show and click each, and Parquet files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from explorer.data import map as maps
from explorer.data.background import Task
from explorer.data.map import MapPoints, evenly, make_map
from explorer.problems import Problem
from featurestore import FeatureStore
from tests.explorer.world import World
from trainer.evaluation.predict import predict_run


def test_every_image_has_its_place_and_the_click_rate_of_the_samples(world: World) -> None:
    """In a file that embedding-atlas takes, which is made once, and again where it is damaged."""
    places = world.places()
    found = make_map(places, "both", Task())
    assert sorted(found.keys_N.tolist()) == FeatureStore.open(world.store).snapshot().keys().tolist()
    impressions = predict_run(world.runs / "both").impressions
    for point, key in enumerate(found.keys_N.tolist()):
        mine_N = impressions.image_N == key
        assert found.impressions_N[point] == mine_N.sum()
        expected = impressions.label_N[mine_N].mean() if mine_N.any() else np.nan
        assert found.ctr_N[point] == pytest.approx(expected, nan_ok=True)
    assert found.about["notes"] == []
    table = pq.read_table(found.file)
    assert table.column_names == ["key", "uri", "x", "y", "ctr", "impressions", "category", "vector"]
    assert np.array_equal(maps.principal(np.array(table["vector"].to_pylist(), np.float32))[:, 0], found.x_N)
    inode = found.file.stat().st_ino
    assert make_map(places, "both", Task()).x_N.tolist() == found.x_N.tolist()
    assert found.file.stat().st_ino == inode
    found.file.write_bytes(b"PAR1")
    assert make_map(places, "both", Task()).x_N.tolist() == found.x_N.tolist()


def test_large_stores_are_sampled_evenly_and_samples_that_are_away_are_told(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(maps, "MOST_POINTS", 10)
    (tmp_path / "empty").mkdir()
    some = make_map(world.places(samples=tmp_path / "empty"), "both", Task())
    assert len(some.keys_N) == 10
    assert some.about["num_images"] == FeatureStore.open(world.store).snapshot().num_rows
    assert some.about["notes"][0].startswith(Problem.NO_CTR.of(""))
    assert np.isnan(some.ctr_N).all()
    assert evenly(1000, 10).tolist() == np.linspace(0, 999, 10).astype(int).tolist()
    assert evenly(3, 10).tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(1, 5), (2, 5), (5, 1), (3, 2)])
def test_principal_components_of_little(shape: tuple[int, int]) -> None:
    plane_N2 = maps.principal(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    assert plane_N2.shape == (shape[0], 2)
    assert np.isfinite(plane_N2).all()


def points(x: Any, y: Any, ctr: float = np.nan) -> MapPoints:
    return MapPoints(
        keys_N=np.arange(len(x)),
        uris_N=[f"{'ab'[number % 2]}/{number}.jpg" for number in range(len(x))],
        x_N=np.array(x, np.float32),
        y_N=np.array(y, np.float32),
        ctr_N=np.full(len(x), ctr, np.float32),
        impressions_N=np.zeros(len(x), np.int64),
        category_N=[""] * len(x),
        about={},
        file=Path("map.parquet"),
    )


def test_each_cell_of_the_grid_has_the_image_nearest_to_its_middle() -> None:
    random = np.random.default_rng(0)
    found = points(random.uniform(0, 12, 5000), random.uniform(0, 9, 5000))
    grid = maps.cells(found)
    assert len({(cell.row, cell.column) for cell in grid}) == len(grid) == maps.ROWS * maps.COLUMNS
    assert sum(cell.images for cell in grid) == 5000
    cell = next(each for each in grid if (each.row, each.column) == (1, 1))
    assert found.x_N[cell.point] < 1.5
    assert found.y_N[cell.point] > 7.5  # above is more
    assert [cell.row for cell in maps.cells(points([1.0], [1.0]))] == [maps.ROWS // 2 + 1]


def test_colours_are_of_the_largest_folders_and_of_what_is_known() -> None:
    names = [f"g{number}" for number in range(20) for _ in range(20 - number)]
    found = maps.groups(names, np.arange(len(names)))
    assert [group.name for group in found] == [*(f"g{number}" for number in range(9)), maps.OTHERS]
    assert sum(len(group.points) for group in found) == len(names)
    assert [maps.has(points([0, 1], [0, 1]), colour) for colour in maps.COLOURS] == [True, False, False]
    assert maps.has(points([0, 1], [0, 1], ctr=0.5), "ctr")
    assert [maps.folder_of(uri) for uri in ("a/b/c.jpg", "c.jpg", "s3://bag/x.jpg")] == ["a", "", "bag"]
