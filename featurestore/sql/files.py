"""The rows of a query as a file: Parquet, CSV or Arrow, written batch by batch."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from featurestore.console.files import replaced_file
from featurestore.errors import FeatureStoreError, QueryError
from featurestore.storage.local import check_regular
from featurestore.text import refusal

ENDINGS = (".parquet", ".csv", ".arrow")


def write_rows(path: Path, reader: pa.RecordBatchReader, limit: int | None = None) -> int:
    """Write rows, all or the first `limit`, to a file of one of ENDINGS; return how many.

    The file appears when it is whole. Raises QueryError where CSV cannot hold a column, FeatureStoreError where the
    file cannot be written.
    """
    if path.suffix == ".csv":
        _check_flat(reader.schema)
    try:
        if path.exists():
            check_regular(path)
        with replaced_file(path) as part:
            return _write(part, path.suffix, reader, limit)
    except OSError as error:
        if isinstance(error, pa.ArrowException):  # of the query
            raise
        raise FeatureStoreError(f"cannot write {path}: {refusal(error)}") from error


def _write(path: Path, ending: str, reader: pa.RecordBatchReader, limit: int | None) -> int:
    count = 0
    with path.open("wb") as file, _writer(file, ending, reader.schema) as writer:
        for batch in reader:
            rows = batch if limit is None else batch.slice(0, limit - count)
            writer.write_batch(rows)
            count += len(rows)
            if count == limit:
                break
    return count


def _writer(file: Any, ending: str, schema: pa.Schema) -> Any:
    if ending == ".parquet":
        return pq.ParquetWriter(file, schema, write_page_checksum=True)
    return pyarrow.csv.CSVWriter(file, schema) if ending == ".csv" else pa.ipc.new_file(file, schema)


def _check_flat(schema: pa.Schema) -> None:
    for field in schema:
        if pa.types.is_nested(field.type) or "binary" in str(field.type):
            raise QueryError(
                f"column {field.name!r} is {field.type}, which CSV cannot hold: select parts of it, as feature[1] or"
                " hex(content_digest), or write .parquet"
            )
