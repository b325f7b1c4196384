"""A query over the tables of a store: checked, narrowed to the columns that it needs, and streamed."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pyarrow as pa

from featurestore.errors import FeatureStoreError, QueryError
from featurestore.format.shard import LIVE_COLUMNS
from featurestore.lookup.partition import physical_memory_bytes
from featurestore.snapshot import Snapshot
from featurestore.sql.tables import IMAGES, ScannedTable, images_table, tables_of
from featurestore.store import FeatureStore

_BATCH_ROWS = 4096
_MEMORY_SHARE = 0.5  # of the machine's; what needs more goes to the disk


@contextmanager
def sql_reader(store: FeatureStore, snapshot: Snapshot, query: str) -> Iterator[pa.RecordBatchReader]:
    """Run one SELECT over images, quarantine, snapshots and shards; its rows come as a stream inside the block.

    Images are the live rows of the snapshot, read as the query scans them, and no column that it does not need. Raises
    QueryError for what is no such query, FeatureStoreError where DuckDB is not installed, CorruptFileError.
    """
    duckdb = _duckdb()
    tables = tables_of(store, snapshot)
    with (
        _translated(duckdb, tables),
        tempfile.TemporaryDirectory(prefix="sql-") as folder,
        duckdb.connect(config=_settings(folder)) as connection,
    ):
        _check_select(duckdb, connection, query)
        for name, table in tables.items():
            connection.register(name, table)
        try:
            connection.sql(query)  # finds what is wrong with it; nothing is read yet
        except duckdb.CatalogException:
            _check_tables(connection, query, tables)
            raise
        needed = _needed_columns(connection, query)
        if needed:
            tables[IMAGES] = images_table(snapshot, needed)
            connection.register(IMAGES, tables[IMAGES])
        reader = connection.sql(query).to_arrow_reader(_BATCH_ROWS)
        yield pa.RecordBatchReader.from_batches(reader.schema, _batches(reader))


def _batches(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """Give the rows of a query. What ends it may come as an OSError, which would be taken for one of a file."""
    try:
        yield from reader
    except OSError as error:
        raise pa.ArrowInvalid(str(error)) from error


def _settings(folder: str) -> dict[str, Any]:
    return {
        "enable_external_access": False,  # a query reads the store, and no other file
        "python_enable_replacements": False,  # nor what is a variable here
        "memory_limit": f"{int(_MEMORY_SHARE * physical_memory_bytes())}B",
        "temp_directory": folder,
    }


def _duckdb() -> ModuleType:
    try:
        import duckdb
    except ImportError as error:
        raise FeatureStoreError("SQL needs DuckDB, which is not installed: pip install duckdb") from error
    return duckdb


@contextmanager
def _translated(duckdb: ModuleType, tables: dict[str, ScannedTable]) -> Iterator[None]:
    """Raise what ended a scan as it was, and DuckDB's errors as ours: they may come while rows are read."""
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        for table in tables.values():
            if table.error is not None:
                raise table.error from error
        if isinstance(error, OSError) and not isinstance(error, pa.ArrowException):
            raise  # of the file that the rows go to
        # DuckDB puts a caret below the place in the query that it means.
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
        raise QueryError("; ".join(lines)) from error


def _check_select(duckdb: ModuleType, connection: Any, query: str) -> None:
    statements = connection.extract_statements(query)
    kinds = [str(statement.type).rpartition(".")[2] for statement in statements]
    if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
        raise QueryError(f"one SELECT is asked for, not {' and '.join(kinds) or 'nothing'}")


def _check_tables(connection: Any, query: str, tables: Mapping[str, ScannedTable]) -> None:
    """Raise QueryError where the query names a table that is not there: DuckDB would propose one of its own."""
    unknown = sorted(name for name in connection.get_table_names(query) if name.lower() not in tables)
    if unknown:
        raise QueryError(f"there is no table {unknown[0]}; the tables are {', '.join(tables)}")


def _needed_columns(connection: Any, query: str) -> list[str]:
    """Return the columns of images that any scan of the query's plan reads; none where nothing is scanned.

    A scan of another table counts too where a column has the same name, which is a column too many and no mistake.
    """
    (plan,) = json.loads(connection.sql(f"EXPLAIN (FORMAT json) {query}").fetchall()[0][1])
    read = set(_projections(plan))
    return [name for name in LIVE_COLUMNS if name in read]


def _projections(node: dict[str, Any]) -> Iterator[str]:
    """Yield the columns that the scans of a plan read."""
    if "SCAN" in node["name"]:
        found = node["extra_info"].get("Projections", [])
        yield from [found] if isinstance(found, str) else found
    for child in node["children"]:
        yield from _projections(child)
