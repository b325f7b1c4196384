"""Impression and behaviour logs: their columns, the check of their files, and rows as plain arrays.

Letters of shapes: N rows of a piece of a log.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore.errors import StorageError
from featurestore.keys import keys_of_uris
from featurestore.storage.storage import Storage
from pipeline.errors import SampleError, SampleOptionError
from pipeline.samples.mapping import TableLayout, TimeUnit
from pipeline.samples.texts import csv_names, parse_ids, parse_labels, parse_numbers, parse_times, read_csv

Columns = dict[str, npt.NDArray[Any]]

IMPRESSIONS = "impressions"
BEHAVIORS = "behaviors"
MICROSECONDS = 1_000_000
UNKNOWN = -1  # a user column without a value
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
class LogPiece:
    """Some row groups of one file of a log: what one task reads."""

    log: str
    url: str  # of the folder that has the logs
    path: str  # below it
    row_groups: tuple[int, ...]
    first_row: int  # in the file
    num_rows: int  # of CSV a guess from its size
    layout: TableLayout

    @property
    def is_csv(self) -> bool:
        """Whether the file is text; else it is Parquet."""
        return self.path.endswith(CSV_SUFFIXES)


def find_pieces(
    url: str, log: str, user_columns: Sequence[str] | None, layout: TableLayout | None = None
) -> list[LogPiece]:
    """Find the log's pieces, in the order of its files' names; only the files' footers are read.

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
    pieces = [piece for path in files for piece in _pieces(storage, LogPiece(log, url, path, (), 0, 0, layout))]
    if not pieces:
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
        delimiter=",",
        time_unit="s",
    )


def _pieces(storage: Storage, empty: LogPiece) -> list[LogPiece]:
    """Cut one file, whose columns are checked, into pieces."""
    if empty.is_csv:
        names = csv_names(storage, empty.path, empty.layout.delimiter)
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


def open_parquet(storage: Storage, path: str) -> pq.ParquetFile:
    """Open a file, with page checksums verified where it has them. Raises SampleError where it is no Parquet."""
    try:
        return pq.ParquetFile(storage.open_input(path), page_checksum_verification=True)
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
    pieces, first_group, first_row, rows = [], 0, 0, 0
    for group, num_rows in enumerate(groups):
        rows += num_rows
        if rows >= PIECE_ROWS or group == len(groups) - 1:
            if rows:
                which = tuple(range(first_group, group + 1))
                pieces.append(replace(empty, row_groups=which, first_row=first_row, num_rows=rows))
            first_group, first_row, rows = group + 1, first_row + rows, 0
    return pieces


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


@dataclass(frozen=True)
class LogRows:
    """A piece as arrays: its good rows, and number and reason of the others."""

    num_rows: int
    good: Columns  # timestamp in microseconds, image as key, all int64 but dwell_s and dense columns
    bad_row: npt.NDArray[np.int64]  # in the file
    bad_reason: list[str]


def read_piece(piece: LogPiece, latest_s: int) -> LogRows:
    """Reads and checks a piece. Rows later than `latest_s` (seconds since 1970) are bad, as one such row would
    become the last day of the log. A bad row has the first reason in the order of the columns."""
    layout, storage = piece.layout, Storage(piece.url)
    torn: dict[int, str] = {}
    doubtful: dict[int, str] = {}
    names = [layout.names[name] for name in layout.kinds]
    if piece.is_csv:
        read = read_csv(storage, piece.path, names, layout.delimiter)
        table, torn, doubtful = read.table, read.torn, read.doubtful
    else:
        with open_parquet(storage, piece.path) as file:
            try:
                table = file.read_row_groups(list(piece.row_groups), columns=names)
            except (pa.ArrowException, OSError) as error:
                raise SampleError(f"{storage.full(piece.path)}: cannot be read: {error}") from error
    row_N = np.setdiff1d(np.arange(table.num_rows + len(torn)), list(torn))  # in the file
    reasons = sorted(set(doubtful.values()))
    reason_N = np.full(table.num_rows, -1)
    for row, reason in doubtful.items():
        reason_N[np.searchsorted(row_N, row)] = reasons.index(reason)
    good: Columns = {}
    for name, kind in layout.kinds.items():
        column = table.column(layout.names[name])
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        good[name], faults = _arrays(column, kind, latest_s, layout.time_unit)
        for fault, is_bad_N in faults.items():
            reason_N[is_bad_N & (reason_N < 0)] = len(reasons)
            reasons.append(f"{name} {fault}")
    good |= {name: _constant(value, table.num_rows) for name, value in layout.constants.items()}
    is_good_N = reason_N < 0
    (bad_N,) = np.nonzero(~is_good_N)
    bad = sorted([*zip(row_N[bad_N].tolist(), [reasons[code] for code in reason_N[bad_N]], strict=True), *torn.items()])
    return LogRows(
        table.num_rows + len(torn),
        {name: values_N[is_good_N] for name, values_N in good.items()},
        piece.first_row + np.array([row for row, _ in bad], np.int64),
        [reason for _, reason in bad],
    )


def _constant(value: float, count: int) -> npt.NDArray[Any]:
    return np.full(count, value, np.int64 if isinstance(value, int) else np.float64)


Faults = dict[str, npt.NDArray[np.bool_]]  # which rows have each fault


def _arrays(column: Any, kind: str, latest_s: int, unit: TimeUnit) -> tuple[npt.NDArray[Any], Faults]:
    """Read the values of a chunked Arrow column, anything where they are bad, and their faults."""
    if kind in ANY:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            return _text_arrays(column, kind, latest_s, unit)
        kind = ANY[kind]
    null = {"is null": column.is_null().to_numpy()}
    if kind == "time":
        value_N, faults = _times(column, latest_s, unit)
        return value_N, null | faults
    if kind == "image" and not pa.types.is_integer(column.type):
        text = column.fill_null("")
        return _keys(text), null | {"is empty": (pc.binary_length(text).to_numpy() == 0)}
    if kind in ("label", "seconds", "dense"):
        value_N, faults = _numbers(column.cast(pa.float64()).fill_null(0).to_numpy(), kind)
        return value_N, null | faults
    value_N = column.cast(pa.int64()).fill_null(UNKNOWN).to_numpy()
    return value_N, {} if kind == "profile" else null


def _text_arrays(column: Any, kind: str, latest_s: int, unit: TimeUnit) -> tuple[npt.NDArray[Any], Faults]:
    """Read as `_arrays`, but text that has to be parsed first."""
    null_N = column.is_null().to_numpy()
    null = {"is null": null_N}
    if kind == "any_time":
        time_N, wrong_N = parse_times(column, unit)
        late_N = time_N > latest_s * MICROSECONDS
        return time_N, null | {"is no time": wrong_N, "is before 1970": time_N < 0, "is in the future": late_N}
    if kind == "any_id":
        return parse_ids(column)[0], null
    if kind == "extra_id":
        return np.where(null_N, UNKNOWN, parse_ids(column)[0]), {}
    number_N, wrong_N = (parse_labels if kind == "any_label" else parse_numbers)(column)
    value_N, faults = _numbers(number_N, ANY[kind])
    return value_N, null | {"is no number": wrong_N} | faults


def _numbers(number_N: npt.NDArray[np.float64], kind: str) -> tuple[npt.NDArray[Any], Faults]:
    if kind == "label":
        is_click_N = number_N == 1
        return is_click_N.astype(np.int64), {"is not 0 or 1": ~is_click_N & (number_N != 0)}
    if kind == "dense":
        with np.errstate(over="ignore"):
            single_N = number_N.astype(np.float32)
        return single_N, {"is not finite in float32": ~np.isfinite(single_N)}
    return number_N, {"is not finite": ~np.isfinite(number_N), "is negative": number_N < 0}


def _times(column: Any, latest_s: int, whole: str) -> tuple[npt.NDArray[np.int64], Faults]:
    """Microseconds since 1970; nanoseconds are cut off, a timestamp without a time zone is in UTC, a whole number is
    one of unit `whole`."""
    unit = column.type.unit if pa.types.is_timestamp(column.type) else whole
    value_N = column.cast(pa.int64()).fill_null(0).to_numpy()
    is_early_N, is_late_N = value_N < 0, value_N > latest_s * PER_SECOND[unit]
    value_N = np.where(is_early_N | is_late_N, 0, value_N)
    time_N = value_N // 1_000 if unit == "ns" else value_N * (MICROSECONDS // PER_SECOND[unit])
    return time_N, {"is before 1970": is_early_N, "is in the future": is_late_N}


def _keys(column: Any) -> npt.NDArray[np.int64]:
    """Hash the key of each uri; equal ones are hashed once."""
    encoded = column.combine_chunks().dictionary_encode()
    keys_U = keys_of_uris(encoded.dictionary.to_pylist())
    keys_N: npt.NDArray[np.int64] = keys_U[encoded.indices.to_numpy()]
    return keys_N
