"""Profiles of columns: distinct values, ranges and texts.

Letters of shapes: M rows, N values.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from featurestore.errors import StorageError
from featurestore.keys import UInt64Array, id_of_text, splitmix64
from featurestore.storage.storage import Storage
from featurestore.text import STYLE_BYTES, CsvStyle, CsvTextError, find_style, long_rows
from trainer.errors import DataError

_KEPT = 4096


@dataclass(frozen=True)
class DistinctCount:
    """The smallest 4,096 hashes of all values: exact up to that number, then with an error of about 1.6 %.

    Source: Bar-Yossef et al., "Counting distinct elements in a data stream", 2002: the k-th smallest of n hashes that
    are spread evenly over [0, 1) is about k / n. The standard error is 1 / sqrt(k - 2).
    """

    hashes_K: UInt64Array = dataclasses.field(default_factory=lambda: np.empty(0, np.uint64))  # ascending

    def with_values(self, values_N: npt.ArrayLike) -> "DistinctCount":
        """Add these int64 values."""
        return self._kept(splitmix64(values_N) if np.size(values_N) else np.empty(0, np.uint64))

    def merged(self, other: "DistinctCount") -> "DistinctCount":
        """Merge what both saw."""
        return self._kept(other.hashes_K)

    @property
    def is_exact(self) -> bool:
        """Whether `estimate` is exact."""
        return len(self.hashes_K) < _KEPT

    @property
    def estimate(self) -> int:
        """The estimated number of different values seen."""
        if self.is_exact:
            return len(self.hashes_K)
        return round((_KEPT - 1) * 2.0**64 / (float(self.hashes_K[-1]) + 1))

    def _kept(self, more_N: UInt64Array) -> "DistinctCount":
        if not self.is_exact:
            more_N = more_N[more_N < self.hashes_K[-1]]  # the others are not among the smallest
        if len(self.hashes_K):  # most of a stream was seen before
            place_N = np.searchsorted(self.hashes_K, more_N).clip(max=len(self.hashes_K) - 1)
            more_N = more_N[self.hashes_K[place_N] != more_N]
        if not len(more_N):
            return self
        every_N = np.concatenate([self.hashes_K, more_N])
        every_N.sort(kind="stable")  # quicker than others, as most are in order
        is_first_N = np.ones(len(every_N), np.bool_)
        np.not_equal(every_N[1:], every_N[:-1], out=is_first_N[1:])
        return DistinctCount(every_N[is_first_N][:_KEPT])


CSV_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (".parquet", *CSV_SUFFIXES)
Content = Literal["integer", "real", "text", "time", "other"]


@dataclass
class Column:
    """One column, as far as it was read. `depth` lists around the values."""

    name: str
    type: str
    content: Content
    depth: int
    rows: int = 0
    nulls: int = 0
    missing: int = 0  # values that are null or NaN, those in lists too
    values: int = 0
    distinct: DistinctCount = dataclasses.field(default_factory=DistinctCount)
    shortest: int | None = None  # of the innermost lists
    longest: int = 0
    like_label: bool = True  # the outer lists are as long as the labels'
    is_binary: bool = True  # all values are 0 or 1
    smallest: float | None = None
    largest: float | None = None
    example: str | None = None  # a text

    @property
    def fixed_width(self) -> int | None:
        """Length of all innermost lists, where it is one."""
        return self.longest if self.depth and self.shortest == self.longest else None


@dataclass
class TableProfile:
    """Columns of some files, and whether all of their rows were read."""

    columns: dict[str, Column] = dataclasses.field(default_factory=dict)
    rows: int = 0
    complete: bool = True


def data_files(storage: Storage, path: str = "") -> list[str]:
    """List the files below `path` that can be looked into; hidden ones are left out."""
    found = [entry.path for entry in storage.entries(path)]
    return [
        each
        for each in found
        if each.endswith(SUFFIXES) and not any(part.startswith((".", "_")) for part in each.split("/"))
    ]


def read_tables(storage: Storage, path: str, most_rows: int) -> Iterator[pa.Table]:
    """Read row groups of a Parquet file, or blocks of a CSV file, until `most_rows` were given. Raises DataError."""
    left = most_rows
    try:
        style = style_of(storage, path)
        if style is not None:
            with storage.open_input(path) as file:
                long_rows(file, style.delimiter, most_rows)
        with storage.open_input(path) as file:
            for table in _tables(file, style):
                yield table.slice(0, left)
                left -= len(table)
                if left <= 0:
                    return
    except (pa.ArrowException, OSError, StorageError, CsvTextError, UnicodeDecodeError) as error:
        raise DataError(f"{storage.full(path)} cannot be read: {str(error).strip()}") from error


def style_of(storage: Storage, path: str) -> CsvStyle | None:
    """Find how a CSV file is written; None for Parquet. Raises DataError."""
    if not path.endswith(CSV_SUFFIXES):
        return None
    try:
        with storage.open_input(path) as file:
            return find_style(file.read(STYLE_BYTES))
    except (OSError, StorageError, CsvTextError) as error:
        raise DataError(f"{storage.full(path)} cannot be read: {str(error).strip()}") from error


def look(storage: Storage, paths: list[str], label: str | None, most_rows: int) -> TableProfile:
    """Profile the columns of these files, which have equal names, up to `most_rows` rows. Raises DataError."""
    found = TableProfile()
    for path in paths:
        if found.rows >= most_rows:
            found.complete = False
            break
        for table in read_tables(storage, path, most_rows - found.rows):
            if twice := sorted(name for name, count in Counter(table.column_names).items() if count > 1):
                raise DataError(f"{storage.full(path)}: column {twice[0]} is in it twice; rename one of them")
            found.rows += len(table)
            _add(found, table, label)
    return found


def _tables(file: Any, style: CsvStyle | None) -> Iterator[pa.Table]:
    if style is not None:
        parse = csv.ParseOptions(
            delimiter=style.delimiter, newlines_in_values=True, invalid_row_handler=lambda row: "skip"
        )
        read, convert = csv.ReadOptions(encoding=style.encoding), csv.ConvertOptions(decimal_point=style.decimal)
        for batch in csv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert):
            yield pa.Table.from_batches([batch])
        return
    with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        for number in range(parquet.num_row_groups):
            yield parquet.read_row_group(number)


def _add(found: TableProfile, table: pa.Table, label: str | None) -> None:
    label_lengths = None
    if label is not None and label in table.column_names and is_list(table.schema.field(label).type):
        label_lengths = pc.list_value_length(table.column(label).combine_chunks())
    for name in table.column_names:
        array: Any = table.column(name).combine_chunks()
        kind, depth = inner_type(array.type)
        column = found.columns.setdefault(name, Column(name, str(array.type), content_of(kind), depth))
        column.rows += len(array)
        column.nulls += array.null_count
        if depth:
            same = label_lengths is not None and pc.list_value_length(array).equals(label_lengths)
            column.like_label &= same
        _add_values(column, _innermost(column, array))


def _innermost(column: Column, array: Any) -> Any:
    while is_list(array.type):
        lengths = pc.list_value_length(array).drop_null()
        array = array.flatten()
        if not is_list(array.type) and len(lengths):
            bounds = pc.min_max(lengths)
            shortest = int(bounds["min"].as_py())
            column.shortest = shortest if column.shortest is None else min(column.shortest, shortest)
            column.longest = max(column.longest, int(bounds["max"].as_py()))
    return array


def _add_values(column: Column, array: Any) -> None:
    column.missing += array.null_count
    array = array.drop_null()
    column.values += len(array)
    if column.content == "text":
        try:
            texts = pc.unique(array.cast(pa.string())).to_pylist()
        except UnicodeDecodeError as failure:
            raise DataError(f"column {column.name} has text that is not UTF-8; write the file in UTF-8") from failure
        column.distinct = column.distinct.with_values(np.array([id_of_text(text) for text in texts], np.int64))
        column.example = column.example or next(iter(texts), None)
        column.is_binary &= all(text in ("0", "1") for text in islice(texts, 3))
    elif column.content in ("integer", "real") and len(array):
        values_N = array.to_numpy(zero_copy_only=False)
        if column.content == "real":
            is_nan_N = np.isnan(values_N)
            column.missing += int(is_nan_N.sum())
            values_N = values_N[~is_nan_N]
            if not len(values_N):
                return
        column.is_binary &= bool(((values_N == 0) | (values_N == 1)).all())
        column.smallest = min(float(values_N.min()), column.smallest if column.smallest is not None else np.inf)
        column.largest = max(float(values_N.max()), column.largest if column.largest is not None else -np.inf)
        bits_N = values_N.astype(np.float64).view(np.int64) if column.content == "real" else values_N.astype(np.int64)
        column.distinct = column.distinct.with_values(bits_N)


def inner_type(kind: pa.DataType) -> tuple[pa.DataType, int]:
    """Return the type within all lists, and how many lists there are."""
    inner: Any = kind
    depth = 0
    while is_list(inner):
        inner, depth = inner.value_type, depth + 1
    return inner, depth


def content_of(kind: pa.DataType) -> Content:
    """Say what numbers or texts a type has."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind):
        return "real"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    return "time" if pa.types.is_temporal(kind) else "other"


def is_list(kind: pa.DataType) -> bool:
    """Return whether it is a list of any form."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
