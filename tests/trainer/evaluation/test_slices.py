"""What is read of test impressions and of training, against loops over the rows; slices hold every impression once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.comm import SoloComm
from trainer.errors import DataError, SchemaError
from trainer.evaluation.predict import (
    NEVER,
    Impressions,
    SeenInTraining,
    Slicing,
    read_impressions,
    seen_in_training,
    slicings,
)
from trainer.samples.index import open_index
from trainer.schema import load_schema

DAY_S = 86_400
START_S = 1_700_000_000
Times = Callable[[pa.Table, int], Any]


def days_apart(table: pa.Table, number: int) -> Any:
    """Groups of file `number` lie on its day."""
    return pa.array(START_S + DAY_S * 2 * number + np.arange(len(table)))


@pytest.fixture
def samples(write_samples: Callable[..., list[pa.Table]], tmp_path: Path) -> Callable[..., dict[str, list[pa.Table]]]:
    """Writes three training files two days apart and a test file two days later; returns the tables."""

    def write(times: Times | None = days_apart) -> dict[str, list[pa.Table]]:
        tables = {"train": write_samples(tmp_path / "train", [6, 4, 20], items=30)}
        tables["test"] = write_samples(tmp_path / "test", [40], seed=50, items=45)
        for split, first in (("train", 0), ("test", 3)):
            for at, (file, table) in enumerate(zip(sorted((tmp_path / split).iterdir()), tables[split], strict=True)):
                table = table.drop_columns(["timestamp"])  # noqa: PLW2901
                if times is not None:
                    table = table.append_column("timestamp", times(table, first + at))  # noqa: PLW2901
                pq.write_table(table, file, row_group_size=7)
                tables[split][at] = table
        return tables

    return write


def read(folder: Path) -> tuple[Impressions, SeenInTraining]:
    comm, schema = SoloComm(), load_schema()
    impressions = read_impressions(comm, open_index(comm, str(folder), "test", schema), schema)
    return impressions, seen_in_training(comm, open_index(comm, str(folder), "train", schema), schema, impressions)


def rows(tables: list[pa.Table]) -> list[dict[str, Any]]:
    """One dict for each impression, in order."""
    return [
        {"user": group["user"], "time": group.get("timestamp"), "history": group["behavior_image"]}
        | {"ad": ad, "image": image, "label": label}
        for table in tables
        for group in table.to_pylist()
        for ad, image, label in zip(group["ad_item"], group["ad_image"], group["label"], strict=True)
    ]


def names_of(slicing: Slicing) -> list[str]:
    return [slicing.names[at] for at in slicing.slice_N]


def test_impressions_and_training_equal_a_loop(samples: Callable[..., Any], tmp_path: Path) -> None:
    tables = samples()
    impressions, seen = read(tmp_path)
    test, train = rows(tables["test"]), rows(tables["train"])
    assert impressions.label_N.tolist() == [row["label"] for row in test]
    assert impressions.user_N.tolist() == [row["user"] for row in test]
    assert impressions.ad_N.tolist() == [row["ad"] for row in test]
    assert impressions.image_N is not None and impressions.image_N.tolist() == [row["image"] for row in test]
    assert impressions.history_N is not None and impressions.history_N.tolist() == [len(r["history"]) for r in test]
    assert impressions.time_s_N is not None and impressions.time_s_N.tolist() == [row["time"] for row in test]
    for ad, count, first_s in zip(seen.ad_A, seen.impressions_A, seen.first_s_A, strict=True):
        times = [row["time"] for row in train if row["ad"] == ad]
        assert (count, first_s) == (len(times), min(times, default=NEVER))
    met = {row["image"] for row in train} | {image for row in train for image in row["history"]}
    assert seen.met_I.tolist() == [image in met for image in seen.image_I]
    assert 0 < seen.met_I.sum() < len(seen.met_I)


def test_slices_equal_a_loop(samples: Callable[..., Any], tmp_path: Path) -> None:
    tables = samples()
    impressions, seen = read(tmp_path)
    has_feature_I = seen.image_I % 3 != 0
    by_age, by_count, by_history, by_image = slicings(impressions, seen, has_feature_I)
    assert set(names_of(slicings(impressions, seen, None)[-1])) == {"known", "new"}, "without a store none is missing"
    train = rows(tables["train"])
    shown = [[row["time"] for row in train if row["ad"] == each["ad"]] for each in rows(tables["test"])]
    met = {row["image"] for row in train} | {image for row in train for image in row["history"]}

    def age(times: list[int], now: int) -> str:
        days = (now - min(times)) // DAY_S if times else None
        return "new" if days is None else "1 to 2 days" if days < 3 else "3 to 6 days" if days < 7 else "later"

    expected = [age(times, row["time"]) for times, row in zip(shown, rows(tables["test"]), strict=True)]
    assert names_of(by_age) == expected
    assert set(expected) == {"new", "1 to 2 days", "3 to 6 days"}
    counts = [len(times) for times in shown]
    assert names_of(by_count) == ["0" if n == 0 else "1 to 9" if n < 10 else "10 to 29" for n in counts]
    lengths = [len(row["history"]) for row in rows(tables["test"])]
    assert names_of(by_history) == ["0" if n == 0 else "1 to 5" for n in lengths]
    images = [row["image"] for row in rows(tables["test"])]
    assert names_of(by_image) == ["missing" if i % 3 == 0 else "known" if i in met else "new" for i in images]


def test_limits_of_the_ranges() -> None:
    counts_A = np.array([0, 1, 9, 10, 29, 30, 100, 299, 300, 999, 1_000])
    days_A = np.array([0, 0, 1, 2, 3, 6, 7, 13, 14, 100, -2])
    impressions = Impressions(
        label_N=np.zeros(11, np.float32),
        user_N=np.arange(11),
        ad_N=np.arange(11),
        image_N=None,
        history_N=np.array([0, 1, 5, 6, 10, 11, 20, 21, 50, 51, 90]),
        time_s_N=START_S + days_A * DAY_S,
    )
    first_s_A = np.where(counts_A == 0, NEVER, START_S)
    seen = SeenInTraining(np.arange(11), counts_A, first_s_A, np.empty(0, np.int64), np.empty(0, np.bool_))
    by_age, by_count, by_history = slicings(impressions, seen, None)
    assert ",".join(names_of(by_count)) == (
        "0,1 to 9,1 to 9,10 to 29,10 to 29,30 to 99,100 to 299,100 to 299,300 to 999,300 to 999,1,000 or more"
    )
    assert ",".join(names_of(by_age)) == (
        "new,under 1 day,1 to 2 days,1 to 2 days,3 to 6 days,3 to 6 days,7 to 13 days,7 to 13 days,"
        "14 or more days,14 or more days,under 1 day"
    )
    assert ",".join(names_of(by_history)) == (
        "0,1 to 5,1 to 5,6 to 10,6 to 10,11 to 20,11 to 20,21 to 50,21 to 50,51 or more,51 or more"
    )


def test_without_times_an_ad_is_new_or_not(samples: Callable[..., Any], tmp_path: Path) -> None:
    samples(None)
    impressions, seen = read(tmp_path)
    by_age = slicings(impressions, seen, None)[0]
    assert impressions.time_s_N is None
    new = ~np.isin(impressions.ad_N, seen.ad_A[seen.impressions_A > 0])
    assert names_of(by_age) == ["new" if each else "in training" for each in new]
    assert 0 < new.sum() < len(new)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_of_any_unit(samples: Callable[..., Any], tmp_path: Path, unit: str) -> None:
    samples()
    expected = read(tmp_path)[0].time_s_N
    for split in ("train", "test"):
        for file in (tmp_path / split).iterdir():
            table = pq.read_table(file, partitioning=None)
            at = table.schema.get_field_index("timestamp")
            times = table.column("timestamp").cast(pa.timestamp("s")).cast(pa.timestamp(unit, tz="UTC"))
            pq.write_table(table.set_column(at, "timestamp", times), file)
    found = read(tmp_path)[0].time_s_N
    assert found is not None and expected is not None
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("first", "error", "problem"),
    [
        ("noon", SchemaError, r"day=.*: column timestamp is string, expected a timestamp or whole seconds"),
        (None, DataError, r"row 0: column timestamp is null"),
    ],
)
def test_times_that_are_refused(
    samples: Callable[..., Any], tmp_path: Path, first: str | None, error: type[Exception], problem: str
) -> None:
    samples(lambda table, _: pa.array([first, *(["noon"] if first else [1]) * (len(table) - 1)]))
    with pytest.raises(error, match=problem):
        read(tmp_path)
