"""Names and texts by key: tables of them, in files with a row group for each range of keys; two merge by range."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore.keys import Int64Array

BUCKETS = 256
"""Row groups of a file of names by key, each for a range of keys."""
_OF_TEXTS: list[Any] = [pa.field("id", pa.int64(), nullable=False), pa.field("text", pa.string(), nullable=False)]
TEXTS = pa.schema(_OF_TEXTS)
"""The columns of ids.parquet."""
Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)


def table_of_texts(texts: Mapping[int, str]) -> pa.Table:
    """Make a table, as ids.parquet is one, of the texts of IDs."""
    columns: list[Any] = [pa.array(texts, pa.int64()), pa.array(texts.values(), pa.string())]
    return pa.Table.from_arrays(columns, schema=TEXTS)


def buckets_of(keys_N: Int64Array) -> Int64Array:
    """Return the bucket of each key: its top bits, as a number from 0 on. Keys of one are below those of the next."""
    return (keys_N >> 56) + BUCKETS // 2


def by_bucket(rows: Rows) -> list[Rows]:
    """Cut rows into those of each bucket of their first column, the key."""
    return in_buckets(rows, buckets_of(rows.column(0).to_numpy()), BUCKETS)


def in_buckets(rows: Rows, bucket_N: Int64Array, num_buckets: int) -> list[Rows]:
    """Cut rows by bucket, in their order."""
    ordered: Rows = rows.take(np.argsort(bucket_N, kind="stable"))
    ends: list[int] = np.cumsum(np.bincount(bucket_N, minlength=num_buckets)).tolist()
    return [ordered.slice(start, end - start) for start, end in itertools.pairwise([0, *ends])]


def merged_names(tables: Sequence[pa.Table], error: Callable[[int, str, str], Exception] | None = None) -> pa.Table:
    """Merge tables of a key and a name: each key once, ascending, with the first of its names.

    Raises the error that `error` makes of a key and two names of it, where it is given.
    """
    names = pa.concat_tables(tables)
    if len(names) == 0:  # as most of 256 ranges of few names
        return names
    key, name = names.column_names
    found = names.group_by(key).aggregate([(name, "min"), (name, "max")]).sort_by(key)
    first, last = found.column(f"{name}_min"), found.column(f"{name}_max")
    if error is not None and (of_two := found.filter(pc.not_equal(first, last)).slice(0, 1).to_pylist()):
        raise error(of_two[0][key], of_two[0][f"{name}_min"], of_two[0][f"{name}_max"])
    return pa.Table.from_arrays([found.column(key), first], schema=names.schema)


def write_buckets(path: Path, schema: pa.Schema, buckets: Iterable[pa.Table]) -> None:
    """Write a file of names by key, with a row group for each bucket. Raises OSError."""
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for table in buckets:
            writer.write_table(table, row_group_size=max(1, len(table)))
