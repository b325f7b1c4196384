"""Is every file of a store what was written? Names each one that is not."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from featurestore import log
from featurestore.datafile import DELETED, FEATURE, KEY, URI, matrix_of, numpy_column, open_entry, text_column
from featurestore.errors import CorruptFileError, FeatureStoreError, KeyCollisionError
from featurestore.keys import shard_of_hash, splitmix64
from featurestore.rows import check_collisions, finite_rows
from featurestore.shard import read_moments
from featurestore.snapshot import Snapshot
from featurestore.spec import FileEntry
from featurestore.store import FeatureStore

_THREADS = 4
Progress = Callable[[int, int], None]  # shards checked, shards in all


@dataclass
class VerifyReport:
    """What was looked at, and one line for each thing that is wrong."""

    num_manifests: int = 0
    num_files: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def verify(store: FeatureStore, version: int | None = None, progress: Progress | None = None) -> VerifyReport:
    """Check all manifests, and every file of one snapshot (the newest by default): size, sha256, page checksums,
    columns, row counts, order of keys, shard, duplicates, values. Reads all of it. Raises SnapshotNotFoundError."""
    report = VerifyReport()
    report.problems += _manifest_problems(store, report)
    try:
        snapshot = store.snapshot(version)
    except CorruptFileError as error:
        report.problems = sorted({*report.problems, str(error)})
        return report
    shards = sorted(snapshot.manifest.shards)
    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(_shard_problems, snapshot, shard) for shard in shards]
        for done, _ in enumerate(as_completed(futures), start=1):
            if progress is not None:
                progress(done, len(shards))
    for future in futures:
        report.problems += future.result()
    report.num_files = snapshot.manifest.num_files
    report.num_bytes = snapshot.manifest.file_bytes
    return report


def _manifest_problems(store: FeatureStore, report: VerifyReport) -> list[str]:
    problems = []
    known = log.versions(store.storage)
    report.num_manifests = len(known)
    parent: str | None = None
    for place, version in enumerate(known):
        path = store.storage.full(log.manifest_path(version))
        if place and version != known[place - 1] + 1:
            problems.append(f"{path}: the versions between {known[place - 1]} and {version} are gone")
            parent = None
        try:
            manifest = log.read_manifest(store.storage, version)
        except FeatureStoreError as error:
            problems.append(str(error))
            parent = None
            continue
        if parent is not None and manifest.parent != parent:
            problems.append(f"{path} does not follow the manifest before it")
        parent = manifest.commit_id
    return problems


def _shard_problems(snapshot: Snapshot, shard: int) -> list[str]:
    problems: list[str] = []
    tables = []
    for entry in snapshot.manifest.files(shard):
        try:
            tables.append(_checked_file(snapshot, shard, entry, problems))
            read_moments(snapshot.storage, entry)
        except FeatureStoreError as error:
            problems.append(str(error))
    if tables:
        live = [table.filter(pa.array(~numpy_column(table, DELETED))) for table in tables]
        table = pa.concat_tables(live)
        try:
            check_collisions(numpy_column(table, KEY), text_column(table, URI))
        except KeyCollisionError as error:
            problems.append(f"shard {shard} of {snapshot.storage.url}: {error}")
    return problems


def _checked_file(snapshot: Snapshot, shard: int, entry: FileEntry, problems: list[str]) -> pa.Table:
    """Key, uri and deleted of the file. Memory stays at one file and one row group."""
    path = snapshot.storage.full(entry.path)
    info = snapshot.info
    small = []
    with open_entry(snapshot.storage, info, entry, "sha256") as file:
        for block in file.blocks([KEY, URI, DELETED, FEATURE]):
            if not finite_rows(matrix_of(block, info), info.dtype).all():
                problems.append(f"{path} holds features that are not finite")
            small.append(block.select([KEY, URI, DELETED]))
        table = pa.concat_tables(small) if small else file.read([KEY, URI, DELETED])
    hash_N = splitmix64(numpy_column(table, KEY))
    if (hash_N[1:] == hash_N[:-1]).any():
        problems.append(f"{path} holds a key twice")
    elif (hash_N[1:] < hash_N[:-1]).any():
        problems.append(f"{path} is not in the order of splitmix64")
    strays = int((shard_of_hash(hash_N, info.num_shards) != shard).sum())
    if strays:
        problems.append(f"{path} holds {strays} keys that do not belong to shard {shard}")
    if int(np.count_nonzero(numpy_column(table, DELETED))) != entry.num_deleted:
        problems.append(f"{path} has another number of tombstones than the manifest says")
    return table
