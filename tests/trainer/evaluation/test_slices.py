"""What is told of test impressions and of training, against loops over the rows; slices hold every impression once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from trainer.comm import SoloComm
from trainer.errors import SchemaError
from trainer.evaluation.predict import (
    Impressions,
    SeenInTraining,
    Slicing,
    gathered,
    seconds_of,
    seen_in_training,
    slicings,
    slicings_by,
)
from trainer.samples.index import open_index
from trainer.samples.reader import SampleReader
from trainer.schema.fields import load_schema

Tables = dict[str, list[pa.Table]]


@pytest.fixture
def tables(write_samples: Callable[..., list[pa.Table]], tmp_path: Path) -> Tables:
    """Three training files and a test file, of several row groups each."""
    train = write_samples(tmp_path / "train", [6, 4, 20], items=30, row_group=7)
    return {"train": train, "test": write_samples(tmp_path / "test", [40], seed=50, items=45, row_group=7)}


def read(folder: Path) -> tuple[Impressions, SeenInTraining]:
    comm, schema = SoloComm(), load_schema()
    reader = SampleReader(open_index(comm, str(folder), "test", schema), schema, batch_size=16)
    predicted = ((batch, np.zeros(batch.num_samples)) for batch in reader.batches())
    _, impressions = gathered(comm, predicted, schema, by=())
    return impressions, seen_in_training(comm, open_index(comm, str(folder), "train", schema), schema, impressions)


def rows(tables: list[pa.Table]) -> list[dict[str, Any]]:
    """One dict for each impression, in order."""
    return [
        {"user": group["user"], "history": group["behavior_image"]} | {"ad": ad, "image": image, "label": label}
        for table in tables
        for group in table.to_pylist()
        for ad, image, label in zip(group["ad_item"], group["ad_image"], group["label"], strict=True)
    ]


def names_of(slicing: Slicing) -> list[str]:
    return [slicing.names[at] for at in slicing.slice_N]


def test_impressions_and_training_equal_a_loop(tables: Tables, tmp_path: Path) -> None:
    impressions, seen = read(tmp_path)
    test, train = rows(tables["test"]), rows(tables["train"])
    assert impressions.label_N.tolist() == [row["label"] for row in test]
    assert impressions.user_N.tolist() == [row["user"] for row in test]
    assert impressions.ad_N.tolist() == [row["ad"] for row in test]
    assert impressions.image_N is not None and impressions.image_N.tolist() == [row["image"] for row in test]
    assert impressions.history_N is not None and impressions.history_N.tolist() == [len(r["history"]) for r in test]
    shown = [sum(row["ad"] == ad for row in train) for ad in seen.ad_A.tolist()]
    assert seen.impressions_A.tolist() == shown and min(shown) == 0 < max(shown)
    met = {row["image"] for row in train} | {image for row in train for image in row["history"]}
    assert seen.met_I.tolist() == [image in met for image in seen.image_I]
    assert 0 < seen.met_I.sum() < len(seen.met_I)


def test_slices_equal_a_loop(tables: Tables, tmp_path: Path) -> None:
    impressions, seen = read(tmp_path)
    has_feature_I = seen.image_I % 3 != 0
    by_count, by_history, by_image = slicings(impressions, seen, has_feature_I)
    assert set(names_of(slicings(impressions, seen, None)[-1])) == {"known", "new"}, "without a store none is missing"
    train = rows(tables["train"])
    counts = [sum(row["ad"] == each["ad"] for row in train) for each in rows(tables["test"])]
    met = {row["image"] for row in train} | {image for row in train for image in row["history"]}
    assert names_of(by_count) == ["0" if n == 0 else "1 to 9" if n < 10 else "10 to 29" for n in counts]
    lengths = [len(row["history"]) for row in rows(tables["test"])]
    assert names_of(by_history) == ["0" if n == 0 else "1 to 5" for n in lengths]
    images = [row["image"] for row in rows(tables["test"])]
    assert names_of(by_image) == ["missing" if i % 3 == 0 else "known" if i in met else "new" for i in images]


def test_limits_of_the_ranges() -> None:
    counts_A = np.array([0, 1, 9, 10, 29, 30, 100, 299, 300, 999, 1_000])
    impressions = Impressions(
        label_N=np.zeros(11, np.float32),
        user_N=np.arange(11),
        ad_N=np.arange(11),
        image_N=None,
        history_N=np.array([0, 1, 5, 6, 10, 11, 20, 21, 50, 51, 90]),
    )
    seen = SeenInTraining(np.arange(11), counts_A, np.empty(0, np.int64), np.empty(0, np.bool_))
    by_count, by_history = slicings(impressions, seen, None)
    assert ",".join(names_of(by_count)) == (
        "0,1 to 9,1 to 9,10 to 29,10 to 29,30 to 99,100 to 299,100 to 299,300 to 999,300 to 999,1,000 or more"
    )
    assert ",".join(names_of(by_history)) == (
        "0,1 to 5,1 to 5,6 to 10,6 to 10,11 to 20,11 to 20,21 to 50,21 to 50,51 or more,51 or more"
    )


def test_a_slice_without_an_id_is_named_so() -> None:
    label_N, id_N = np.zeros(3, np.float32), np.array([-1, 7, -1])
    by = slicings_by(Impressions(label_N, id_N, id_N, by={"maker": id_N}), {})
    assert names_of(by[0]) == ["(none)", "7", "(none)"]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_of_any_unit(unit: str) -> None:
    seconds = [-1, 0, 1_700_000_000]
    times = pa.array(seconds, pa.timestamp("s")).cast(pa.timestamp(unit, tz="UTC"))
    assert seconds_of(times, "timestamp", "a file").to_pylist() == seconds
    assert seconds_of(pa.array(seconds), "timestamp", "a file").to_pylist() == seconds
    with pytest.raises(SchemaError, match="a file: column timestamp is string, expected a timestamp or whole seconds"):
        seconds_of(pa.array(["noon"]), "timestamp", "a file")
