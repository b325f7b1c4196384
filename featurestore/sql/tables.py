"""The tables of a store for SQL, each read when a query scans it: images, quarantine, snapshots, shards."""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from featurestore.errors import FeatureStoreError
from featurestore.format.datafile import FEATURE
from featurestore.format.shard import LIVE_COLUMNS, live_schema
from featurestore.snapshot import Snapshot
from featurestore.store import FeatureStore
from featurestore.upkeep import history

IMAGES = "images"
_TIME: Any = pa.timestamp("us")  # of UTC; DuckDB has zones in an extension alone
_QUARANTINE = pa.schema([("key", pa.int64()), ("uri", pa.string()), ("reason", pa.string()), ("since", _TIME)])
_SNAPSHOTS = pa.schema(
    [
        ("version", pa.int64()),
        ("committed", _TIME),
        ("operation", pa.string()),
        *((name, pa.int64()) for name in ("files", "rows", "bytes", "quarantined")),
        ("writer", pa.string()),
        ("pins", pa.list_(pa.string())),
        ("channels", pa.list_(pa.string())),
    ]
)
_SHARDS = pa.schema([(name, pa.int64()) for name in ("shard", "files", "rows", "tombstones", "bytes")])


class ScannedTable:
    """A table that is read anew, batch by batch, whenever a query scans it (Arrow's PyCapsule interface)."""

    def __init__(self, schema: pa.Schema, batches: Callable[[], Iterator[pa.RecordBatch]]) -> None:
        self.schema = schema
        self.error: FeatureStoreError | None = None  # what ended a scan: DuckDB keeps no more than its text
        self._batches = batches

    def __arrow_c_schema__(self) -> Any:
        """Return the columns."""
        return self.schema.__arrow_c_schema__()

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        """Begin a scan."""
        reader: Any = pa.RecordBatchReader.from_batches(self.schema, self._noted())
        return reader.__arrow_c_stream__(requested_schema)

    def _noted(self) -> Iterator[pa.RecordBatch]:
        try:
            yield from self._batches()
        except FeatureStoreError as error:
            self.error = error
            raise


def tables_of(store: FeatureStore, snapshot: Snapshot) -> dict[str, ScannedTable]:
    """Return the tables by name; of images all columns."""
    return {
        IMAGES: images_table(snapshot),
        "quarantine": _of_rows(_QUARANTINE, lambda: map(_quarantine_row, store.quarantine_rows())),
        "snapshots": _of_rows(_SNAPSHOTS, lambda: map(_snapshot_row, history.log(store))),
        "shards": _of_rows(_SHARDS, lambda: _shard_rows(snapshot)),
    }


def images_table(snapshot: Snapshot, needed: Sequence[str] = LIVE_COLUMNS) -> ScannedTable:
    """Return the live rows with all columns, as a query may name one without reading it; only those `needed` are read.

    The others are blank, in memory that is never touched.
    """
    schema = live_schema(snapshot.info)

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in snapshot.arrow_batches(needed):
            arrays = [
                batch[name] if name in needed else _blank(len(batch), schema.field(name)) for name in schema.names
            ]
            yield pa.record_batch(arrays, schema=schema)

    return ScannedTable(schema, batches)


def _blank(count: int, field: "pa.Field[Any]") -> Any:
    if field.name != FEATURE:
        return pa.nulls(count, field.type)
    dim = field.type.list_size
    return pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(count * dim, np.float32)), dim)


def _of_rows(schema: pa.Schema, rows: Callable[[], Iterator[dict[str, Any]]]) -> ScannedTable:
    return ScannedTable(schema, lambda: iter(pa.Table.from_pylist(list(rows()), schema).to_batches()))


def _quarantine_row(row: Any) -> dict[str, Any]:
    return {"key": row.key, "uri": row.uri, "reason": row.reason, "since": _time(row.time_s)}


def _snapshot_row(entry: history.LogEntry) -> dict[str, Any]:
    manifest, names = entry.manifest, {"pins": list(entry.pins), "channels": list(entry.channels)}
    if manifest is None:
        return {"version": entry.version, "operation": "damaged: run verify", **names}
    return {
        "version": entry.version,
        "committed": _time(manifest.time_s),
        "operation": manifest.operation,
        "files": manifest.num_files,
        "rows": manifest.file_rows,
        "bytes": manifest.file_bytes,
        "quarantined": manifest.num_quarantined,
        "writer": manifest.writer,
        **names,
    }


def _shard_rows(snapshot: Snapshot) -> Iterator[dict[str, Any]]:
    for shard in range(snapshot.info.num_shards):
        files = snapshot.manifest.files(shard)
        yield {
            "shard": shard,
            "files": len(files),
            "rows": sum(entry.num_live for entry in files),
            "tombstones": sum(entry.num_deleted for entry in files),
            "bytes": sum(entry.bytes for entry in files),
        }


def _time(time_s: float) -> datetime:
    return datetime.fromtimestamp(time_s, UTC).replace(tzinfo=None)
