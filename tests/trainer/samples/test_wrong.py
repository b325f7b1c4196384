"""Samples that are wrong: each mistake is named with its file, and its row where it is in a value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainer.conftest import sample_table
from tests.trainer.samples.kinds import SCHEMA, with_every_kind
from tests.trainer.samples.reading import reader_of, replaced
from trainer.comm import SoloComm
from trainer.errors import DataError, SchemaError
from trainer.samples.index import open_index

ROW, FILE = 17, "day=2026-01-02.parquet"


def right() -> pa.Table:
    """Samples with a column of every kind."""
    return with_every_kind(sample_table(20))


def written(folder: Path, table: pa.Table) -> Path:
    (folder / "train").mkdir()
    pq.write_table(table, folder / "train" / FILE, row_group_size=7)
    return folder


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def cast(name: str, kind: Any) -> Callable[[pa.Table], pa.Table]:
    return lambda table: with_column(table, name, table[name].cast(kind))


def as_column(name: str, other: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: with_column(table, name, table[other])


def test_samples_of_every_kind_are_read(tmp_path: Path) -> None:
    """So that what is wrong below is what the row says."""
    (batch,) = reader_of(written(tmp_path, right()), schema=SCHEMA, batch_size=1_000).batches()
    assert batch.num_samples == len(right()["label"].combine_chunks().flatten())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: table.drop_columns(["user", "ad_scene"]), "column ad_scene is missing, expected list<integer>"),
        (lambda table: table.drop_columns(["ad_photos"]), "ad_photos is missing, expected list<list<integer>> (or"),
        (cast("user", pa.bool_()), "column user is bool, expected integer (or string)"),
        (cast("user", pa.float64()), "column user is double"),
        (as_column("ad_item", "user"), "column ad_item is int64, expected list<integer>"),
        (as_column("user", "ad_item"), "column user is list<"),
        (as_column("ad_photos", "ad_item"), "column ad_photos is list<element: int64>, expected"),
        (as_column("ad_category_weight", "ad_words"), "column ad_category_weight is list<element: list<"),
    ],
)
def test_columns_are_refused_before_reading(tmp_path: Path, change: Callable[[pa.Table], pa.Table], told: str) -> None:
    with pytest.raises(SchemaError) as caught:
        open_index(SoloComm(), str(written(tmp_path, change(right()))), "train", SCHEMA)
    assert told in str(caught.value) and FILE in str(caught.value)


VALUES: list[tuple[str, Callable[[Any], Any], str]] = [
    ("label", lambda row: [2] * len(row), "column label has 2; a label is 0 or 1"),
    ("label", lambda row: [-1] * len(row), "column label has -1; a label is 0 or 1"),
    ("label", lambda row: [], "column label is an empty list"),
    ("label", lambda row: None, "column label is null"),
    ("label", lambda row: [None] * len(row), "column label has a null in its list"),
    ("ad_image", lambda row: [*row, 1], "each impression needs one entry in both"),
    ("behavior_image", lambda row: None, "column behavior_image is null"),
    ("behavior_image", lambda row: [1] * 9, "column behavior_image has 9 entries, behavior_item has"),
    ("behavior_category", lambda row: [1] * 9, "each behaviour needs one entry in both"),
    ("behavior_item", lambda row: [1, None], "column behavior_item has a null in its list"),
    ("user", lambda row: None, "column user is null"),
    ("ad_photos", lambda row: [*row, []], "column ad_photos has"),
    ("ad_photos", lambda row: [None, *row[1:]], "column ad_photos has a null in its list"),
    ("behavior_photos", lambda row: [*row, []], "each behaviour needs one entry in both"),
    ("behavior_age", lambda row: [*row, 5], "entries, behavior_item has"),
    ("behavior_item_weight", lambda row: [*row, 1.0], "each value needs one entry in both"),
    ("ad_words_weight", lambda row: [[*row[0], 1.0], *row[1:]], "entries, ad_words has"),
    ("ad_words_weight", lambda row: [*row, []], "each impression needs one entry in both"),
    ("behavior_item_weight", lambda row: [float("nan")] * 9, "column behavior_item_weight has nan"),
    ("ad_category_weight", lambda row: [float("inf")] * len(row), "column ad_category_weight has inf"),
    ("behavior_item_weight", lambda row: [None], "has a null in its list"),
    ("behavior_item_weight", lambda row: None, "column behavior_item_weight is null"),
    ("height", lambda row: float("nan"), "column height has nan"),
    ("ad_second", lambda row: [[1], *row[1:]], "column ad_second has 1 entries, ad_first has 2; each crossed"),
]


def told_of(folder: Path, table: pa.Table, column: str, value: Callable[[Any], Any]) -> str:
    """What a reader says where the value of a row is another one."""
    values = table[column].to_pylist()
    values[ROW] = value(values[ROW])
    table = with_column(table, column, pa.array(values, table.schema.field(column).type))
    with pytest.raises(DataError) as caught:
        list(reader_of(written(folder, table), schema=SCHEMA).batches())
    return str(caught.value)


@pytest.mark.parametrize(("column", "value", "told"), VALUES)
def test_values_are_named(tmp_path: Path, column: str, value: Callable[[Any], Any], told: str) -> None:
    said = told_of(tmp_path, right(), column, value)
    assert f"{FILE}, row {ROW}: " in said and told in said


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("ad_item", lambda row: [None, *row[1:]], "column ad_item has a null in its list"),
        ("user", lambda row: None, "column user is null"),
        ("behavior_category", lambda row: [*row, "a"], "each behaviour needs one entry in both"),
    ],
)
def test_values_among_texts_are_named(tmp_path: Path, column: str, value: Callable[[Any], Any], told: str) -> None:
    table = replaced(right(), ("user", "ad_item", "behavior_category"), pa.string(), lambda _, number: f"i{number}")
    said = told_of(tmp_path, table, column, value)
    assert f"{FILE}, row {ROW}: " in said and told in said
