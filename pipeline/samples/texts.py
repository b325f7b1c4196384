"""CSV files of a person's own tables, and their columns of text as the numbers that logs need.

Rows that are torn or have swallowed others, and values that cannot be read, are faults of their rows.
"""

import codecs
import contextlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import csv

from featurestore.errors import StorageError
from featurestore.keys import id_of_text
from featurestore.storage.storage import Storage
from featurestore.text import (
    STYLE_BYTES,
    CsvStyle,
    CsvTextError,
    find_style,
    first_rows,
    long_rows,
    parse_decimal_comma,
)
from pipeline.errors import SampleError
from pipeline.samples.mapping import CsvSettings, TimeUnit

SWALLOWED = "a quoted value has other rows in it; is a quote not closed?"
_FIRST_ROWS = 1000
_WHOLE = re.compile(r"0|-?[1-9]\d{0,18}")
_LABELS = {"0": 0.0, "1": 1.0, "true": 1.0, "false": 0.0}
_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1}

Parsed = tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]  # values, and which could not be read; nulls are 0 and fine


def parse_ids(column: Any) -> Parsed:
    """Parse int64: a whole number is itself, other text its hash; so 7 is the same user in every file."""
    return _each(column, id_of_text, np.int64)


def parse_times(column: Any, unit: TimeUnit, time_format: str | None = None) -> Parsed:
    """Parse microseconds since 1970, int64: of `time_format`, of ISO 8601, or of a number of `unit`.

    In UTC where they have no zone."""

    def parse(text: str) -> int:
        moment = None
        if time_format is not None:
            with contextlib.suppress(ValueError):
                moment = datetime.strptime(text, time_format)
        if moment is None and _WHOLE.fullmatch(text):
            return int(text) * _PER_UNIT[unit]
        moment = moment or datetime.fromisoformat(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return round(moment.timestamp() * 1_000_000)

    return _each(column, parse, np.int64)


def unit_of(times: Sequence[str]) -> TimeUnit:
    """Find the unit of times that are whole numbers: from 1973 to 5138, their size is that of one unit alone."""
    numbers = sorted(abs(int(text)) for text in map(str.strip, times) if _WHOLE.fullmatch(text))
    middle = numbers[len(numbers) // 2] if numbers else 0
    return "us" if middle >= 10**14 else "ms" if middle >= 10**11 else "s"


def parse_numbers(column: Any, decimal: str = ".") -> Parsed:
    """Parse numbers, as float64."""
    return _each(column, parse_decimal_comma if decimal == "," else float, np.float64)


def parse_labels(column: Any) -> Parsed:
    """Parse labels, as float64: 0 or 1 of true and false too, else the number that is written."""
    return _each(column, lambda text: _LABELS[text.lower()] if text.lower() in _LABELS else float(text), np.float64)


def _each(column: Any, parse: Callable[[str], float], dtype: npt.DTypeLike) -> Parsed:
    """Parse each different text; a ValueError or a number beyond the dtype means that it cannot be read."""
    encoded = column.combine_chunks().dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    value_U, wrong_U = np.zeros(len(texts) + 1, dtype), np.zeros(len(texts) + 1, np.bool_)
    for place, text in enumerate(texts):
        try:
            value_U[place] = parse(text.strip())
        except (ValueError, OverflowError):
            wrong_U[place] = True
    place_N = encoded.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False)
    return value_U[place_N], wrong_U[place_N]


def csv_beginning(storage: Storage, path: str, given: CsvSettings) -> tuple[CsvStyle, list[list[str]]]:
    """Find how a file is written, and read its first rows, that of the names first. Raises SampleError."""
    try:
        with storage.open_input(path) as file:
            beginning = file.read(STYLE_BYTES)
        style = find_style(beginning, **given.model_dump())
        return style, first_rows(beginning, style, _FIRST_ROWS)
    except (OSError, StorageError, CsvTextError) as error:
        raise SampleError(f"{storage.full(path)}: not readable as CSV: {error}") from error


def csv_names(storage: Storage, path: str, style: CsvStyle) -> list[str]:
    """Read the names in the file's first line. Raises SampleError."""
    rows = csv_beginning(storage, path, CsvSettings(**asdict(style)))[1]
    if not rows:
        raise SampleError(f"{storage.full(path)}: not readable as CSV: it is empty, without a line of names")
    return rows[0]


@dataclass(frozen=True)
class CsvRows:
    """Columns as text, empty ones null, and what is wrong with rows, by their numbers in the file (from 0)."""

    table: pa.Table
    torn: dict[int, str]  # too many or too few values; they are not in the table
    doubtful: dict[int, str]  # a quoted value that has the lines of other rows


def read_csv(storage: Storage, path: str, names: Sequence[str], style: CsvStyle) -> CsvRows:
    """Read the whole file, twice; its text is in memory meanwhile.

    Raises SampleError, also where a quote is not closed: then it is unknown which of the rows behind it are rows.
    """
    torn: dict[int, str] = {}
    convert = csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        include_columns=list(dict.fromkeys(names)),
        strings_can_be_null=True,
        null_values=[""],
    )
    try:
        with storage.open_input(path) as file:
            long = long_rows(file, style.delimiter)
        with storage.open_input(path) as file:
            table = csv.read_csv(
                file,
                read_options=csv.ReadOptions(use_threads=False, encoding=style.encoding),  # rows have numbers only then
                parse_options=_parse(style.delimiter, torn),
                convert_options=convert,
            )
    except CsvTextError as error:
        raise SampleError(f"{storage.full(path)}, {error}") from error
    except (pa.ArrowException, OSError, StorageError, UnicodeDecodeError) as error:
        raise SampleError(f"{storage.full(path)}{_wrong_bytes(storage, path, style) or f': {error}'}") from error
    return CsvRows(table, torn, {row: SWALLOWED for row, each in long.items() if each.swallowed and row not in torn})


def _wrong_bytes(storage: Storage, path: str, style: CsvStyle) -> str | None:
    """Say where the first bytes are that are not of the encoding; None where all are."""
    number = 0
    try:
        with storage.open_input(path) as file:
            for line in io.BufferedReader(file):  # type: ignore[type-var]
                number += 1
                codecs.decode(line, style.encoding)
    except UnicodeDecodeError as error:
        byte = error.object[error.start : error.start + 1]
        hint = "give the encoding in the mapping, as csv: {encoding: latin-1}"
        return f", line {number}: {byte!r} is not {style.encoding}; {hint}"
    except (OSError, StorageError):
        pass
    return None


def _parse(delimiter: str, torn: dict[int, str]) -> csv.ParseOptions:
    def keep(row: Any) -> Literal["skip"]:
        if row.number is not None:
            torn[row.number - 2] = f"{row.actual_columns} values instead of {row.expected_columns}"  # after the names
        return "skip"

    return csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=keep)
