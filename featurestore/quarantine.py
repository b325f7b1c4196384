"""Images that could not be read or decoded: kept as rows, never dropped silently."""

import io
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.errors import CorruptFileError
from featurestore.storage import Storage

QUARANTINE = "quarantine"
_SCHEMA = pa.schema(
    {"key": pa.int64(), "uri": pa.string(), "reason": pa.string(), "time_s": pa.float64()}  # type: ignore[arg-type]
)


@dataclass(frozen=True)
class QuarantineRow:
    """One image without a feature, and why."""

    key: int
    uri: str
    reason: str
    time_s: float  # seconds since 1970


def add(storage: Storage, rows: Sequence[QuarantineRow]) -> None:
    """Keep `rows` in a new file; without rows nothing is written."""
    if not rows:
        return
    sink = io.BytesIO()
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=_SCHEMA)
    pq.write_table(table, sink, compression="lz4", write_page_checksum=True)
    storage.write_bytes(f"{QUARANTINE}/{uuid.uuid4().hex}.parquet", sink.getvalue())


def read(storage: Storage) -> list[QuarantineRow]:
    """The newest row of each key ever quarantined, by time. Raises CorruptFileError."""
    newest: dict[int, QuarantineRow] = {}
    for name in storage.list(QUARANTINE):
        path = f"{QUARANTINE}/{name}"
        try:
            table = pq.read_table(pa.BufferReader(storage.read_bytes(path)), page_checksum_verification=True)
            rows = [QuarantineRow(**values) for values in table.to_pylist()]
        except (pa.ArrowException, OSError, TypeError) as error:
            raise CorruptFileError(f"{storage.full(path)} is damaged: {error}") from error
        for row in rows:
            if row.key not in newest or newest[row.key].time_s <= row.time_s:
                newest[row.key] = row
    return sorted(newest.values(), key=lambda row: (row.time_s, row.key))
