"""Tables of other programs: Arrow tables of them, and what is in their columns: types, values, lengths of lists."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from featurestore.errors import StorageError
from featurestore.format.datafile import is_text
from featurestore.storage.storage import Storage
from featurestore.text import STYLE_BYTES, CsvTextError, find_style, long_rows
from trainer.errors import DataError
from trainer.schema.fields import DistinctCount

CSV_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (".parquet", *CSV_SUFFIXES)
_ROWS_TOGETHER = 65_536
Content = Literal["integer", "real", "text", "time", "other"]
READ_TYPES: Mapping[Content, pa.DataType] = {"integer": pa.int64(), "real": pa.float64(), "text": pa.large_string()}


@dataclass
class Column:
    """One column, as far as it was read."""

    name: str
    type: str
    content: Content
    depth: int
    """Lists around a value."""
    rows: int = 0
    nulls: int = 0
    missing: int = 0
    """Values that are null or NaN, those in lists too."""
    different: Any = None
    """The different values, in the order in which they came; None of dates and other types that no field reads."""
    counted: DistinctCount | None = None
    """The different values of all rows, where they were counted although not all rows were read."""
    shortest: int | None = None
    """Shortest length of the innermost lists."""
    longest: int = 0
    may_lack: bool = False
    """Whether numbers may be missing in rows that were not read."""
    like_label: bool = True
    """Whether the outer lists are as long as the labels'."""

    @property
    def num_different(self) -> int:
        """The number of different values."""
        return 0 if self.different is None else len(self.different)

    def examples(self, most: int) -> list[Any]:
        """Return the first different values."""
        found: list[Any] = self.different.slice(0, most).to_pylist() if self.num_different else []
        return found

    @property
    def is_binary(self) -> bool:
        """Whether all values are 0 or 1, as numbers, truth values or text, and there is one."""
        return not self.depth and set() < {str(each) for each in self.examples(3)} <= {"0", "1", "0.0", "1.0"}

    @property
    def is_label(self) -> bool:
        """Whether all values are 0 or 1, or the words yes or no."""
        return self.is_binary or (
            self.content == "text" and not self.depth and set() < {*map(str.lower, self.examples(5))} <= {"yes", "no"}
        )

    @property
    def limits(self) -> tuple[float, float] | None:
        """The smallest and the largest number."""
        if not self.num_different:
            return None
        found = pc.min_max(self.different)
        return float(found["min"].as_py()), float(found["max"].as_py())

    def add(self, array: Any, label_lengths: Any) -> None:
        """Take in the rows of one more part of a table. Raises DataError."""
        self.rows += len(array)
        self.nulls += array.null_count
        if self.depth:
            self.like_label &= label_lengths is not None and pc.list_value_length(array).equals(label_lengths)
        for level in range(self.depth):
            lengths = pc.list_value_length(array).drop_null()
            array = array.flatten()
            if level == self.depth - 1 and len(lengths):
                bounds = pc.min_max(lengths)
                shortest = int(bounds["min"].as_py())
                self.shortest = shortest if self.shortest is None else min(self.shortest, shortest)
                self.longest = max(self.longest, int(bounds["max"].as_py()))
        if self.content not in READ_TYPES:
            self.missing += array.null_count
            return
        array = array.cast(READ_TYPES[self.content], safe=False)
        if self.content == "real":
            array = pc.if_else(pc.is_nan(array), None, array)
        self.missing += array.null_count
        more = pc.unique(array.drop_null())
        try:
            more.validate(full=True)
        except pa.ArrowInvalid as failure:
            raise DataError(f"column {self.name} has text that is not UTF-8; write the file in UTF-8") from failure
        self.different = more if self.different is None else pc.unique(pa.concat_arrays([self.different, more]))


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
        with storage.open_input(path) as file:
            for table in _csv_blocks(file, most_rows) if path.endswith(CSV_SUFFIXES) else _row_groups(file):
                yield table.slice(0, left)
                left -= len(table)
                if left <= 0:
                    return
    except (pa.ArrowException, OSError, StorageError, CsvTextError, UnicodeDecodeError) as error:
        raise DataError(f"{storage.full(path)} cannot be read: {str(error).strip()}") from error


def _row_groups(file: Any) -> Iterator[pa.Table]:
    with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        for number in range(parquet.num_row_groups):
            yield parquet.read_row_group(number)


def _csv_blocks(file: Any, most_rows: int) -> Iterator[pa.Table]:
    style = find_style(file.read(STYLE_BYTES))
    file.seek(0)
    long_rows(file, style.delimiter, most_rows)
    file.seek(0)
    parse = csv.ParseOptions(delimiter=style.delimiter, newlines_in_values=True, invalid_row_handler=lambda row: "skip")
    read, convert = csv.ReadOptions(encoding=style.encoding), csv.ConvertOptions(decimal_point=style.decimal)
    for batch in csv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert):
        yield pa.Table.from_batches([batch])


def look(storage: Storage, paths: list[str], label: str | None, most_rows: int) -> TableProfile:
    """Profile the columns of these files, which have equal names, up to `most_rows` rows. Raises DataError."""
    found, waiting = TableProfile(), list[pa.Table]()
    for path in paths:
        if found.rows >= most_rows:
            found.complete = False
            break
        for table in read_tables(storage, path, most_rows - found.rows):
            if twice := sorted(name for name, count in Counter(table.column_names).items() if count > 1):
                raise DataError(f"{storage.full(path)}: column {twice[0]} is in it twice; rename one of them")
            found.rows += len(table)
            is_next = not waiting or waiting[0].schema.equals(table.schema)
            if not is_next or sum(map(len, waiting)) + len(table) > _ROWS_TOGETHER:
                _add(found, waiting, label)
                waiting = []
            waiting.append(table)
    _add(found, waiting, label)
    return found


def _add(found: TableProfile, tables: list[pa.Table], label: str | None) -> None:
    """Take in tables of equal columns, which are put together: many small files cost what their rows do."""
    if not tables:
        return
    table, lengths = pa.concat_tables(tables), None
    if label is not None and label in table.column_names and is_list(table.schema.field(label).type):
        lengths = pc.list_value_length(table.column(label).combine_chunks())
    for name in table.column_names:
        array: Any = table.column(name).combine_chunks()
        kind, depth = inner_type(array.type)
        column = found.columns.setdefault(name, Column(name, str(array.type), content_of(kind), depth))
        column.add(array, lengths)


def inner_type(kind: pa.DataType) -> tuple[pa.DataType, int]:
    """Return the type of the values within all lists, dictionary-encoded or not, and how many lists there are."""
    inner: Any = kind
    depth = 0
    while is_list(inner):
        inner, depth = inner.value_type, depth + 1
    return inner.value_type if pa.types.is_dictionary(inner) else inner, depth


def content_of(kind: pa.DataType) -> Content:
    """Name the type of numbers or texts within lists."""
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind):
        return "real"
    if is_text(kind):
        return "text"
    return "time" if pa.types.is_temporal(kind) else "other"


def is_list(kind: pa.DataType) -> bool:
    """Return whether it is a list of any form."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def table_of(data: Any) -> pa.Table:
    """Make an Arrow table of a DataFrame of pandas, an Arrow table, or a mapping of columns. Raises DataError."""
    if isinstance(data, pa.Table):
        return data
    try:
        if isinstance(data, pa.RecordBatch):
            return pa.Table.from_batches([data])
        if is_pandas(data):
            return pa.Table.from_pandas(data, preserve_index=False).replace_schema_metadata(None)
        if isinstance(data, Mapping):
            return pa.table({str(name): _column(values) for name, values in data.items()})
    except (pa.ArrowException, ValueError, TypeError) as failure:
        raise DataError(f"the table cannot be read: {failure}") from failure
    raise DataError(f"{type(data).__name__} is not a table; give a DataFrame of pandas, an Arrow table, or a dict")


def is_pandas(data: Any) -> bool:
    """Return whether data is a DataFrame of pandas, which is not imported for it."""
    return type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "columns")


def _column(values: Any) -> Any:
    """Make a column of a list or of an array of any library; rows of a matrix become lists."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if hasattr(values, "__array__"):
        values = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
        return pa.array(list(values) if values.ndim > 1 else values)
    return pa.array(values)
