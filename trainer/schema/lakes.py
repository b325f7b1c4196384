"""Tables of Delta, Iceberg and Lance: found by their files, their rows copied as Parquet by Arrow batches.

Their files also hold rows that were removed, so the package of each kind reads them: deltalake, pyiceberg, pylance.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.errors import NotAFolderError, StorageError
from featurestore.parsing import parse_json
from featurestore.storage.storage import Storage
from trainer.errors import DataError
from trainer.problems import Problem
from trainer.schema.profile import SUFFIXES

Kind = Literal["Delta", "Iceberg", "Lance"]
PACKAGES: dict[Kind, tuple[str, str]] = {
    "Delta": ("deltalake", "deltalake"),
    "Iceberg": ("pyiceberg.table", "pyiceberg"),
    "Lance": ("lance", "pylance"),
}
"""The module that reads each kind, and the package that has it."""
_METADATA = ".metadata.json"
FILE = "rows.parquet"
SUMMARY_FILE, TABLES = "summary.json", "tables"
"""File of samples, and its entry on the tables that they were made of."""


def kind_of(storage: Storage, place: str = "") -> Kind | None:
    """Return the kind of table at a place of a storage; None for other files."""
    try:
        names = storage.list(place)
    except NotAFolderError:
        return None
    if "_delta_log" in names:
        return "Delta"
    if "_versions" in names:
        return "Lance"
    return "Iceberg" if "metadata" in names and _metadata_files(storage, place) else None


def _metadata_files(storage: Storage, place: str) -> list[str]:
    folder = f"{place}/metadata" if place else "metadata"
    return [f"{folder}/{name}" for name in storage.list(folder) if name.endswith(_METADATA)]


def copy_rows(storage: Storage, place: str, kind: Kind, folder: Path, most_rows: int | None = None) -> str:
    """Write the rows of a table's newest version into `folder`, or more than `most_rows`; return the version.

    Raises DataError where its package is not installed, or cannot read it.
    """
    address = storage.full(place)
    module, package = PACKAGES[kind]
    try:
        reader = import_module(module)
    except ImportError as error:
        raise DataError(Problem.NO_TABLE_PACKAGE, address, kind, package) from error
    folder.mkdir(parents=True, exist_ok=True)
    try:
        version, rows = _READERS[kind](reader, storage, place)
        with pq.ParquetWriter(folder / FILE, rows.schema, compression="zstd") as writer:
            written = 0
            for batch in rows:
                writer.write_batch(batch)
                written += batch.num_rows
                if most_rows is not None and written > most_rows:
                    break
    except Exception as error:  # theirs have no common class
        raise DataError(Problem.REFUSED, "read", f"{address}, a table of {kind}", str(error).strip()) from error
    return version


def below(storage: Storage) -> dict[str, Kind]:
    """Find the kinds of the tables directly below a place, by name; the place itself has the name ""."""
    if kind := kind_of(storage):
        return {"": kind}
    return {name: kind for name in storage.list() if (kind := kind_of(storage, name))}


def copy_beside(storage: Storage, kinds: Mapping[str, Kind], folder: Path, most_rows: int) -> None:
    """Copy the first rows of some tables of a place into `folder`, and the other files there as they are."""
    for name, kind in kinds.items():
        copy_rows(storage, name, kind, folder / name, most_rows)
    for entry in storage.entries():
        if entry.path.partition("/")[0] not in kinds and entry.path.endswith(SUFFIXES):
            target = folder / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(storage.read_bytes(entry.path))


def versions_of(samples: Storage) -> dict[str, str]:
    """Read which versions of tables samples were made of, by the tables' places; none where they were plain files."""
    try:
        found = parse_json(samples.read_bytes(SUMMARY_FILE)).get(TABLES, {})
    except (OSError, ValueError, AttributeError, StorageError):  # samples of other programs have no summary, or another
        return {}
    return found if isinstance(found, dict) else {}


def _delta(module: Any, storage: Storage, place: str) -> tuple[str, pa.RecordBatchReader]:
    """Return the version of a table, and its rows, as the functions of the other kinds do."""
    table = module.DeltaTable(storage.full(place))
    return f"version {table.version()}", table.to_pyarrow_dataset().scanner().to_reader()


def _iceberg(module: Any, storage: Storage, place: str) -> tuple[str, pa.RecordBatchReader]:
    """Read the snapshot of the newest metadata, as a catalog that writes them one after the other does."""
    newest = max(_metadata_files(storage, place), key=lambda path: (storage.entry(path).mtime_s, path))
    table = module.StaticTable.from_metadata(storage.full(newest))
    snapshot = getattr(table.current_snapshot(), "snapshot_id", None)
    return f"snapshot {snapshot}", table.scan().to_arrow_batch_reader()


def _lance(module: Any, storage: Storage, place: str) -> tuple[str, pa.RecordBatchReader]:
    table = module.dataset(storage.full(place))
    return f"version {table.version}", table.scanner().to_reader()


_READERS = {"Delta": _delta, "Iceberg": _iceberg, "Lance": _lance}
