"""Impression and behaviour logs: their columns, the check of their files, and rows as plain arrays.

Letters of shapes: N rows of a piece of a log.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore.errors import StorageError
from featurestore.keys import keys_of_uris
from featurestore.storage import Storage
from pipeline.errors import SampleError

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
}
PER_SECOND = {"s": 1, "ms": 1_000, "us": MICROSECONDS, "ns": 1_000_000_000}


@dataclass(frozen=True)
class Piece:
    """Some row groups of one file of a log: what one task reads."""

    log: str
    url: str  # of the folder that has the logs
    path: str  # below it
    row_groups: tuple[int, ...]
    first_row: int  # in the file
    num_rows: int
    user_columns: tuple[str, ...]

    @property
    def columns(self) -> dict[str, str]:
        """Kind of each column to read."""
        return {name: KINDS[name] for name in COLUMNS[self.log]} | dict.fromkeys(self.user_columns, "profile")


def find_pieces(url: str, log: str, user_columns: Sequence[str] | None) -> list[Piece]:
    """The log's pieces, in the order of its files' names; only the files' footers are read.

    `user_columns` None takes those of `user_age` and `user_gender` that the first file has. Raises SampleError for a
    log that is not there or has no row, and for a column that is missing or of a wrong type, with the file's name.
    """
    if reserved := set(user_columns or ()) & set(KINDS):
        raise SampleError(f"user_columns={','.join(sorted(reserved))}: has a meaning of its own, it is kept anyway")
    storage = Storage(url)
    files = _parquet_files(storage, log)
    if not files:
        raise SampleError(
            f"{storage.full(log)}: no .parquet files in it; --logs must have {IMPRESSIONS}/ and {BEHAVIORS}/"
        )
    pieces: list[Piece] = []
    for path in files:
        with open_parquet(storage, path) as file:
            if log == IMPRESSIONS and user_columns is None:
                user_columns = [name for name in ("user_age", "user_gender") if name in file.schema_arrow.names]
            pieces += _cut(file, Piece(log, url, path, (), 0, 0, tuple(user_columns or ())))
    if not pieces:
        raise SampleError(f"{storage.full(log)}: {len(files)} files and not one row")
    return pieces


def open_parquet(storage: Storage, path: str) -> pq.ParquetFile:
    """The file, with page checksums verified where it has them. Raises SampleError for what is no Parquet file."""
    try:
        return pq.ParquetFile(storage.open_input(path), page_checksum_verification=True)
    except (pa.ArrowException, OSError, StorageError) as error:
        raise SampleError(f"{storage.full(path)}: not readable as Parquet: {error}") from error


def _parquet_files(storage: Storage, folder: str) -> list[str]:
    """Paths of the .parquet files in `folder` and in folders named like day=2026-01-31 below it."""
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


def _cut(file: pq.ParquetFile, empty: Piece) -> list[Piece]:
    """Pieces of about PIECE_ROWS rows, in whole row groups, of a file whose columns are right."""
    _check_columns(file.schema_arrow, empty)
    groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    pieces, first_group, first_row, rows = [], 0, 0, 0
    for group, num_rows in enumerate(groups):
        rows += num_rows
        if rows >= PIECE_ROWS or group == len(groups) - 1:
            if rows:
                which = tuple(range(first_group, group + 1))
                pieces.append(Piece(empty.log, empty.url, empty.path, which, first_row, rows, empty.user_columns))
            first_group, first_row, rows = group + 1, first_row + rows, 0
    return pieces


def _check_columns(schema: pa.Schema, piece: Piece) -> None:
    where = f"{Storage(piece.url).full(piece.path)}: column"
    for name, kind in piece.columns.items():
        if name not in schema.names:
            raise SampleError(f"{where} {name!r} is missing; there are {', '.join(schema.names)}")
        if schema.names.count(name) > 1:
            raise SampleError(f"{where} {name!r} stands {schema.names.count(name)} times in it")
        found = schema.field(name).type
        if not _fits(found, kind):
            raise SampleError(f"{where} {name!r} is {found}, wanted is {WANTED[kind]}")


def _fits(found: pa.DataType, kind: str) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    whole = pa.types.is_integer(found) and found != pa.uint64()
    if kind == "time":
        return whole or pa.types.is_timestamp(found)
    if kind == "image":
        return whole or pa.types.is_string(found) or pa.types.is_large_string(found)
    if kind == "label":
        return whole or pa.types.is_boolean(found) or pa.types.is_floating(found)
    if kind == "seconds":
        return whole or pa.types.is_floating(found)
    return whole


@dataclass(frozen=True)
class Rows:
    """A piece as arrays: its good rows, and number and reason of the others."""

    good: Columns  # timestamp in microseconds, image as key, all int64 but dwell_s
    bad_row: npt.NDArray[np.int64]  # in the file
    bad_reason: list[str]


def read_piece(piece: Piece, latest_s: int) -> Rows:
    """Reads and checks a piece. Rows later than `latest_s` (seconds since 1970) are bad, as one such row would
    become the last day of the log. A bad row has the first reason in the order of the columns."""
    columns = piece.columns
    storage = Storage(piece.url)
    with open_parquet(storage, piece.path) as file:
        try:
            table = file.read_row_groups(list(piece.row_groups), columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise SampleError(f"{storage.full(piece.path)}: cannot be read: {error}") from error
    reasons: list[str] = []
    reason_N = np.full(table.num_rows, -1)
    good: Columns = {}
    for name, kind in columns.items():
        column = table.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        good[name], faults = _arrays(column, kind, latest_s)
        for fault, is_bad_N in faults.items():
            reason_N[is_bad_N & (reason_N < 0)] = len(reasons)
            reasons.append(f"{name} {fault}")
    is_good_N = reason_N < 0
    (bad_N,) = np.nonzero(~is_good_N)
    return Rows(
        {name: values_N[is_good_N] for name, values_N in good.items()},
        piece.first_row + bad_N.astype(np.int64),
        [reasons[code] for code in reason_N[bad_N]],
    )


Faults = dict[str, npt.NDArray[np.bool_]]  # which rows have each fault


def _arrays(column: Any, kind: str, latest_s: int) -> tuple[npt.NDArray[Any], Faults]:
    """The values of a chunked Arrow column, anything where they are bad, and their faults."""
    null = {"is null": column.is_null().to_numpy()}
    if kind == "time":
        value_N, faults = _times(column, latest_s)
        return value_N, null | faults
    if kind == "image" and not pa.types.is_integer(column.type):
        text = column.fill_null("")
        return _keys(text), null | {"is empty": (pc.binary_length(text).to_numpy() == 0)}
    if kind in ("label", "seconds"):
        number_N = column.cast(pa.float64()).fill_null(0).to_numpy()
        if kind == "label":
            is_click_N = number_N == 1
            return is_click_N.astype(np.int64), null | {"is not 0 or 1": ~is_click_N & (number_N != 0)}
        return number_N, null | {"is not finite": ~np.isfinite(number_N), "is negative": number_N < 0}
    value_N = column.cast(pa.int64()).fill_null(UNKNOWN).to_numpy()
    return value_N, {} if kind == "profile" else null


def _times(column: Any, latest_s: int) -> tuple[npt.NDArray[np.int64], Faults]:
    """Microseconds since 1970; nanoseconds are cut off, a timestamp without a time zone is in UTC."""
    unit = column.type.unit if pa.types.is_timestamp(column.type) else "s"
    value_N = column.cast(pa.int64()).fill_null(0).to_numpy()
    is_early_N, is_late_N = value_N < 0, value_N > latest_s * PER_SECOND[unit]
    value_N = np.where(is_early_N | is_late_N, 0, value_N)
    time_N = value_N // 1_000 if unit == "ns" else value_N * (MICROSECONDS // PER_SECOND[unit])
    return time_N, {"is before 1970": is_early_N, "is in the future": is_late_N}


def _keys(column: Any) -> npt.NDArray[np.int64]:
    """Key of each uri; equal ones are hashed once."""
    encoded = column.combine_chunks().dictionary_encode()
    keys_U = keys_of_uris(encoded.dictionary.to_pylist())
    keys_N: npt.NDArray[np.int64] = keys_U[encoded.indices.to_numpy()]
    return keys_N
