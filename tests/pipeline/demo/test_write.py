"""The logs say what happened: each column of the simulated world comes back from the files."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.demo.items import catalogue_of, plan_garments
from pipeline.demo.make import FIRST_CATEGORY, FIRST_ITEM, FIRST_SESSION, FIRST_USER, log_files, write_logs
from pipeline.demo.world import World, simulate

START_S = 1_772_323_200
DAYS = 4


@pytest.fixture(scope="module")
def world() -> World:
    return simulate(catalogue_of(plan_garments(40, 0)), num_users=50, num_days=DAYS, seed=0, start_s=START_S)


@pytest.fixture(scope="module")
def logs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    write_logs(world, out)
    assert sorted((out / "logs").rglob("*.parquet")) == sorted(log_files(out, START_S, DAYS))
    return out / "logs"


def _seconds(column: object) -> np.ndarray:
    return column.to_numpy().astype("datetime64[s]").astype(np.int64)  # type: ignore[attr-defined]


def test_impressions_come_back(world: World, logs: Path) -> None:
    table, shown = pq.read_table(logs / "impressions").sort_by("timestamp"), world.shown
    order = np.argsort(shown.time_N, kind="stable")
    np.testing.assert_array_equal(_seconds(table["timestamp"]), shown.time_N[order])
    expected = {
        "user": FIRST_USER + shown.user_N,
        "session": FIRST_SESSION + shown.session_N,
        "scene": shown.scene_N,
        "item": FIRST_ITEM + shown.item_N,
        "category": FIRST_CATEGORY + world.catalogue.category_I[shown.item_N],
        "label": world.clicks.label_N,
        "user_age": world.people.age_U[shown.user_N],
        "user_gender": world.people.gender_U[shown.user_N],
    }
    rows = np.stack([table[name].to_numpy() for name in expected] + [_seconds(table["timestamp"])])
    wanted = np.stack([*expected.values(), shown.time_N])
    np.testing.assert_array_equal(_sorted_rows(rows), _sorted_rows(wanted))
    uris = [world.catalogue.uris[item - FIRST_ITEM] for item in table["item"].to_pylist()]
    assert table["image"].to_pylist() == uris


def test_behaviours_come_back(world: World, logs: Path) -> None:
    table, done = pq.read_table(logs / "behaviors"), world.behaviors
    rows = np.stack([_seconds(table["timestamp"]), *(table[name].to_numpy() for name in ("user", "item", "dwell_s"))])
    wanted = np.stack([done.time_N, FIRST_USER + done.user_N, FIRST_ITEM + done.item_N, done.dwell_s_N])
    np.testing.assert_array_equal(_sorted_rows(rows), _sorted_rows(wanted))


def _sorted_rows(columns: np.ndarray) -> np.ndarray:
    """The columns of a (columns, rows) table with its rows in a fixed order."""
    return columns[:, np.lexsort(columns)]
