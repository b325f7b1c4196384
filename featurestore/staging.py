"""Staged files of a commit, and its quarantine.

A part is sorted as shards are, by splitmix64, so the rows of one shard are neighbours and a few row groups hold them.

The name of a file is the xxh3-128 of its bytes, so that a flipped bit is found.
"""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.errors import CorruptFileError, InvalidRowsError
from featurestore.format.datafile import KEY, DataFile, FeatureRows, digest_of, encode, numpy_column, table_of
from featurestore.format.shard import newest_rows, take_rows
from featurestore.keys import shard_of
from featurestore.problems import Problem
from featurestore.spec import StoreInfo, check_file_name
from featurestore.storage.storage import Storage, in_threads

STAGING = "staging"
_GROUP_BYTES = 1 << 20
_SUFFIX = ".parquet"
_READ_THREADS = 8  # waiting for answers of an object store, not computing


def sorted_table(rows: FeatureRows, info: StoreInfo) -> pa.Table:
    """Return checked rows as a table in the order of splitmix64; of one key's rows the last stays."""
    rows.validate(info)
    return take_rows(table_of(rows, info), newest_rows(rows.keys_N))


def stage_part(storage: Storage, info: StoreInfo, run_id: str, part: str, rows: FeatureRows) -> None:
    """Write a part, whole or not at all; the same part again replaces it."""
    data = encode(sorted_table(rows, info), info, _GROUP_BYTES)
    with storage.open_output(_part_path(run_id, part)) as file:
        file.write(memoryview(data))


def staged_parts(storage: Storage, run_id: str) -> list[str]:
    """List the names of the complete parts of a run, sorted."""
    names = storage.list(f"{STAGING}/{_checked(run_id)}")
    return [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]


def discard(storage: Storage, run_id: str) -> None:
    """Remove all parts of a run."""
    storage.delete(f"{STAGING}/{_checked(run_id)}")


def read_shards_of_parts(
    storage: Storage, info: StoreInfo, run_id: str, parts: Sequence[str], shards: range
) -> dict[int, pa.Table]:
    """Read the rows of some neighbouring shards in all `parts`, in their order, by shard.

    Shards without rows are absent. Each part is opened once, 8 of them at a time. In memory are all these rows, and of
    the parts being read the row groups around them: about 2 MB more than the rows each. Raises InvalidRowsError where a
    part is not there.
    """
    found: dict[int, list[pa.Table]] = {}
    paths = [_part_path(run_id, part) for part in parts]
    for table in in_threads(lambda path: _read_part(storage, info, path, shards), paths, _READ_THREADS):
        for shard, rows in cut(table, info).items():
            found.setdefault(shard, []).append(rows)
    return {shard: pa.concat_tables(found[shard]) for shard in sorted(found)}


def cut(table: pa.Table, info: StoreInfo) -> dict[int, pa.Table]:
    """Return the rows of each shard, of a table in the order of splitmix64; nothing is copied."""
    shard_N = shard_of(numpy_column(table, KEY), info.num_shards)  # ascending, as the hashes are
    shards, starts = np.unique(shard_N, return_index=True)
    ends = np.append(starts, len(shard_N))[1:]
    return {int(s): table.slice(start, end - start) for s, start, end in zip(shards, starts, ends, strict=True)}


def _read_part(storage: Storage, info: StoreInfo, path: str, shards: range) -> pa.Table:
    try:
        source = storage.open_input(path)
    except FileNotFoundError as error:
        raise InvalidRowsError(Problem.NEVER_STAGED, storage.full(path)) from error
    with source:
        file = DataFile(source, info, storage.full(path))
        shard_N = shard_of(numpy_column(file.read([KEY]), KEY), info.num_shards)
        start, end = (int(np.searchsorted(shard_N, s)) for s in (shards.start, shards.stop))
        starts = file.group_starts
        groups = [g for g in range(len(starts) - 1) if starts[g] < end and starts[g + 1] > start]
        first = starts[groups[0]] if groups else 0
        # A slice would keep whole groups in memory, and of a small share of the shards that is most of every part.
        return take_rows(file.read(groups=groups), np.arange(start - first, end - first))


def _part_path(run_id: str, part: str) -> str:
    return f"{STAGING}/{_checked(run_id)}/{_checked(part)}{_SUFFIX}"


def _checked(name: str) -> str:
    try:
        return check_file_name(name)
    except ValueError as error:
        raise InvalidRowsError(Problem.BAD_RUN_NAME, error) from error


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
    """Remove `rows`, and older rows of their keys; merge the rest into one file. Rows added meanwhile stay.

    Killed on the way, rows come back rather than get lost.
    """
    if not rows:
        return
    resolved = {row.key: row.time_s for row in rows}
    names, known = _read(storage)
    left = add(storage, [row for row in known if row.key not in resolved or row.time_s > resolved[row.key]])
    storage.delete_files(f"{QUARANTINE}/{name}" for name in names if name != left)


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
        raise CorruptFileError(Problem.NAME_IS_NOT_DIGEST, storage.full(path))
    try:
        # Without threads: Arrow starts them late, and one that starts while the process ends aborts it.
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            table = file.read(use_threads=False)
        return [QuarantineRow(**values) for values in table.to_pylist()]
    except (pa.ArrowException, OSError, TypeError) as error:
        raise CorruptFileError(Problem.DAMAGED, storage.full(path), error) from error
