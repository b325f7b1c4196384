"""Maps: every image or an even sample, what the test samples say of each, and Parquet files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from explorer.data import map as maps
from explorer.data import predictions
from explorer.data.background import Task
from explorer.data.map import MapPoints, evenly, make_map, of_run, read_ads
from explorer.places import Places
from featurestore import FeatureStore
from tests.explorer.world import World
from trainer.comm import SoloComm
from trainer.evaluation.predict import predict_run
from trainer.samples.index import open_index
from trainer.schema import load_schema


@pytest.fixture
def places(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Places(store=str(world.store), runs=str(world.runs), samples=str(world.samples), images=str(world.images))


def test_every_image_has_its_place_and_what_the_samples_say(places: Places, world: World) -> None:
    found = make_map(places, "both", Task())
    keys = FeatureStore.open(world.store).snapshot().keys()
    assert sorted(found.keys_N.tolist()) == keys.tolist()
    predicted = predict_run(world.runs / "both")
    loss_N = np.logaddexp(0, predicted.logit_N) - predicted.logit_N * predicted.impressions.label_N
    for point, key in enumerate(found.keys_N.tolist()):
        mine_N = predicted.impressions.image_N == key
        assert found.impressions_N[point] == mine_N.sum()
        if mine_N.any():
            assert found.ctr_N[point] == pytest.approx(predicted.impressions.label_N[mine_N].mean())
            assert found.error_N[point] == pytest.approx(loss_N[mine_N].mean(), rel=1e-4)
            assert found.category_N[point].isdecimal()
        else:
            assert np.isnan([found.ctr_N[point], found.error_N[point]]).all()
    assert found.about["notes"] == []
    time_ns = found.file.stat().st_mtime_ns
    assert make_map(places, "both", Task()).x_N.tolist() == found.x_N.tolist()
    assert found.file.stat().st_mtime_ns == time_ns


def test_the_file_has_the_columns_that_embedding_atlas_takes(places: Places) -> None:
    found = make_map(places, "both", Task())
    table = pq.read_table(found.file)
    assert table.column_names == ["key", "uri", "x", "y", "ctr", "category", "error", "impressions", "vector"]
    assert len(table) == len(found.keys_N)
    vectors_NV = np.stack(table["vector"].to_numpy())
    assert np.array_equal(maps.principal(vectors_NV)[:, 0], found.x_N)
    assert table["x"].null_count == table["y"].null_count == 0
    found.file.write_bytes(b"PAR1")
    assert make_map(places, "both", Task()).x_N.tolist() == found.x_N.tolist()


def test_large_stores_are_sampled_evenly(places: Places, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "MOST_POINTS", 10)
    some = of_run(places, "both", Task())
    assert some.count == 10
    assert some.num_images == FeatureStore.open(world.store).snapshot().num_rows
    assert evenly(1000).tolist() == np.linspace(0, 999, 10).astype(int).tolist()
    assert evenly(3).tolist() == [0, 1, 2]


def test_what_is_not_known_is_told(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "MOST_IMPRESSIONS", 1)
    found = make_map(places, "both", Task())
    assert found.about["notes"][0].startswith("The error cannot be shown: there are ")
    assert np.isfinite(found.ctr_N).any()


def test_impressions_beyond_the_bound_are_left_out_evenly(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_index(SoloComm(), str(world.samples), "test", load_schema())
    whole = read_ads(index, load_schema())
    assert whole is not None
    assert whole.impressions_I.sum() == index.num_samples
    assert not whole.is_sampled
    monkeypatch.setattr(maps, "MOST_IMPRESSIONS", index.num_samples // 2)
    part = read_ads(index, load_schema())
    assert part is not None
    assert part.is_sampled
    assert 0.3 < part.impressions_I.sum() / index.num_samples < 0.7
    assert whole.at(np.array([whole.keys_I[2], 5, whole.keys_I[0]])).tolist() == [2, -1, 0]


@pytest.mark.parametrize("shape", [(1, 5), (2, 5), (5, 1), (3, 2)])
def test_principal_components_of_little(shape: tuple[int, int]) -> None:
    plane_N2 = maps.principal(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    assert plane_N2.shape == (shape[0], 2)
    assert np.isfinite(plane_N2).all()


def points(x: list[float], y: list[float], **more: Any) -> MapPoints:
    count = len(x)
    values: dict[str, Any] = {
        "keys_N": np.arange(count),
        "uris_N": [f"{'ab'[number % 2]}/{number}.jpg" for number in range(count)],
        "x_N": np.array(x, np.float32),
        "y_N": np.array(y, np.float32),
        "ctr_N": np.full(count, np.nan, np.float32),
        "category_N": ["unknown"] * count,
        "error_N": np.full(count, np.nan, np.float32),
        "impressions_N": np.zeros(count, np.int64),
        "about": {},
        "file": Path("map.parquet"),
    }
    return MapPoints(**{**values, **more})


def test_each_cell_of_the_grid_has_the_image_nearest_to_its_middle() -> None:
    random = np.random.default_rng(0)
    found = points(random.uniform(0, 12, 5000).tolist(), random.uniform(0, 9, 5000).tolist())
    grid = maps.cells(found)
    assert len({(cell.row, cell.column) for cell in grid}) == len(grid) == maps.ROWS * maps.COLUMNS
    assert sum(cell.images for cell in grid) == 5000
    cell = next(each for each in grid if (each.row, each.column) == (1, 1))
    assert found.x_N[cell.point] < 1.5
    assert found.y_N[cell.point] > 7.5  # above is more
    assert [cell.row for cell in maps.cells(points([1.0], [1.0]))] == [maps.ROWS // 2 + 1]


def test_groups_are_the_largest_and_the_others() -> None:
    names = [f"g{number}" for number in range(20) for _ in range(20 - number)]
    found = maps.groups(names, np.arange(len(names)))
    assert [group.name for group in found] == [*(f"g{number}" for number in range(9)), maps.OTHERS]
    assert sum(len(group.points) for group in found) == len(names)


def test_colours_that_nothing_is_known_of() -> None:
    found = points([0.0, 1.0], [0.0, 1.0], ctr_N=np.array([np.nan, 0.5], np.float32))
    assert [maps.has(found, colour) for colour in maps.COLOURS] == [True, False, True, False]
    assert [maps.folder_of(uri) for uri in ("a/b/c.jpg", "c.jpg", "s3://bag/x.jpg")] == ["a", "", "bag"]
