"""Tables of other programs: Arrow tables of them, and what is in their columns: types, values, lengths of lists."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from featurestore.text import COMMA_NUMBER, STYLE_BYTES, CsvTextError, find_style, first_rows, long_rows
from trainer.errors import DataError
from trainer.problems import Problem
from trainer.schema.fields import DistinctCount

CSV_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (".parquet", *CSV_SUFFIXES)
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_ROWS_TOGETHER = 65_536
# What the values of a CSV file may be, the first that fits all of a block; the next block may be of another type.
_CSV_TYPES = (
    pa.int64(), pa.bool_(), pa.date32(), pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("ns", "UTC"), pa.float64(),
)  # fmt: skip
_CSV_NULLS = pa.array(csv.ConvertOptions().null_values or [], pa.string())
Content = Literal["integer", "real", "text", "time", "empty", "other"]
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
        self._widen(array.type)
        if inner_type(array.type)[1] != self.depth:
            self.missing += len(array)
            return
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
            raise DataError(Problem.NOT_UTF8, f"column {self.name}") from failure
        self.different = more if self.different is None else pc.unique(pa.concat_arrays([self.different, more]))

    def _widen(self, kind: pa.DataType) -> None:
        """Take the content that values of this type have in common with those so far. Raises DataError."""
        inner, depth = inner_type(kind)
        content = content_of(inner)
        if self.content == "empty":
            self.type, self.content, self.depth = str(kind), content, depth
        if content == "empty" or (content, depth) == (self.content, self.depth):
            return
        if depth != self.depth:
            raise DataError(Problem.DIFFERENT_TYPES, self.name, self.type, kind)
        both = {content, self.content}
        common: Content = "text" if "text" in both and "other" not in both else "other"
        common = "real" if both == {"integer", "real"} else common
        self.type = f"{self.type} and {kind}" if common == "other" else str(kind) if content == common else self.type
        self.content = common
        if self.different is not None:
            self.different = self.different.cast(READ_TYPES[common]) if common in READ_TYPES else None


@dataclass
class TableProfile:
    """Columns of some files, and whether all of their rows were read."""

    columns: dict[str, Column] = dataclasses.field(default_factory=dict)
    rows: int = 0
    complete: bool = True
    lacked: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    """By column that not all files have: the files that lack it."""

    @property
    def common(self) -> "TableProfile":
        """Those columns that all files have."""
        return dataclasses.replace(self, columns={k: each for k, each in self.columns.items() if k not in self.lacked})


def data_files(storage: Storage, path: str = "") -> list[str]:
    """List the files below `path` that can be looked into; hidden ones are left out."""
    found = [entry.path for entry in storage.entries(path)]
    return [
        each
        for each in found
        if each.endswith(SUFFIXES) and not any(part.startswith((".", "_")) for part in each.split("/"))
    ]


def json_hint(names: Iterable[str]) -> str:
    """End a message that no file can be read: with what to do with those of JSON lines, where there are some."""
    found = next((name for name in names if name.endswith(_JSON_SUFFIXES)), None)
    how = f'pandas.read_json("{found}", lines=True).to_parquet("{found}.parquet")'
    return "" if found is None else f"; JSON lines are not read: convert them, as by {how}"


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
        raise DataError(Problem.REFUSED, "read", storage.full(path), str(error).strip()) from error


def _row_groups(file: Any) -> Iterator[pa.Table]:
    with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        for number in range(parquet.num_row_groups):
            yield parquet.read_row_group(number)


def _csv_blocks(file: Any, most_rows: int) -> Iterator[pa.Table]:
    beginning = file.read(STYLE_BYTES)
    style = find_style(beginning)
    names = dict.fromkeys(next(iter(first_rows(beginning, style, 1)), []), pa.string())
    file.seek(0)
    long_rows(file, style.delimiter, most_rows)
    file.seek(0)
    parse = csv.ParseOptions(delimiter=style.delimiter, newlines_in_values=True, invalid_row_handler=lambda row: "skip")
    read, convert = csv.ReadOptions(encoding=style.encoding), csv.ConvertOptions(column_types=names)
    for batch in csv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert):
        columns = [_typed(texts, style.decimal) for texts in batch.columns]
        yield pa.Table.from_arrays(columns, names=batch.schema.names)


def _typed(texts: Any, decimal: str) -> Any:
    """Read the texts of a column as the first of _CSV_TYPES that all of them fit; leave texts where none does."""
    kinds: tuple[pa.DataType, ...] = _CSV_TYPES
    values = pc.utf8_trim_whitespace(texts)
    values = pc.if_else(pc.is_in(values, value_set=_CSV_NULLS), None, values)
    if values.null_count == len(values):
        return pa.nulls(len(values))
    is_number = pc.match_substring_regex(values, f"^(?:{COMMA_NUMBER.pattern})$")
    if decimal == "," and pc.all(is_number).as_py():
        values = pc.replace_substring(pc.replace_substring(values, ".", ""), ",", ".")
    elif decimal == ",":
        kinds = kinds[:-1]  # 5.5 is no number there, as it is none for samples
    for kind in kinds:
        with contextlib.suppress(pa.ArrowInvalid):
            return values.cast(kind)
    return texts


def look(storage: Storage, paths: list[str], label: str | None, most_rows: int) -> TableProfile:
    """Profile the columns of these files, up to `most_rows` rows. Raises DataError."""
    found, waiting, names = TableProfile(), list[pa.Table](), dict[str, list[str]]()
    for path in paths:
        if found.rows >= most_rows:
            found.complete = False
            break
        for table in read_tables(storage, path, most_rows - found.rows):
            if twice := sorted(name for name, count in Counter(table.column_names).items() if count > 1):
                hint = ", or add the line of names" if path.endswith(CSV_SUFFIXES) else ""
                raise DataError(Problem.COLUMN_TWICE, storage.full(path), twice[0], hint)
            names[path] = table.column_names
            found.rows += len(table)
            is_next = not waiting or waiting[0].schema.equals(table.schema)
            if not is_next or sum(map(len, waiting)) + len(table) > _ROWS_TOGETHER:
                _add(found, waiting, label)
                waiting = []
            waiting.append(table)
    _add(found, waiting, label)
    lacked = {column: [path for path, there in names.items() if column not in there] for column in found.columns}
    found.lacked = {column: files for column, files in lacked.items() if files}
    for path, there in names.items():
        if len(names) > 1 and all(len(found.lacked.get(column, ())) == len(names) - 1 for column in there):
            other = next(each for each in names if each != path)
            told = " and ".join(f"{storage.full(each)} ({', '.join(names[each])})" for each in (path, other))
            raise DataError(Problem.NO_COMMON_COLUMN, told)
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
    if pa.types.is_null(kind):
        return "empty"
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
        raise DataError(Problem.REFUSED, "read", "the table", failure) from failure
    raise DataError(Problem.NOT_A_TABLE, type(data).__name__)


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
