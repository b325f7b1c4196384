"""Verification of every file of a store against its log.

In `damaged/` are manifests that a repair took out of the log, and notes of data files that only older snapshots still
name. Such a file can only come back from a backup: it is reported without alarm until its snapshots expire.

Letters of shapes: N rows of a file, M live rows of several files.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa

from featurestore import log, staging
from featurestore.errors import CorruptFileError, SnapshotNotFoundError, StoreNotFoundError
from featurestore.format import datafile
from featurestore.format.codec import BASES, basis_of
from featurestore.format.datafile import finite_rows
from featurestore.format.shard import read_moments
from featurestore.keys import BoolArray, Int64Array, keys_of_uris, shard_of_hash, splitmix64
from featurestore.published.versions import is_channel_name, last_move
from featurestore.spec import FileEntry, Manifest, Sealed, StoreInfo, StorePath, read_sealed
from featurestore.storage.storage import Progress, Storage, in_threads
from featurestore.store import INFO_PATH, FeatureStore
from featurestore.upkeep import DAMAGED, DATA, history

_MEMORY_BYTES = 256 << 20
_THREADS = 4
NOTE_PREFIX = "note-"
ProblemKind = (
    Literal["info", "folder", "basis", "manifest", "order", "expired"]
    | Literal["pin", "channel", "quarantine", "data", "statistics", "collision"]
)
_FOLDERS = (log.LOG, log.EXPIRED, log.PINS, log.CHANNELS, DATA, BASES, staging.QUARANTINE, staging.STAGING, DAMAGED)
FileId = tuple[str, str]  # path and sha256
_SmallFile = tuple[ProblemKind, str, Callable[[], object], str]  # kind, path, its check, and the way out


@dataclass(frozen=True)
class Problem:
    """One problem: `str` gives one line with the file, the problem, and the way out."""

    kind: ProblemKind
    path: str  # relative to the store
    message: str  # names the file by its full address
    way_out: str
    versions: tuple[int, ...] = ()  # snapshots that hold a data file, ascending

    def __str__(self) -> str:
        return f"{self.message}. {self.way_out}"


@dataclass
class VerifyReport:
    """Counts of the checked files, and the problems.

    `known` are files that a repair has noted: only older snapshots name them, and they go when those expire."""

    num_manifests: int = 0
    num_files: int = 0
    num_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    known: list[Problem] = field(default_factory=list)


@dataclass
class _Wanted:
    """A data file, as manifests name it."""

    entry: FileEntry
    versions: list[int] = field(default_factory=list)
    with_statistics: list[int] = field(default_factory=list)  # a repair may have dropped those of a file that stays


def verify(
    store: FeatureStore | str, version: int | None = None, progress: Progress | None = None, threads: int = _THREADS
) -> VerifyReport:
    """Check every file of a store.

    These are store.json, basis, all manifests, pins, channels, quarantine, and each data file that a kept snapshot
    names (of `version` alone where that is given) with its statistics.

    Of a data file: size, sha256, page checksums, columns, row counts, order of keys, shard, duplicates, values, and
    that no key of a snapshot has two uris. Of a folder: that no link leads out of the store; else nothing behind it is
    looked at. Reads all bytes once; the threads together hold no more of them than 256 MB, or the largest file. Files
    that `expire` removes meanwhile are not a problem. Raises SnapshotNotFoundError, StoreNotFoundError, StorageError.
    """
    report = VerifyReport()
    url = store if isinstance(store, str) else store.url
    try:
        store = FeatureStore.open(url)  # again: the data in memory was good when it was read
    except (CorruptFileError, StoreNotFoundError) as error:
        if isinstance(error, StoreNotFoundError) and not log.versions(Storage(url, keep_inside=True)):
            raise
        report.problems.append(Problem("info", INFO_PATH, str(error), _repair(url, "rebuilds it from a data file")))
        return report
    behind_links = "Then verify again: nothing else was checked"
    folders = ((folder, partial(store.storage.list, folder)) for folder in _FOLDERS)
    report.problems += _damaged(("folder", folder, read, behind_links) for folder, read in folders)
    if report.problems:  # files behind such a link are not the store's
        return report
    manifests = _read_manifests(store, report)
    report.problems += _damaged(_small_files(store, manifests))
    if version is not None:
        if version not in manifests and not any(version in problem.versions for problem in report.problems):
            raise SnapshotNotFoundError(f"{store.url} has no snapshot {version}: see crossmedia store log")
        checked = {number: manifest for number, manifest in manifests.items() if number == version}
    else:
        checked = manifests
    _check_data(store, checked, max(manifests, default=0), report, progress, threads)
    return report


def _repair(url: str, does: str) -> str:
    return f"`crossmedia store repair {url}` {does}"


def _read_manifests(store: FeatureStore, report: VerifyReport) -> dict[int, Manifest]:
    """Read the manifests of the log that are good."""
    good: dict[int, Manifest] = {}
    storage, url = store.storage, store.url
    known = log.versions(storage)
    report.num_manifests = len(known)
    for version in known:
        path = log.manifest_path(version)
        way_out = _repair(url, "moves it to damaged/; if it was the newest, the newest good one is committed again")
        try:
            manifest = log.read(storage, version)
        except FileNotFoundError:
            continue  # expired meanwhile
        except CorruptFileError as error:
            report.problems.append(Problem("manifest", path, str(error), way_out, (version,)))
            continue
        files = manifest.entries
        sums = len(files), sum(file.rows for file in files), sum(file.bytes for file in files)
        if sums != (manifest.num_files, manifest.file_rows, manifest.file_bytes):
            message = f"{storage.full(path)} counts other files, rows or bytes than it names"
            report.problems.append(Problem("manifest", path, message, way_out, (version,)))
            continue
        if version - 1 in good and manifest.parent != good[version - 1].commit_id:
            message = f"{storage.full(path)} does not follow the manifest before it"
            report.problems.append(Problem("order", path, message, "Put the right one back from a backup", (version,)))
        good[version] = manifest
    return good


def _damaged(files: Iterable[_SmallFile]) -> Iterator[Problem]:
    """Check files, and yield a problem for each damaged one."""
    for kind, path, check, way_out in files:
        try:
            check()
        except FileNotFoundError:  # it has expired meanwhile, or is settled
            continue
        except CorruptFileError as error:
            yield Problem(kind, path, str(error), way_out)


def _small_files(store: FeatureStore, manifests: Mapping[int, Manifest]) -> Iterator[_SmallFile]:
    storage, url = store.storage, store.url
    aside = _repair(url, "moves it to damaged/")
    check: Callable[[], object]
    for version in log.versions(storage, log.EXPIRED):
        check = partial(log.read, storage, version, log.EXPIRED)
        yield "expired", log.manifest_path(version, log.EXPIRED), check, aside
    if store.info.reduction is not None:
        way_out = "Put it back from a backup, or from another store of the same basis, where it has the same name"
        yield "basis", store.info.reduction.path, partial(basis_of, store.info, storage), way_out
    for name in storage.list(staging.QUARANTINE):
        check = partial(staging.read_file, storage, name)
        yield "quarantine", f"{staging.QUARANTINE}/{name}", check, f"{aside}; the next refresh tries its images again"
    for name in storage.list(history.PINS):
        path, pin = f"{history.PINS}/{name}", name.removesuffix(".json")
        way_out = f"`crossmedia store unpin {url} {pin}`, and pin the snapshot again"
        yield "pin", path, partial(_check_pin, storage, pin, storage.full(path), manifests), way_out
    for name in storage.list(log.CHANNELS):
        path, way_out = f"{log.CHANNELS}/{name}", "Remove it"
        check = partial(_refuse, storage.full(path), "is not a channel")
        if is_channel_name(name):
            check = partial(_check_channel, storage, name, storage.full(path), manifests)
            way_out = f"Set it again: `crossmedia store channel {url} {name} N`"
        yield "channel", path, check, way_out


def _refuse(place: str, what: str) -> None:
    raise CorruptFileError(f"{place} {what}")


def _check_pin(storage: Storage, name: str, place: str, manifests: Mapping[int, Manifest]) -> None:
    pin = history.read_pin(storage, name)
    if pin.version not in manifests:
        _refuse(place, f"keeps snapshot {pin.version}, which is not there")


def _check_channel(storage: Storage, name: str, place: str, manifests: Mapping[int, Manifest]) -> None:
    move = last_move(storage, name)
    if move is None or move.version is None:
        return
    if move.version not in manifests:
        _refuse(place, f"points to snapshot {move.version}, which is not there")
    if manifests[move.version].commit_id != move.commit_id:
        _refuse(place, f"points to snapshot {move.version} of commit {move.commit_id[:8]}, and here it is another")


def _check_data(
    store: FeatureStore,
    manifests: Mapping[int, Manifest],
    newest: int,
    report: VerifyReport,
    progress: Progress | None,
    threads: int,
) -> None:
    wanted: dict[int, dict[FileId, _Wanted]] = defaultdict(dict)
    for version, manifest in sorted(manifests.items()):
        for shard, files in manifest.shards.items():
            for entry in files:
                each = wanted[shard].setdefault(_id(entry), _Wanted(entry))
                each.versions.append(version)
                if entry.statistics_path is not None:
                    each.with_statistics.append(version)
    total = sum(len(files) for files in wanted.values())
    largest = max((each.entry.bytes for files in wanted.values() for each in files.values()), default=0)
    memory = datafile.FileMemory(max(largest, _MEMORY_BYTES))
    found: list[Problem] = []

    def check(shard: int) -> list[Problem]:
        chains = {tuple(map(_id, manifest.files(shard))) for manifest in manifests.values()}
        return list(_shard_problems(store, shard, wanted[shard], chains, newest, memory))

    for shard, problems in zip(wanted, in_threads(check, wanted, threads), strict=True):
        found += problems
        report.num_files += len(wanted[shard])
        report.num_bytes += sum(each.entry.bytes for each in wanted[shard].values())
        if progress is not None:
            progress(report.num_files, total)
    if found:
        kept, noted = set(log.versions(store.storage)), noted_paths(store.storage)
        for problem in found:
            if kept & set(problem.versions):  # else its snapshots have expired meanwhile
                is_known = problem.path in noted and newest not in problem.versions
                (report.known if is_known else report.problems).append(problem)


def _shard_problems(
    store: FeatureStore,
    shard: int,
    wanted: Mapping[FileId, _Wanted],
    chains: set[tuple[FileId, ...]],
    newest: int,
    memory: datafile.FileMemory,
) -> Iterator[Problem]:
    keys: dict[FileId, FileKeys] = {}
    for file_id, each in wanted.items():
        versions = tuple(each.versions)
        is_newest = newest in versions
        way_out = _repair(store.url, "drops its rows into the refresh list") if is_newest else _old(store.url, versions)
        messages, found = check_file(store.storage, store.info, shard, each.entry, memory)
        if found is not None:
            keys[file_id] = found
        for message in messages:
            yield Problem("data", each.entry.path, message, way_out, versions)
        try:
            read_moments(store.storage, each.entry)
        except CorruptFileError as error:
            versions = tuple(each.with_statistics)
            way_out = _repair(store.url, "drops it") if newest in versions else _old(store.url, versions)
            yield Problem("statistics", str(each.entry.statistics_path), str(error), way_out, versions)
    for chain in _longest(chains):
        broken = collisions([keys[file_id] for file_id in chain if file_id in keys])
        if len(broken):
            newest_path = chain[-1][0]
            versions = tuple(wanted[chain[-1]].versions)
            message = (
                f"shard {shard} of {store.url}: {len(broken)} keys belong to two uris, {broken[0]} is one"
                f" ({newest_path} is the newest file)"
            )
            way_out = "Delete those keys, or put them again under one uri"
            yield Problem("collision", newest_path, message, way_out, versions)


def _id(entry: FileEntry) -> FileId:
    return entry.path, entry.sha256


def _longest(chains: set[tuple[FileId, ...]]) -> list[tuple[FileId, ...]]:
    """Drop chains that others continue, as their problems are found there too."""
    ordered = sorted(chains)
    return [
        chain
        for chain, following in zip(ordered, [*ordered[1:], ()], strict=True)
        if chain and following[: len(chain)] != chain
    ]


def _old(url: str, versions: Sequence[int]) -> str:
    which = f"snapshot {versions[0]}" if len(versions) == 1 else f"snapshots {versions[0]} to {versions[-1]}"
    return f"The newest snapshot is whole; {_repair(url, f'notes that {which} cannot be read in full')}"


class DamageNote(Sealed):
    """One file that a repair found damaged, and could not mend where it is."""

    path: StorePath
    reason: str
    time_s: float


def noted_paths(storage: Storage) -> set[str]:
    """Return the files that notes name. A note that is damaged itself does not count: its file is reported again."""
    found = set()
    for name in storage.list(DAMAGED):
        if name.startswith(NOTE_PREFIX):
            with contextlib.suppress(FileNotFoundError, CorruptFileError):
                found.add(read_sealed(storage, f"{DAMAGED}/{name}", DamageNote).path)
    return found


@dataclass(frozen=True)
class FileKeys:
    """The compared columns of a file's rows: key, xxh3-64 of its uri, whether it is a tombstone, all (N,)."""

    keys_N: Int64Array
    uri_hash_N: Int64Array
    deleted_N: BoolArray

    @classmethod
    def of(cls, table: pa.Table) -> "FileKeys":
        """Copy the compared columns of a file's rows."""
        keys_N, deleted_N = datafile.numpy_column(table, datafile.KEY), datafile.numpy_column(table, datafile.DELETED)
        return cls(keys_N.copy(), keys_of_uris(datafile.text_column(table, datafile.URI)), deleted_N.copy())

    @classmethod
    def concatenate(cls, parts: Sequence["FileKeys"]) -> "FileKeys":
        """Put the rows of some parts one behind the other."""
        return cls(
            np.concatenate([np.empty(0, np.int64), *(each.keys_N for each in parts)]),
            np.concatenate([np.empty(0, np.int64), *(each.uri_hash_N for each in parts)]),
            np.concatenate([np.empty(0, np.bool_), *(each.deleted_N for each in parts)]),
        )


def check_file(
    storage: Storage, info: StoreInfo, shard: int, entry: FileEntry, memory: datafile.FileMemory
) -> tuple[list[str], FileKeys | None]:
    """List the problems of a data file, and return its keys, or none if it cannot be read.

    Size, sha256, page checksums, columns, row counts, order, duplicates, membership, values. Reads the whole file once;
    needs its size, from `memory`, and a block. Raises StorageError, except for a broken sector of a local disk.
    """
    path = storage.full(entry.path)
    if entry.info_digest != info.digest:
        return [f"{path} belongs to a store of another kind: its info_digest is not that of store.json"], None
    blocks, num_infinite = [], 0
    try:
        with datafile.open_entry(storage, info, entry, "sha256", memory) as file:
            for block in file.blocks(datafile.schema_of(info).names):
                num_infinite += int(np.count_nonzero(~finite_rows(datafile.matrix_of(block, info), info.dtype)))
                blocks.append(FileKeys.of(block))
    except CorruptFileError as error:
        return [str(error)], None
    keys = FileKeys.concatenate(blocks)
    found = list(_broken_promises(keys, info, shard, entry))
    if num_infinite:
        found.append(f"holds {num_infinite} features that are not finite")
    return [f"{path} {promise}" for promise in found], keys


def collisions(files: Sequence[FileKeys]) -> Int64Array:
    """Return keys that get another uri while they live, in files of one shard, oldest first; deleted keys are free."""
    keys_M, uri_M = np.empty(0, np.int64), np.empty(0, np.int64)  # live rows, by key
    broken = []
    for file in files:
        is_live_N = ~file.deleted_N
        new_M, place_M = np.unique(file.keys_N[is_live_N], return_index=True)
        new_uri_M = file.uri_hash_N[is_live_N][place_M]
        common, mine, theirs = np.intersect1d(keys_M, new_M, assume_unique=True, return_indices=True)
        broken.append(common[uri_M[mine] != new_uri_M[theirs]])
        stays_M = ~np.isin(keys_M, file.keys_N)
        keys_M, uri_M = np.append(keys_M[stays_M], new_M), np.append(uri_M[stays_M], new_uri_M)
    return np.unique(np.concatenate([np.empty(0, np.int64), *broken]))


def _broken_promises(keys: FileKeys, info: StoreInfo, shard: int, entry: FileEntry) -> Iterator[str]:
    hash_N = splitmix64(keys.keys_N)
    if len(np.unique(hash_N)) != len(hash_N):
        yield "holds a key twice"
    elif (hash_N[1:] < hash_N[:-1]).any():
        yield "is not in the order of splitmix64"
    strays = int((shard_of_hash(hash_N, info.num_shards) != shard).sum())
    if strays:
        yield f"holds {strays} keys that do not belong to shard {shard}"
    num_deleted = int(np.count_nonzero(keys.deleted_N))
    if num_deleted != entry.num_deleted:
        yield f"has {num_deleted} tombstones instead of {entry.num_deleted}"
