"""CSV files of a person's own tables: their columns as text, and the rows that are torn or have swallowed others."""

from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from pyarrow import csv

from featurestore.errors import StorageError
from featurestore.storage.storage import Storage
from featurestore.text.csvlines import CsvTextError, check_encoding, long_rows
from pipeline.errors import SampleError

SWALLOWED = "a quoted value has other rows in it; is a quote not closed?"


def csv_names(storage: Storage, path: str, delimiter: str) -> list[str]:
    """Names in the file's first line. Raises SampleError."""
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
    """Reads the whole file, twice; its text is in memory meanwhile.

    Raises SampleError, also where a quote is not closed: nobody can tell then which of the rows behind it are rows.
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
