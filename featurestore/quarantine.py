"""Images that could not be read or decoded: kept as rows, never dropped silently.

The name of a file is the xxh3-128 of its bytes, so that a flipped bit is found.
"""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.errors import CorruptFileError
from featurestore.format.datafile import digest_of
from featurestore.storage.storage import Storage

QUARANTINE = "quarantine"
_READ_ATTEMPTS = 10
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


def add(storage: Storage, rows: Sequence[QuarantineRow]) -> str | None:
    """Keep `rows` in a new file; return its name. Without rows nothing is written."""
    if not rows:
        return None
    sink = io.BytesIO()
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=_SCHEMA)
    pq.write_table(table, sink, compression="lz4", write_page_checksum=True)
    data = sink.getvalue()
    name = f"{digest_of(data, 'xxh3_128')}.parquet"
    storage.write_bytes(f"{QUARANTINE}/{name}", data)
    return name


def read(storage: Storage) -> list[QuarantineRow]:
    """Read the newest row of each key in quarantine, by time. Raises CorruptFileError."""
    return _read(storage)[1]


def resolve(storage: Storage, rows: Sequence[QuarantineRow]) -> None:
    """Forget `rows`, and older ones of their keys; what is left becomes one file. Rows added meanwhile stay.

    Killed on the way, rows come back rather than get lost.
    """
    if not rows:
        return
    resolved = {row.key: row.time_s for row in rows}
    names, known = _read(storage)
    left = add(storage, [row for row in known if row.key not in resolved or row.time_s > resolved[row.key]])
    for name in names:
        if name != left:
            storage.delete(f"{QUARANTINE}/{name}")


def _read(storage: Storage) -> tuple[list[str], list[QuarantineRow]]:
    """List the files, and read the newest row of each key in them, by time.

    Does so again where another process resolves rows at the same time."""
    for attempt in range(_READ_ATTEMPTS):
        names = storage.list(QUARANTINE)
        newest: dict[int, QuarantineRow] = {}
        try:
            for row in (row for name in names for row in read_file(storage, name)):
                if row.key not in newest or newest[row.key].time_s <= row.time_s:
                    newest[row.key] = row
        except FileNotFoundError:
            if attempt == _READ_ATTEMPTS - 1:
                raise
            continue
        return names, sorted(newest.values(), key=lambda row: (row.time_s, row.key))
    raise AssertionError("the loop returns or raises")


def read_file(storage: Storage, name: str) -> list[QuarantineRow]:
    """Read the rows of one file. Raises CorruptFileError, FileNotFoundError."""
    path = f"{QUARANTINE}/{name}"
    data = storage.read_bytes(path)
    if name != f"{digest_of(data, 'xxh3_128')}.parquet":
        raise CorruptFileError(f"{storage.full(path)} is damaged: its name is not the xxh3-128 of its content")
    try:
        # Without threads: Arrow starts them late, and one that starts while the process ends aborts it.
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            table = file.read(use_threads=False)
        return [QuarantineRow(**values) for values in table.to_pylist()]
    except (pa.ArrowException, OSError, TypeError) as error:
        raise CorruptFileError(f"{storage.full(path)} is damaged: {error}") from error
