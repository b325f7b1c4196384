"""CSV files of a person's own tables, and their columns of text as the numbers that logs need.

Rows that are torn or have swallowed others, and values that cannot be read, are faults of their rows.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import csv

from featurestore.errors import StorageError
from featurestore.keys import id_of_text
from featurestore.storage.storage import Storage
from featurestore.text.csvlines import CsvTextError, check_encoding, long_rows
from pipeline.errors import SampleError
from pipeline.samples.mapping import TimeUnit

SWALLOWED = "a quoted value has other rows in it; is a quote not closed?"
_WHOLE = re.compile(r"0|-?[1-9]\d{0,18}")
_LABELS = {"0": 0.0, "1": 1.0, "true": 1.0, "false": 0.0}
_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1}

Parsed = tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]  # values, and which could not be read; nulls are 0 and fine


def parse_ids(column: Any) -> Parsed:
    """Parse int64: a whole number is itself, other text its hash; so 7 is the same user in every file."""
    return _each(column, id_of_text, np.int64)


def parse_times(column: Any, unit: TimeUnit) -> Parsed:
    """Parse microseconds since 1970, int64, of ISO 8601 (UTC where it has no zone) or of a number of `unit`."""

    def parse(text: str) -> int:
        if _WHOLE.fullmatch(text):
            return int(text) * _PER_UNIT[unit]
        moment = datetime.fromisoformat(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return round(moment.timestamp() * 1_000_000)

    return _each(column, parse, np.int64)


def parse_numbers(column: Any) -> Parsed:
    """Parse numbers, as float64."""
    return _each(column, float, np.float64)


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


def csv_names(storage: Storage, path: str, delimiter: str) -> list[str]:
    """Read the names in the file's first line. Raises SampleError."""
    try:
        with storage.open_input(path) as file:
            check_encoding(file.read(4))
            file.seek(0)
            with csv.open_csv(file, parse_options=_parse(delimiter, {})) as reader:
                return list(reader.schema.names)
    except (pa.ArrowException, OSError, StorageError, CsvTextError, UnicodeDecodeError) as error:
        raise SampleError(f"{storage.full(path)}: not readable as CSV: {error}") from error


@dataclass(frozen=True)
class CsvRows:
    """Columns as text, empty ones null, and what is wrong with rows, by their numbers in the file (from 0)."""

    table: pa.Table
    torn: dict[int, str]  # too many or too few values; they are not in the table
    doubtful: dict[int, str]  # a quoted value that has the lines of other rows


def read_csv(storage: Storage, path: str, names: list[str], delimiter: str) -> CsvRows:
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
            long = long_rows(file, delimiter)
        with storage.open_input(path) as file:
            table = csv.read_csv(
                file,
                read_options=csv.ReadOptions(use_threads=False),  # rows have numbers only then
                parse_options=_parse(delimiter, torn),
                convert_options=convert,
            )
    except CsvTextError as error:
        raise SampleError(f"{storage.full(path)}, {error}") from error
    except (pa.ArrowException, OSError, StorageError, UnicodeDecodeError) as error:
        raise SampleError(f"{storage.full(path)}: cannot be read as CSV: {error}") from error
    return CsvRows(table, torn, {row: SWALLOWED for row, each in long.items() if each.swallowed and row not in torn})


def _parse(delimiter: str, torn: dict[int, str]) -> csv.ParseOptions:
    def keep(row: Any) -> Literal["skip"]:
        if row.number is not None:
            torn[row.number - 2] = f"{row.actual_columns} values instead of {row.expected_columns}"  # after the names
        return "skip"

    return csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=keep)
