"""Samples whose IDs are texts, and the same with the numbers that the texts stand for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash


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
