"""CSV files of a person's own tables: their columns as text, and the rows that are torn."""

from typing import Any, Literal

import pyarrow as pa
from pyarrow import csv

from featurestore.errors import StorageError
from featurestore.storage import Storage
from pipeline.errors import SampleError


def csv_names(storage: Storage, path: str, delimiter: str) -> list[str]:
    """Names in the file's first line. Raises SampleError."""
    try:
        with storage.open_input(path) as file, csv.open_csv(file, parse_options=_parse(delimiter, {})) as reader:
            return list(reader.schema.names)
    except (pa.ArrowException, OSError, StorageError) as error:
        raise SampleError(f"{storage.full(path)}: not readable as CSV: {error}") from error


def read_csv(storage: Storage, path: str, names: list[str], delimiter: str) -> tuple[pa.Table, dict[int, str]]:
    """Columns as text, empty ones null, and the rows with too many or too few values, by number (from 0), with why.

    Reads the whole file, whose text is in memory meanwhile. Raises SampleError.
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
            table = csv.read_csv(
                file,
                read_options=csv.ReadOptions(use_threads=False),  # rows have numbers only then
                parse_options=_parse(delimiter, torn),
                convert_options=convert,
            )
    except (pa.ArrowException, OSError, StorageError) as error:
        raise SampleError(f"{storage.full(path)}: cannot be read as CSV: {error}") from error
    return table, torn


def _parse(delimiter: str, torn: dict[int, str]) -> csv.ParseOptions:
    def keep(row: Any) -> Literal["skip"]:
        if row.number is not None:
            torn[row.number - 2] = f"{row.actual_columns} values instead of {row.expected_columns}"  # after the names
        return "skip"

    return csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=keep)
