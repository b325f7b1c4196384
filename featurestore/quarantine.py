"""Images that could not be read or decoded: kept as rows, never dropped silently.

The name of a file is the xxh3-128 of its bytes, so that a flipped bit is found.
"""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.datafile import digest_of
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
    data = sink.getvalue()
    storage.write_bytes(f"{QUARANTINE}/{digest_of(data, 'xxh3_128')}.parquet", data)


def read(storage: Storage) -> list[QuarantineRow]:
    """The newest row of each key ever quarantined, by time. Raises CorruptFileError."""
    newest: dict[int, QuarantineRow] = {}
    for name in storage.list(QUARANTINE):
        for row in read_file(storage, name):
            if row.key not in newest or newest[row.key].time_s <= row.time_s:
                newest[row.key] = row
    return sorted(newest.values(), key=lambda row: (row.time_s, row.key))


def read_file(storage: Storage, name: str) -> list[QuarantineRow]:
    """The rows of one file. Raises CorruptFileError, FileNotFoundError."""
    path = f"{QUARANTINE}/{name}"
    data = storage.read_bytes(path)
    if name != f"{digest_of(data, 'xxh3_128')}.parquet":
        raise CorruptFileError(f"{storage.full(path)} is damaged: its name is not the xxh3-128 of its content")
    try:
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        return [QuarantineRow(**values) for values in table.to_pylist()]
    except (pa.ArrowException, OSError, TypeError) as error:
        raise CorruptFileError(f"{storage.full(path)} is damaged: {error}") from error
