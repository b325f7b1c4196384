"""Readers of written samples, all values of their batches, and samples with texts for IDs or columns of every kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from trainer.comm import SoloComm
from trainer.samples.index import open_index
from trainer.samples.reader import Batch, SampleReader
from trainer.schema.fields import Field, Schema, load_schema

SCHEMA = Schema(
    fields=(
        *load_schema().fields,
        Field(name="serial", side="ad", kind="id", column="ad_serial"),
        Field(name="session", side="user", kind="id"),
    )
)


def reader_of(
    folder: Path, rank: int = 0, num_ranks: int = 1, kind: type[SampleReader] = SampleReader, **options: Any
) -> SampleReader:
    schema = options.pop("schema", SCHEMA)
    index = open_index(SoloComm(), str(folder), "train", schema)
    arguments = {"batch_size": 16, "seed": 3, "window": 50} | options
    return kind(index, schema, rank=rank, num_ranks=num_ranks, **arguments)


def serials_of(batch: Batch) -> list[int]:
    return batch.fields["serial"].values_N.tolist()


def rows_of(batch: Batch) -> list[tuple[Any, ...]]:
    """Every sample of a batch as one tuple of all its values, its group's among them."""
    names = ["user", "session", "behavior_item", "behavior_category", "behavior_image_id", "behavior_image"]
    fields = [batch.fields[name] for name in names]
    split = [np.split(each.values_N, np.cumsum(each.lengths_M)[:-1]) for each in fields]
    per_group = [tuple(tuple(values.tolist()) for values in group) for group in zip(*split, strict=True)]
    ads = [batch.fields[name].values_N for name in ("serial", "ad_item", "ad_image", "ad_image_id", "ad_scene")]
    return [
        (*(int(field[b]) for field in ads), int(batch.label_B[b]), int(batch.group_id_B[b]), per_group[g])
        for b, g in enumerate(batch.group_of_sample_B)
    ]


def expected_rows(tables: list[pa.Table]) -> dict[int, tuple[Any, ...]]:
    found = {}
    for row in pa.concat_tables(tables).to_pylist():
        behaviors = [tuple(row[f"behavior_{name}"]) for name in ("item", "category", "image", "image")]
        user = ((row["user"],), (row["session"],), *behaviors)
        ads = zip(row["ad_serial"], row["ad_item"], row["ad_image"], row["ad_image"], row["ad_scene"], row["label"])  # noqa: B905
        found.update({ad[0]: (*ad, row["user"], user) for ad in ads})
    return found


def hashed(text: str) -> int:
    """xxh3-64 of a text as a signed number, not by the code under test."""
    number = xxhash.xxh3_64_intdigest(text.encode())
    return number - (1 << 64) if number >= 1 << 63 else number


def written(column: str, number: int) -> str:
    """How the tests write an item, say: ü, so that bytes are not characters."""
    return f"{column.removeprefix('ad_').removeprefix('behavior_')} ü{number}"


def replaced(table: pa.Table, columns: tuple[str, ...], kind: Any, value: Callable[[str, int], Any]) -> pa.Table:
    """The table with the numbers of these columns, within lists or not, replaced by `value(column, number)`."""
    for column in columns:
        rows = table.column(column).to_pylist()
        made = [[value(column, n) for n in row] if isinstance(row, list) else value(column, row) for row in rows]
        of_list = pa.types.is_list(table.schema.field(column).type)
        first = pa.int64() if kind == pa.int64() else pa.string()
        array = pa.array(made, pa.list_(first) if of_list else first).cast(pa.list_(kind) if of_list else kind)
        table = table.set_column(table.schema.get_field_index(column), column, array)
    return table


def rewrite(folder: Path, change: Callable[[pa.Table], pa.Table], row_group: int = 7) -> None:
    """Changes every file of samples below the folder."""
    for path in folder.glob("*/*.parquet"):
        pq.write_table(change(pq.read_table(path, partitioning=None)), path, row_group_size=row_group)


def ad_columns(items: list[int]) -> dict[str, list[Any]]:
    """All of ads beside the packaged schema's columns, by their items; prices are from 1 to some thousands."""
    words = [[item * 3 + n for n in range(item % 3)] for item in items]  # none to two
    return {
        "ad_words": words,
        "ad_words_weight": [[1.0 + word % 2 for word in each] for each in words],
        "ad_price": [1.3 ** (item * 7 % 31) for item in items],
        "ad_category_weight": [1 + item % 2 / 2 for item in items],
        "ad_first": [[1, item % 7] for item in items],
        "ad_second": [[2, 3] for _ in items],
        "ad_rating": [None if item % 4 == 0 else float(item % 7) for item in items],
        "ad_rate": [float("nan") if item % 4 == 0 else 0.5 for item in items],
        "ad_scene_weight": [float("nan") if item % 4 == 0 else 0.5 for item in items],
    }


def with_every_kind(table: pa.Table) -> pa.Table:
    """The table with a column of every kind."""
    users, behaviors, ads = (table[name].to_pylist() for name in ("user", "behavior_item", "ad_item"))
    by_row = [ad_columns(row) for row in ads]
    columns: dict[str, Any] = {
        "behavior_age": [[60 * 4**place for place in range(len(row))] for row in behaviors],
        "behavior_item_weight": [[item % 4 - 1.0 for item in row] for row in behaviors],
        "behavior_notes": [[7] * (user % 3) for user in users],
        "height": [150.5 + user for user in users],
        "income": [None if user % 5 == 0 else 900.0 * 1.2**user for user in users],
        "same": [0.1 for _ in users],
        "place": pa.array([[user * 10.0, -0.5 * (user % 3)] for user in users], pa.list_(pa.float32(), 2)),
        **{name: [row[name] for row in by_row] for name in by_row[0]},
    }
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    return table
