"""The files of impression and behaviour logs: their columns, their check, and the pieces that tasks read.

Letters of shapes: N rows of a piece of a log.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore.console.output import print_summary
from featurestore.errors import StorageError
from featurestore.storage.storage import Storage
from featurestore.text import CsvStyle
from pipeline.errors import SampleError, SampleOptionError
from pipeline.samples.mapping import CsvSettings, TableLayout
from pipeline.samples.texts import csv_beginning, csv_names, unit_of

IMPRESSIONS = "impressions"
BEHAVIORS = "behaviors"
MICROSECONDS = 1_000_000
PIECE_ROWS = 1_000_000

KINDS = {
    "timestamp": "time",
    "user": "id",
    "session": "id",
    "scene": "id",
    "item": "id",
    "image": "image",
    "category": "id",
    "label": "label",
    "dwell_s": "seconds",
}
COLUMNS = {
    IMPRESSIONS: ("timestamp", "user", "session", "scene", "item", "image", "category", "label"),
    BEHAVIORS: ("timestamp", "user", "item", "image", "category", "dwell_s"),
}
WANTED = {
    "time": "a timestamp, or a whole number of seconds since 1970",
    "id": "a whole number of at most 64 bits, signed",
    "image": "a string (the image's uri) or its int64 key",
    "label": "a whole number, a boolean or a float that is 0 or 1",
    "seconds": "a number of seconds",
    "profile": "a whole number of at most 64 bits, signed",
    "any_time": "a timestamp, a whole number, or text in ISO 8601",
    "any_id": "a whole number of at most 64 bits, signed, or text",
    "extra_id": "a whole number of at most 64 bits, signed, or text",
    "any_label": "a number, boolean or text that is 0 or 1",
    "any_seconds": "a number of seconds",
    "dense": "a number",
}
# Kinds of a person's own tables, which may be text too; behind each the kind of those that are numbers.
ANY = {
    "any_time": "time",
    "any_id": "id",
    "extra_id": "profile",
    "any_label": "label",
    "any_seconds": "seconds",
    "dense": "dense",
}
CSV_SUFFIXES = (".csv", ".tsv")
_CSV_ROW_BYTES = 60  # for a guess at the number of rows
PER_SECOND = {"s": 1, "ms": 1_000, "us": MICROSECONDS, "ns": 1_000_000_000}


@dataclass(frozen=True)
class WantedRows:
    """The rows of a log that are read: of a time, and of some users where `users_path` names a file (.npy)."""

    low_us: int
    high_us: int
    users_path: str | None = None

    def of(self, time_N: npt.NDArray[np.int64], user_N: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which of these rows are wanted, (N,)."""
        wanted_N: npt.NDArray[np.bool_] = (time_N >= self.low_us) & (time_N < self.high_us)
        if self.users_path is not None:
            users_U = np.load(self.users_path)
            (likely,) = np.nonzero(wanted_N & _may_be_in(user_N, users_U))
            is_in = pc.is_in(pa.array(user_N[likely]), value_set=pa.array(users_U))
            wanted_N = np.zeros_like(wanted_N)
            wanted_N[likely] = is_in.to_numpy(zero_copy_only=False)
        return wanted_N

    def of_users(self, path: str) -> "WantedRows":
        """Want only those rows whose users are in a file."""
        return WantedRows(self.low_us, self.high_us, path)

    def may_have(self, times: tuple[int, int] | None) -> bool:
        """Return whether rows whose first and last time are these may have a wanted one; None: it is not known."""
        return times is None or (times[0] < self.high_us and times[1] >= self.low_us)


def _may_be_in(value_N: npt.NDArray[np.int64], set_U: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which values have the last bits of one of a set, (N,): all that are in it and few others.

    They are found by one look into a table each, where a search takes several times as long."""
    last_bits = (1 << min(26, (16 * len(set_U)).bit_length())) - 1  # 64 MB at most
    has_bits = np.zeros(last_bits + 1, np.bool_)
    has_bits[set_U & last_bits] = True
    found_N: npt.NDArray[np.bool_] = has_bits[value_N & last_bits]
    return found_N


@dataclass(frozen=True)
class LogPiece:
    """Some row groups of one file of a log: what one task reads."""

    log: str
    url: str  # of the folder that has the logs
    path: str  # below it
    row_groups: tuple[int, ...]
    first_row: int  # in the file
    num_rows: int  # of CSV a guess from its size
    layout: TableLayout
    wanted: WantedRows | None = None  # None: every row
    times: tuple[int, int] | None = None  # µs of its first and last row, where the file says it

    @property
    def is_csv(self) -> bool:
        """Whether the file is text; else it is Parquet."""
        return self.path.endswith(CSV_SUFFIXES)


def find_pieces(
    url: str,
    log: str,
    user_columns: Sequence[str] | None,
    layout: TableLayout | None = None,
    wanted: WantedRows | None = None,
) -> list[LogPiece]:
    """Find the log's pieces, in the order of its files' names; only the files' footers are read.

    Row groups whose statistics say that they have no `wanted` row are left out; then there may be no piece.

    `user_columns` None takes those of `user_age` and `user_gender` that the first file has; with the `layout` of a
    person's own tables, CSV or Parquet, those count that it names. Raises SampleError for a log that is not there or
    has no row, and for a column that is missing or of a wrong type, with the file's name.
    """
    if reserved := set(user_columns or ()) & set(KINDS):
        raise SampleOptionError(
            f"user_columns={','.join(sorted(reserved))}: has a meaning of its own, it is kept anyway"
        )
    storage = Storage(url)
    files = _files(storage, layout.files) if layout else _parquet_files(storage, log)
    place = layout.files if layout else log
    if not files and layout:
        raise SampleOptionError(
            f"{storage.full(place)}: no .parquet, .csv or .tsv files there; {log}.files of the mapping names a file or "
            "folder below --logs"
        )
    if not files:
        raise SampleOptionError(
            f"{storage.full(place)}: no .parquet files in it; --logs must have {IMPRESSIONS}/ and {BEHAVIORS}/"
        )
    layout = layout or _layout_of(storage, log, files[0], user_columns)
    if layout.time_unit is None or (files[0].endswith(CSV_SUFFIXES) and layout.found_style is None):
        layout = _settled(storage, files[0], log, layout)
    pieces = [piece for path in files for piece in _pieces(storage, LogPiece(log, url, path, (), 0, 0, layout, wanted))]
    if not pieces and wanted is None:
        raise SampleError(f"{storage.full(place)}: {len(files)} files and not one row")
    return pieces


def _layout_of(storage: Storage, log: str, path: str, user_columns: Sequence[str] | None) -> TableLayout:
    """Describe a log as it is documented; the file at `path` says which of the usual user columns there are."""
    if log == IMPRESSIONS and user_columns is None:
        with open_parquet(storage, path) as file:
            user_columns = [name for name in ("user_age", "user_gender") if name in file.schema_arrow.names]
    kinds = {name: KINDS[name] for name in COLUMNS[log]} | dict.fromkeys(user_columns or (), "profile")
    return TableLayout(
        files=log,
        names={name: name for name in kinds},
        kinds=kinds,
        constants={},
        user_columns=tuple(user_columns or ()),
        ad_columns=(),
        csv=CsvSettings(),
        time_unit=None,
        time_format=None,
    )


def _settled(storage: Storage, path: str, log: str, layout: TableLayout) -> TableLayout:
    """Find in the first file what the layout leaves open: how CSV is written, and the unit of times. Say it."""
    told = []
    if path.endswith(CSV_SUFFIXES):
        style, rows = csv_beginning(storage, path, layout.csv)
        layout = replace(layout, found_style=style)
        if style != CsvStyle(**layout.csv.model_dump(exclude_none=True)):
            told.append(f"read as CSV with {style}")
        name = layout.names["timestamp"]
        times = [row[rows[0].index(name)] for row in rows[1:] if name in rows[0] and len(row) == len(rows[0])]
    else:
        times = _first_times(storage, path, layout.names["timestamp"])
    if layout.time_unit is None:
        unit = unit_of(times)
        layout = replace(layout, time_unit=unit)
        if unit != "s":
            told.append(f"times such as {next(filter(str.isdigit, times))} are in {unit} since 1970")
    if told:
        told_by = "; csv and time_unit of a mapping override it"
        print_summary(f"{log:<12} {storage.full(path)}: {', '.join(told)}{told_by}")
    return layout


def _first_times(storage: Storage, path: str, name: str) -> list[str]:
    """Read the first times of a Parquet file; none of a damaged one, or without such a column: its check says it."""
    with open_parquet(storage, path) as file, contextlib.suppress(pa.ArrowException, OSError, StopIteration, KeyError):
        return [str(value) for value in next(file.iter_batches(1000, columns=[name])).column(name).to_pylist()]
    return []


def _pieces(storage: Storage, empty: LogPiece) -> list[LogPiece]:
    """Cut one file, whose columns are checked, into pieces."""
    if empty.is_csv:
        names = csv_names(storage, empty.path, empty.layout.style)
        _check_columns(pa.schema([(name, pa.string()) for name in names]), empty)
        return [replace(empty, num_rows=storage.size(empty.path) // _CSV_ROW_BYTES)]
    with open_parquet(storage, empty.path) as file:
        return _cut(file, empty)


def _files(storage: Storage, place: str) -> list[str]:
    """List the file at `place`, or those below it that can be read, but hidden ones."""
    found = [entry.path for entry in storage.entries(place)]
    if not found:
        with contextlib.suppress(FileNotFoundError):
            found = [storage.entry(place).path]
    return [
        path
        for path in found
        if path.endswith((".parquet", *CSV_SUFFIXES))
        and not any(part.startswith((".", "_")) for part in path.split("/"))
    ]


def open_parquet(storage: Storage, path: str, encoded: Sequence[str] = ()) -> pq.ParquetFile:
    """Open a file, with page checksums verified where it has them; texts in `encoded` columns stay dictionaries.

    Raises SampleError where it is no Parquet.
    """
    try:
        file = storage.open_input(path)
        return pq.ParquetFile(file, read_dictionary=list(encoded), page_checksum_verification=True)
    except (pa.ArrowException, OSError, StorageError) as error:
        raise SampleError(f"{storage.full(path)}: not readable as Parquet: {error}") from error


def _parquet_files(storage: Storage, folder: str) -> list[str]:
    """List the .parquet files in `folder` and in folders named like day=2026-01-31 below it."""
    found: list[str] = []
    try:
        names = storage.list(folder)
        for name in names:
            path = storage.join(folder, name)
            if name.endswith(".parquet") and not name.startswith((".", "_")):
                found.append(path)
            elif "=" in name and "." not in name:
                found += _parquet_files(storage, path)
    except StorageError as error:
        raise SampleError(str(error)) from error
    return found


def _cut(file: pq.ParquetFile, empty: LogPiece) -> list[LogPiece]:
    """Cut a file whose columns are right into pieces of about PIECE_ROWS rows, in whole row groups."""
    _check_columns(file.schema_arrow, empty)
    groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    if empty.wanted is None:
        times: list[tuple[int, int] | None] = [None] * len(groups)
        wanted = [True] * len(groups)
    else:
        times = [_times(file, group, empty) for group in range(len(groups))]
        wanted = [empty.wanted.may_have(each) for each in times]
    pieces: list[LogPiece] = []
    held: list[int] = []
    for group in range(len(groups)):
        if wanted[group]:
            held.append(group)
        ends = group == len(groups) - 1 or not wanted[group + 1]
        rows = sum(groups[each] for each in held)
        if rows and (ends or rows >= PIECE_ROWS):
            known = [span for each in held if (span := times[each])]
            span = (min(known)[0], max(end for _, end in known)) if len(known) == len(held) else None
            first_row = sum(groups[: held[0]])
            pieces.append(replace(empty, row_groups=tuple(held), first_row=first_row, num_rows=rows, times=span))
            held = []
    return pieces


def _times(file: pq.ParquetFile, group: int, piece: LogPiece) -> tuple[int, int] | None:
    """Read from a file's footer the first and last time of a row group, µs; None where it does not say it."""
    names = [file.metadata.schema.column(column).path for column in range(file.metadata.num_columns)]
    name = piece.layout.names["timestamp"]
    statistics = file.metadata.row_group(group).column(names.index(name)).statistics
    if statistics is None or not statistics.has_min_max:
        return None
    kind = file.schema_arrow.field(name).type
    if not (pa.types.is_timestamp(kind) or pa.types.is_integer(kind)):
        return None
    unit = kind.unit if pa.types.is_timestamp(kind) else piece.layout.unit
    ends = pa.array([statistics.min, statistics.max], kind).cast(pa.int64()).to_numpy().tolist()
    low_us, high_us = (each * MICROSECONDS // PER_SECOND[unit] for each in ends)
    return low_us, high_us


def _check_columns(schema: pa.Schema, piece: LogPiece) -> None:
    where = f"{Storage(piece.url).full(piece.path)}: column"
    for ours, kind in piece.layout.kinds.items():
        name = piece.layout.names[ours]
        if name not in schema.names:
            raise SampleOptionError(f"{where} {name!r} is missing; there are {', '.join(schema.names)}")
        if schema.names.count(name) > 1:
            raise SampleError(f"{where} {name!r} is there {schema.names.count(name)} times")
        found = schema.field(name).type
        if not _fits(found, kind):
            raise SampleError(f"{where} {name!r} is {found}, wanted is {WANTED[kind]}")


def _fits(found: pa.DataType, kind: str) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    if kind in ANY and (pa.types.is_string(found) or pa.types.is_large_string(found)):
        return True
    kind = ANY.get(kind, kind)
    whole = pa.types.is_integer(found) and found != pa.uint64()
    if kind == "time":
        return whole or pa.types.is_timestamp(found)
    if kind == "image":
        return whole or pa.types.is_string(found) or pa.types.is_large_string(found)
    if kind == "label":
        return whole or pa.types.is_boolean(found) or pa.types.is_floating(found)
    if kind in ("seconds", "dense"):
        return whole or pa.types.is_floating(found)
    return whole
