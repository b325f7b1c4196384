"""Rows of impression and behaviour logs as plain arrays, good ones and bad ones.

Letters of shapes: N rows of a piece of a log.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurestore.keys import NO_IMAGE, keys_of_bytes
from featurestore.storage.storage import Storage
from pipeline.errors import SampleError
from pipeline.samples.mapping import TableLayout
from pipeline.samples.pieces import ANY, MICROSECONDS, PER_SECOND, LogPiece, open_parquet
from pipeline.samples.texts import parse_ids, parse_labels, parse_numbers, parse_times, read_csv

Columns = dict[str, npt.NDArray[Any]]

UNKNOWN = -1  # a user column without a value
NAMES = pa.schema({"key": pa.int64(), "uri": pa.string()})  # type: ignore[arg-type]
_SHOWN = 60  # characters of a bad value


@dataclass(frozen=True)
class LogRows:
    """A piece as arrays: its good rows, and number and reason of the others; a bad value by reason, as an example."""

    num_rows: int
    good: Columns  # timestamp in microseconds, image as key, all int64 but dwell_s and dense columns
    bad_row: npt.NDArray[np.int64]  # in the file
    bad_reason: list[str]
    examples: dict[str, str]
    names: pa.Table  # NAMES of the images of all rows


def read_piece(piece: LogPiece, latest_s: int) -> LogRows:
    """Read and check a piece.

    Rows later than `latest_s` (seconds since 1970) are bad, as one such row would become the last day of the log. A bad
    row has the first reason in the order of the columns."""
    layout, storage = piece.layout, Storage(piece.url)
    torn: dict[int, str] = {}
    doubtful: dict[int, str] = {}
    names = [layout.names[name] for name in layout.kinds]
    if piece.is_csv:
        read = read_csv(storage, piece.path, names, layout.style)
        table, torn, doubtful = read.table, read.torn, read.doubtful
    else:
        with open_parquet(storage, piece.path, encoded=[layout.names["image"]]) as file:
            try:
                table = file.read_row_groups(list(piece.row_groups), columns=names, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise SampleError(f"{storage.full(piece.path)}: cannot be read: {error}") from error
    row_N = np.arange(table.num_rows + len(torn))  # in the file
    if torn:
        row_N = np.delete(row_N, list(torn))
    if piece.wanted is not None:
        kept_N = piece.wanted.of(*(_column(table, name, layout, latest_s)[0] for name in ("timestamp", "user")))
        table, row_N = table.filter(pa.array(kept_N)), row_N[kept_N]
    reasons = sorted(set(doubtful.values()))
    reason_N = np.full(table.num_rows, -1)
    for row, reason in doubtful.items():
        reason_N[row_N == row] = reasons.index(reason)
    good: Columns = {}
    examples: dict[str, str] = {}
    image_names = NAMES.empty_table()
    for name, kind in layout.kinds.items():
        if kind == "image":
            good[name], image_names = _images(table.column(layout.names[name]))
            continue
        good[name], faults = _column(table, name, layout, latest_s)
        for fault, is_bad_N in faults.items():
            (new,) = np.nonzero(is_bad_N & (reason_N < 0))
            reason_N[new] = len(reasons)
            reasons.append(f"{name} {fault}")
            if len(new) and fault != "is null":
                examples[reasons[-1]] = repr(table.column(layout.names[name])[new[0]].as_py())[:_SHOWN]
    good |= {name: _constant(value, table.num_rows) for name, value in layout.constants.items()}
    is_good_N = reason_N < 0
    (bad_N,) = np.nonzero(~is_good_N)
    bad = sorted([*zip(row_N[bad_N].tolist(), [reasons[code] for code in reason_N[bad_N]], strict=True), *torn.items()])
    return LogRows(
        table.num_rows + len(torn),
        {name: values_N[is_good_N] for name, values_N in good.items()},
        piece.first_row + np.array([row for row, _ in bad], np.int64),
        [reason for _, reason in bad],
        examples,
        image_names,
    )


def users_of(piece: LogPiece, early_us: int, latest_s: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Read only the users of a piece; return the distinct ones, sorted, and those who have rows before `early_us`."""
    kinds = {name: piece.layout.kinds[name] for name in ("timestamp", "user")}
    good = read_piece(replace(piece, layout=replace(piece.layout, kinds=kinds)), latest_s).good
    return np.unique(good["user"]), np.unique(good["user"][good["timestamp"] < early_us])


def _column(table: pa.Table, name: str, layout: TableLayout, latest_s: int) -> tuple[npt.NDArray[Any], "Faults"]:
    """Read one of our columns of a table as the file has them."""
    column = table.column(layout.names[name])
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return _arrays(column, layout.kinds[name], latest_s, layout)


def _constant(value: float, count: int) -> npt.NDArray[Any]:
    return np.full(count, value, np.int64 if isinstance(value, int) else np.float64)


Faults = dict[str, npt.NDArray[np.bool_]]  # which rows have each fault


def _arrays(column: Any, kind: str, latest_s: int, layout: TableLayout) -> tuple[npt.NDArray[Any], Faults]:
    """Read the values of a chunked Arrow column, anything where they are bad, and their faults."""
    if kind in ANY:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            return _text_arrays(column, kind, latest_s, layout)
        kind = ANY[kind]
    null = {"is null": column.is_null().to_numpy()}
    if kind == "time" and layout.time_format is not None and pa.types.is_integer(column.type):
        return _text_arrays(column.cast(pa.string()), "any_time", latest_s, layout)
    if kind == "time":
        value_N, faults = _times_us(column, latest_s, layout.unit)
        return value_N, null | faults
    if kind in ("label", "seconds", "dense"):
        value_N, faults = _numbers(column.cast(pa.float64()).fill_null(0).to_numpy(), kind)
        return value_N, null | faults
    value_N = column.cast(pa.int64()).fill_null(UNKNOWN).to_numpy()
    return value_N, {} if kind == "profile" else null


def _images(column: Any) -> tuple[npt.NDArray[np.int64], pa.Table]:
    """Read the key of each image, NO_IMAGE where it is null or has no name, and the names that rows have, each once."""
    is_encoded = pa.types.is_dictionary(column.type)
    if pa.types.is_integer(column.type.value_type if is_encoded else column.type):
        return column.cast(pa.int64()).fill_null(NO_IMAGE).to_numpy(), NAMES.empty_table()
    if not is_encoded:
        column = column.dictionary_encode()
    encoded = column.unify_dictionaries().combine_chunks()
    uris = encoded.dictionary
    place_N = encoded.indices.cast(pa.int64()).fill_null(len(uris)).to_numpy(zero_copy_only=False)
    is_used_M = np.zeros(len(uris) + 1, np.bool_)
    is_used_M[place_N] = True
    used_U = np.flatnonzero(is_used_M[:-1] & (pc.binary_length(uris).to_numpy(zero_copy_only=False) > 0))
    texts = uris.take(pa.array(used_U))
    keys_M = np.full(len(uris) + 1, NO_IMAGE)
    keys_M[used_U] = _keys_of(texts)
    return keys_M[place_N], pa.Table.from_arrays([pa.array(keys_M[used_U]), texts.cast(pa.string())], schema=NAMES)


def _text_arrays(column: Any, kind: str, latest_s: int, layout: TableLayout) -> tuple[npt.NDArray[Any], Faults]:
    """Read as `_arrays`, but text that has to be parsed first."""
    null_N = column.is_null().to_numpy()
    null = {"is null": null_N}
    if kind == "any_time":
        time_N, wrong_N = parse_times(column, layout.unit, layout.time_format)
        late_N = time_N > latest_s * MICROSECONDS
        return time_N, null | {"is no time": wrong_N, "is before 1970": time_N < 0, "is in the future": late_N}
    if kind == "any_id":
        return parse_ids(column)[0], null
    if kind == "extra_id":
        return np.where(null_N, UNKNOWN, parse_ids(column)[0]), {}
    number_N, wrong_N = parse_labels(column) if kind == "any_label" else parse_numbers(column, layout.style.decimal)
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


def _times_us(column: Any, latest_s: int, whole: str) -> tuple[npt.NDArray[np.int64], Faults]:
    """Convert times to microseconds since 1970; a whole number is one of unit `whole`.

    Nanoseconds are cut off, a timestamp without a time zone is in UTC."""
    unit = column.type.unit if pa.types.is_timestamp(column.type) else whole
    value_N = column.cast(pa.int64()).fill_null(0).to_numpy()
    is_early_N, is_late_N = value_N < 0, value_N > latest_s * PER_SECOND[unit]
    if is_early_N.any() or is_late_N.any():
        value_N = np.where(is_early_N | is_late_N, 0, value_N)
    time_N = value_N // 1_000 if unit == "ns" else value_N * (MICROSECONDS // PER_SECOND[unit])
    return time_N, {"is before 1970": is_early_N, "is in the future": is_late_N}


def _keys_of(uris: Any) -> npt.NDArray[np.int64]:
    """Hash each uri of an Arrow array, as it lies there."""
    return keys_of_bytes(
        uris.cast(pa.large_binary() if pa.types.is_large_string(uris.type) else pa.binary()).to_pylist()
    )
