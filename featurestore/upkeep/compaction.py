"""Compaction: merges the files of a shard into one with the same rows, so that reading is fast again.

Letters of shapes: M live rows of a shard, K rows of a block or of a file.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa

from featurestore.errors import CommitConflictError, CorruptFileError
from featurestore.format.datafile import DataFile, open_entry, row_group_rows, schema_of
from featurestore.format.shard import ShardReader, check_digest, take_rows, write_shard_file
from featurestore.keys import Int64Array
from featurestore.problems import Problem
from featurestore.spec import FileEntry, StoreInfo
from featurestore.storage.storage import Progress, in_threads
from featurestore.store import FeatureStore, Snapshot

MAX_DELTAS = 8
MAX_DELTA_SHARE = 0.25  # of a shard's bytes

Files = Sequence[FileEntry]


@dataclass(frozen=True)
class CompactReport:
    """Results of a compaction, or of its dry run."""

    version: int  # of its snapshot; of the newest where there was nothing to do
    shards: tuple[int, ...]  # made into one file each, or into none where no row lives
    lost: tuple[int, ...]  # another compaction or a restore replaced their files meanwhile
    num_files_before: int  # of these shards
    num_bytes_before: int
    num_files_after: int  # 0 in a dry run, as are the bytes: they are not known before
    num_bytes_after: int


def compact(
    store: FeatureStore,
    *,
    shards: Sequence[int] | None = None,
    force: bool = False,
    threads: int = 4,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CompactReport:
    """Make one base file of each shard that has more than 8 deltas, or more than a quarter of its bytes in them.

    Looks at `shards`, all by default; with `force` each is due that is not one file without tombstones. One commit, or
    none where nothing is due.

    The rows stay exactly the same, and so do concurrent changes of others; a shard that they compact or restore is lost
    for this one (`CompactReport.lost`). Reads those shards twice, the first time for their digests, and writes them
    once; each thread needs the memory of a few blocks and of the shard's keys, on an object store that of the file to
    write. Raises CommitConflictError where every shard was lost, CorruptFileError before anything of a damaged file is
    used.
    """
    snapshot = store.snapshot()
    looked_at = snapshot.manifest.shards if shards is None else shards
    due = {shard: snapshot.manifest.files(shard) for shard in sorted(looked_at)}
    due = {shard: files for shard, files in due.items() if _is_due(files, force)}
    if dry_run or not due:
        return _report(snapshot.version, due, {}, ())
    entries = in_threads(lambda shard: _merged_file(snapshot, shard), due, threads, progress)
    return _commit(store, due, {shard: entry for shard, entry in zip(due, entries, strict=True) if entry is not None})


def needs_compaction(files: Files) -> bool:
    """Return whether a shard of these files, oldest first, has too many deltas, or too much in them."""
    deltas = files[1:]
    total = sum(file.bytes for file in files)
    return len(deltas) > MAX_DELTAS or sum(file.bytes for file in deltas) > MAX_DELTA_SHARE * total


def _is_due(files: Files, force: bool) -> bool:
    is_plain = len(files) == 0 or (len(files) == 1 and files[0].num_deleted == 0)
    return not is_plain and (force or needs_compaction(files))


def _commit(store: FeatureStore, due: Mapping[int, Files], built: Mapping[int, FileEntry]) -> CompactReport:
    """Publish the merged files, except those of shards that another writer has replaced meanwhile."""
    lost: list[int] = []
    while True:
        left = {shard: files for shard, files in due.items() if shard not in lost}
        entries = {shard: entry for shard, entry in built.items() if shard in left}
        try:
            snapshot = store.commit(entries, "compact", replaces=left)
        except CommitConflictError:
            newest = store.snapshot().manifest
            changed = [shard for shard, files in left.items() if not _begins_with(newest.files(shard), files)]
            store.storage.delete_files(_paths(built[shard] for shard in changed if shard in built))
            lost += changed
            if not changed or len(changed) == len(left):
                raise
            continue
        return _report(snapshot.version, left, entries, tuple(lost))


def _begins_with(files: Files, first: Files) -> bool:
    return [file.path for file in files[: len(first)]] == [file.path for file in first]


def _report(
    version: int, due: Mapping[int, Files], built: Mapping[int, FileEntry], lost: tuple[int, ...]
) -> CompactReport:
    return CompactReport(
        version=version,
        shards=tuple(due),
        lost=lost,
        num_files_before=sum(len(files) for files in due.values()),
        num_bytes_before=sum(file.bytes for files in due.values() for file in files),
        num_files_after=len(built),
        num_bytes_after=sum(entry.bytes for entry in built.values()),
    )


def _paths(entries: Iterator[FileEntry]) -> list[str]:
    return [path for entry in entries for path in (entry.path, entry.statistics_path) if path is not None]


def _merged_file(snapshot: Snapshot, shard: int) -> FileEntry | None:
    """Write a file with the live rows of a shard, or return None without any."""
    blocks = merged_blocks(snapshot.shard_reader(shard))
    first = next(blocks, None)
    if first is None:
        return None
    return write_shard_file(snapshot.storage, snapshot.info, shard, chain([first], blocks), "base", snapshot.version)


def merged_blocks(reader: ShardReader) -> Iterator[pa.Table]:
    """Read the live rows of a shard in order, as many at a time as a row group holds.

    Reads each file twice from its beginning, the first time to check its digest; a few blocks are in memory, and the
    shard's keys. Raises CorruptFileError before the first row.
    """
    for entry in reader.entries:
        check_digest(reader.storage, entry.path, entry.bytes, "xxh3_128", entry.xxh3_128)
    index_M, step = reader.live_rows(), row_group_rows(reader.info)
    with ExitStack() as stack:
        opened = (open_entry(reader.storage, reader.info, entry, streaming=True) for entry in reader.entries)
        sources = [_RowSource(stack.enter_context(file), reader.info) for file in opened]
        starts = np.cumsum([0, *(entry.rows for entry in reader.entries)])
        for first in range(0, len(index_M), step):
            index_K = index_M[first : first + step]
            file_K = np.searchsorted(starts, index_K, side="right") - 1
            by_file_K = np.argsort(file_K, kind="stable")
            numbers = np.unique(file_K)
            tables = [sources[number].take(index_K[file_K == number] - starts[number]) for number in numbers]
            place_K = np.empty_like(by_file_K)
            place_K[by_file_K] = np.arange(len(by_file_K))
            yield take_rows(pa.concat_tables(tables), place_K)


class _RowSource:
    """The rows of one file, asked for in ascending order; a block of them is in memory."""

    def __init__(self, file: DataFile, info: StoreInfo) -> None:
        self._path = file.path
        self._blocks = file.blocks(schema_of(info).names)
        self._block = next(self._blocks)
        self._start = 0  # the block's first row
        self._next = 0

    def take(self, rows_K: Int64Array) -> pa.Table:
        """Return rows by their numbers, which continue where the last call ended."""
        if rows_K[0] < self._next or (rows_K[1:] <= rows_K[:-1]).any():
            raise CorruptFileError(Problem.NOT_IN_ORDER, self._path)
        self._next = int(rows_K[-1]) + 1
        pieces = []
        while len(rows_K):
            end = self._start + len(self._block)
            num_here = int(np.searchsorted(rows_K, end))
            if num_here:
                pieces.append(_rows_at(self._block, rows_K[:num_here] - self._start))
                rows_K = rows_K[num_here:]
            if len(rows_K):
                self._start, self._block = end, next(self._blocks)
        return pa.concat_tables(pieces)


def _rows_at(table: pa.Table, rows_K: Int64Array) -> pa.Table:
    """Take ascending rows; neighbours are not copied."""
    first, count = int(rows_K[0]), len(rows_K)
    return table.slice(first, count) if rows_K[-1] - first + 1 == count else table.take(rows_K)
