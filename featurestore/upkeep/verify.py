"""Verification of every file of a store against its log, and repairs.

In `damaged/` are manifests that a repair took out of the log, and notes of data files that only older snapshots still
name. Such a file can only come back from a backup: it is reported without alarm until its snapshots expire.

A repair is one commit: readers see the store before or after it, never between.

- A damaged data file of the newest snapshot leaves it. Keys that can still be read of it go into the quarantine with
  the reason; where older files hold them too, tombstones take the file's place, so that no stale row shows again. The
  next refresh computes missing features.
- A file whose statistics are damaged stays without them: its rows are read instead, until it is compacted.
- Files that older snapshots alone name are noted, and no alarm any more: those snapshots cannot be changed.
- A damaged manifest moves to damaged/. Where it was the newest, the newest good one is committed again first, under the
  next number; the files of the lost commit stay until `expire` removes them.
- Where expired/ has manifests that are newer than the newest good one, with all their data files, they are put back
  first; so is a copy of the damaged manifest itself.
- Damaged quarantine files and expired manifests move to damaged/. A damaged store.json is rebuilt from a data file.

Letters of shapes: N rows of a file, M live rows of several files.
"""

import contextlib
import hashlib
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from featurestore import errors, log, staging
from featurestore.errors import CorruptFileError, SnapshotNotFoundError, StorageError, StoreNotFoundError
from featurestore.format import datafile
from featurestore.format.codec import BASES, basis_of
from featurestore.format.shard import ShardReader, newest_rows, read_moments, write_shard_file
from featurestore.keys import BoolArray, Int64Array, keys_of_uris, shard_of_hash, splitmix64
from featurestore.problems import Problem
from featurestore.published.versions import is_channel_name, last_move
from featurestore.spec import FileEntry, Manifest, Sealed, StoreInfo, StorePath, create_sealed, read_sealed, seal
from featurestore.staging import QuarantineRow
from featurestore.storage.storage import Progress, Storage, in_threads
from featurestore.store import INFO_PATH, Commit, FeatureStore
from featurestore.upkeep import DAMAGED, DATA, history

_MEMORY_BYTES = 256 << 20
_THREADS = 4
NOTE_PREFIX, _REPLACED = "note-", "replaced-"
ProblemKind = (
    Literal["info", "folder", "basis", "manifest", "order", "expired"]
    | Literal["pin", "channel", "quarantine", "data", "statistics", "collision"]
)
_FOLDERS = (log.LOG, log.EXPIRED, log.PINS, log.CHANNELS, DATA, BASES, staging.QUARANTINE, staging.STAGING, DAMAGED)
FileId = tuple[str, str]  # path and sha256
_SmallFile = tuple[ProblemKind, str, Callable[[], object], str]  # kind, path, its check, and the way out
OPERATION = "repair"
Replacements = dict[str, FileEntry | None]  # path of a file of the newest snapshot: what takes its place
_ASIDE = ("expired", "quarantine")
_LEFT = ("folder", "basis", "order", "pin", "channel", "collision")


@dataclass(frozen=True)
class Damage:
    """One problem: `str` gives one line with the file, the problem, and the way out."""

    kind: ProblemKind
    path: str  # relative to the store
    error: errors.FeatureStoreError  # names the file by its full address
    way_out: str
    versions: tuple[int, ...] = ()  # snapshots that hold a data file, ascending

    def __str__(self) -> str:
        return f"{self.error}. {self.way_out}"


@dataclass
class VerifyReport:
    """Counts of the checked files, and the problems.

    `known` are files that a repair has noted: only older snapshots name them, and they go when those expire."""

    num_manifests: int = 0
    num_files: int = 0
    num_bytes: int = 0
    problems: list[Damage] = field(default_factory=list)
    known: list[Damage] = field(default_factory=list)


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
        report.problems.append(Damage("info", INFO_PATH, error, _repair(url, "rebuilds it from a data file")))
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
            raise SnapshotNotFoundError(Problem.NO_SNAPSHOT_TO_VERIFY, store.url, version)
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
    known, given = log.versions(storage), _Given.of(storage)
    report.num_manifests = len(known)
    for version in known:
        path = log.manifest_path(version)
        way_out = _repair(url, "moves it to damaged/; if it was the newest, the newest good one is committed again")
        try:
            manifest = log.read(storage, version)
        except FileNotFoundError:
            continue  # expired meanwhile
        except CorruptFileError as error:
            report.problems.append(Damage("manifest", path, error, way_out, (version,)))
            continue
        files = manifest.entries
        sums = len(files), sum(file.rows for file in files), sum(file.bytes for file in files)
        if sums != (manifest.num_files, manifest.file_rows, manifest.file_bytes):
            wrong = CorruptFileError(Problem.WRONG_COUNTS, storage.full(path))
            report.problems.append(Damage("manifest", path, wrong, way_out, (version,)))
            continue
        if given.to_another(manifest):
            wrong = CorruptFileError(Problem.NUMBER_GIVEN_AWAY, storage.full(path))
            report.problems.append(Damage("manifest", path, wrong, way_out, (version,)))
            continue
        if version - 1 in good and manifest.parent != good[version - 1].commit_id:
            wrong = CorruptFileError(Problem.FOLLOWS_ANOTHER, storage.full(path))
            report.problems.append(Damage("order", path, wrong, "Put the right one back from a backup", (version,)))
        good[version] = manifest
    return good


@dataclass(frozen=True)
class _Given:
    """The numbers of manifests that were moved away from the log: no other one gets them.

    A manifest that comes late finds its number free; its writer takes it away again, unless it is killed."""

    storage: Storage
    damaged: Collection[int]
    expired: Collection[int]

    @classmethod
    def of(cls, storage: Storage) -> "_Given":
        """List them."""
        names = [name.partition("-") for name in storage.list(DAMAGED)]
        damaged = {log.version_of(name) for folder, _, name in names if folder == log.LOG}
        return cls(storage, {version for version in damaged if version}, log.versions(storage, log.EXPIRED))

    def to_another(self, manifest: Manifest) -> bool:
        """Return whether another manifest had this one's number, and this one is not part of the log."""
        with contextlib.suppress(CorruptFileError, FileNotFoundError):
            if manifest.version in self.expired:  # an expiry has copied this one, or moved another
                return log.read(self.storage, manifest.version, log.EXPIRED).commit_id != manifest.commit_id
        if manifest.version not in self.damaged:
            return False
        with contextlib.suppress(CorruptFileError):  # a backup put it back, if it has a follower or is the newest
            return not log.is_followed(self.storage, manifest)
        return True


def _damaged(files: Iterable[_SmallFile]) -> Iterator[Damage]:
    """Check files, and yield a problem for each damaged one."""
    for kind, path, check, way_out in files:
        try:
            check()
        except FileNotFoundError:  # it has expired meanwhile, or is settled
            continue
        except CorruptFileError as error:
            yield Damage(kind, path, error, way_out)


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
        check = partial(_refuse, Problem.NOT_A_CHANNEL, storage.full(path))
        if is_channel_name(name):
            check = partial(_check_channel, storage, name, storage.full(path), manifests)
            way_out = f"Set it again: `crossmedia store channel {url} {name} N`"
        yield "channel", path, check, way_out


def _refuse(problem: Problem, *values: object) -> None:
    raise CorruptFileError(problem, *values)


def _check_pin(storage: Storage, name: str, place: str, manifests: Mapping[int, Manifest]) -> None:
    pin = history.read_pin(storage, name)
    if pin.version not in manifests:
        _refuse(Problem.PIN_OF_NOTHING, place, pin.version)


def _check_channel(storage: Storage, name: str, place: str, manifests: Mapping[int, Manifest]) -> None:
    move = last_move(storage, name)
    if move is None or move.version is None:
        return
    if move.version not in manifests:
        _refuse(Problem.CHANNEL_OF_NOTHING, place, move.version)
    if manifests[move.version].commit_id != move.commit_id:
        _refuse(Problem.CHANNEL_OF_ANOTHER, place, move.version, move.commit_id[:8])


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
    found: list[Damage] = []

    def check(shard: int) -> list[Damage]:
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
) -> Iterator[Damage]:
    keys: dict[FileId, FileKeys] = {}
    for file_id, each in wanted.items():
        versions = tuple(each.versions)
        is_newest = newest in versions
        way_out = _repair(store.url, "drops its rows into the refresh list") if is_newest else _old(store.url, versions)
        wrong, found = check_file(store.storage, store.info, shard, each.entry, memory)
        if found is not None:
            keys[file_id] = found
        for error in wrong:
            yield Damage("data", each.entry.path, error, way_out, versions)
        try:
            read_moments(store.storage, each.entry)
        except CorruptFileError as error:
            versions = tuple(each.with_statistics)
            way_out = _repair(store.url, "drops it") if newest in versions else _old(store.url, versions)
            yield Damage("statistics", str(each.entry.statistics_path), error, way_out, versions)
    for chain in _longest(chains):
        broken = collisions([keys[file_id] for file_id in chain if file_id in keys])
        if len(broken):
            newest_path = chain[-1][0]
            versions = tuple(wanted[chain[-1]].versions)
            two = CorruptFileError(Problem.KEYS_OF_TWO_URIS, shard, store.url, len(broken), broken[0], newest_path)
            way_out = "Delete those keys, or put them again under one uri"
            yield Damage("collision", newest_path, two, way_out, versions)


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
) -> tuple[list[CorruptFileError], FileKeys | None]:
    """List the problems of a data file, and return its keys, or none if it cannot be read.

    Size, sha256, page checksums, columns, row counts, order, duplicates, membership, values. Reads the whole file once;
    needs its size, from `memory`, and a block. Raises StorageError, except for a broken sector of a local disk.
    """
    path = storage.full(entry.path)
    if entry.info_digest != info.digest:
        return [CorruptFileError(Problem.FILE_OF_ANOTHER_KIND, path)], None
    blocks, num_infinite = [], 0
    try:
        with datafile.open_entry(storage, info, entry, "sha256", memory) as file:
            for block in file.blocks(datafile.schema_of(info).names):
                num_infinite += int(
                    np.count_nonzero(~datafile.finite_rows(datafile.matrix_of(block, info), info.dtype))
                )
                blocks.append(FileKeys.of(block))
    except CorruptFileError as error:
        return [error], None
    keys = FileKeys.concatenate(blocks)
    found = list(_broken_promises(keys, info, shard, entry, path))
    if num_infinite:
        found.append(CorruptFileError(Problem.HOLDS_NOT_FINITE, path, num_infinite))
    return found, keys


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


def _broken_promises(
    keys: FileKeys, info: StoreInfo, shard: int, entry: FileEntry, path: str
) -> Iterator[CorruptFileError]:
    hash_N = splitmix64(keys.keys_N)
    if len(np.unique(hash_N)) != len(hash_N):
        yield CorruptFileError(Problem.HOLDS_KEY_TWICE, path)
    elif (hash_N[1:] < hash_N[:-1]).any():
        yield CorruptFileError(Problem.HOLDS_NO_ORDER, path)
    strays = int((shard_of_hash(hash_N, info.num_shards) != shard).sum())
    if strays:
        yield CorruptFileError(Problem.HOLDS_STRAY_KEYS, path, strays, shard)
    num_deleted = int(np.count_nonzero(keys.deleted_N))
    if num_deleted != entry.num_deleted:
        yield CorruptFileError(Problem.WRONG_NUMBER, path, num_deleted, "tombstones", entry.num_deleted)


@dataclass
class RepairReport:
    """Actions of a repair, or of a dry run, one line each, and problems that no program can mend."""

    actions: list[str] = field(default_factory=list)
    left: list[Damage] = field(default_factory=list)
    version: int | None = None  # of the commit; None where none was needed
    num_quarantined: int = 0  # images that the next refresh computes again; others of a broken file it finds missing


def repair(store: FeatureStore | str, dry_run: bool = False, progress: Progress | None = None) -> RepairReport:
    """Verify a store and mend it. Reads all of it. May be interrupted, and run again.

    Raises CorruptFileError where no good manifest, or no data file to rebuild store.json from, is left;
    CommitConflictError where another repair or a compaction was in the way: run it again.
    """
    report = RepairReport()
    problems = verify(store, progress=progress).problems
    if any(problem.kind == "info" for problem in problems):
        url = store if isinstance(store, str) else store.url
        source = _rebuild_info(url, dry_run)
        report.actions.append(f"rebuild store.json of {url} from {source}")
        if dry_run:
            return report
        problems = verify(url, progress=progress).problems
        store = url
    store = FeatureStore.open(store) if isinstance(store, str) else store
    if _put_back(store, problems, report, dry_run):
        if dry_run:
            return report
        problems = verify(store, progress=progress).problems
    by_kind: dict[str, list[Damage]] = defaultdict(list)
    for problem in problems:
        by_kind[problem.kind].append(problem)
    _mend_manifests(store, by_kind["manifest"], report, dry_run)
    _mend_files(store, [*by_kind["data"], *by_kind["statistics"]], report, dry_run)
    for problem in [problem for kind in _ASIDE for problem in by_kind[kind]]:
        report.actions.append(f"move {problem.path} to {DAMAGED}/")
        if not dry_run:
            _put_aside(store.storage, problem.path)
    report.left = [problem for kind in _LEFT for problem in by_kind[kind]]
    return report


def _put_back(store: FeatureStore, problems: Sequence[Damage], report: RepairReport, dry_run: bool) -> bool:
    """Put manifests back into the log that expired/ still has; return whether there were any.

    The oldest first: a repair that was cut off finds the others again. None where one of the two folders is a link out
    of the store: its content cannot be listed, and the problem is left to the user."""
    if any(problem.kind == "folder" and problem.path in (log.LOG, log.EXPIRED) for problem in problems):
        return False
    damaged = {version for problem in problems if problem.kind == "manifest" for version in problem.versions}
    found = _recoverable(store.storage, damaged)
    for manifest in found:
        report.actions.append(f"put snapshot {manifest.version} back from {log.EXPIRED}/")
        if not dry_run:
            _move_back(store.storage, manifest)
    return bool(found)


def _mend_manifests(store: FeatureStore, problems: Sequence[Damage], report: RepairReport, dry_run: bool) -> None:
    """Move damaged manifests away; where one is the newest, the newest good one is committed again behind it."""
    if not problems:
        return
    left = set(log.versions(store.storage))
    good = _newest_good(store.storage, {version for problem in problems for version in problem.versions})
    for problem in sorted(problems, key=lambda problem: problem.versions, reverse=True):
        (version,) = problem.versions
        if version == max(left, default=0):
            _recommit(store.storage, good, version + 1, OPERATION, dry_run)
            report.actions.append(
                f"commit snapshot {good.version} again as {version + 1}: what {version} had changed is lost"
            )
            report.version = None if dry_run else version + 1
            left.add(version + 1)
        report.actions.append(f"move {problem.path} to {DAMAGED}/")
        left.discard(version)
        if not dry_run:
            _put_aside(store.storage, problem.path)


def _mend_files(store: FeatureStore, problems: Sequence[Damage], report: RepairReport, dry_run: bool) -> None:
    """Mend files of the newest snapshot in one commit, and note each, as older snapshots name them or soon will."""
    reasons = {problem.path: str(problem.error) for problem in problems}
    if not reasons:
        return
    plan = _RepairPlan(store, reasons, store.storage.now(), dry_run)
    for shard, files in _newest_good(store.storage).shards.items():
        plan.add(shard, files)
    report.num_quarantined = len(plan.lost)
    report.actions += [*plan.actions, *(f"note {path} as damaged, for snapshots that name it" for path in reasons)]
    if dry_run:
        return
    for path, reason in reasons.items():
        _note(store.storage, path, reason)
    if plan.replacements:
        store.add_quarantine(plan.lost)
        report.version = plan.commit().publish().version


class _RepairPlan:
    """Plan of a repair: replacements of files, and lost images.

    Tombstone files are written at once."""

    def __init__(self, store: FeatureStore, reasons: Mapping[str, str], now_s: float, dry_run: bool) -> None:
        """`reasons` by the paths of damaged files."""
        self._store, self._reasons, self._now_s, self._dry_run = store, reasons, now_s, dry_run
        self.replacements: Replacements = {}
        self.based_on: dict[int, Sequence[FileEntry]] = {}  # files of the shards where something is replaced
        self.lost: list[QuarantineRow] = []
        self.actions: list[str] = []

    def add(self, shard: int, files: Sequence[FileEntry]) -> None:
        """Plan for a shard of the newest snapshot, its files oldest first."""
        if any(entry.path in self._reasons or entry.statistics_path in self._reasons for entry in files):
            self.based_on[shard] = files
        for place, entry in enumerate(files):
            if entry.path in self._reasons:
                older, newer = (self._keys_of(shard, some) for some in (files[:place], files[place + 1 :]))
                self._drop(shard, entry, older, newer)
            elif entry.statistics_path in self._reasons:
                self.actions.append(f"drop the statistics of {entry.path}: its rows are read instead")
                without = {"statistics_path": None, "statistics_sha256": None}
                self.replacements[entry.path] = entry.model_copy(update=without)

    def commit(self) -> Commit:
        """Return a function that puts each file in the place of the one it replaces, before those appended by others.

        It replaces all files of those shards: by them it is known which keys need a tombstone.
        """
        new = {s: [self.replacements.get(e.path, e) for e in files] for s, files in self.based_on.items()}
        return Commit(
            storage=self._store.storage,
            info=self._store.info,
            operation=OPERATION,
            entries={shard: [entry for entry in entries if entry is not None] for shard, entries in new.items()},
            replaces=self.based_on,
            num_quarantined=len(self.lost),
        )

    def _drop(self, shard: int, entry: FileEntry, older: Int64Array, newer: Int64Array) -> None:
        keys, uris = readable_keys(self._store.storage, self._store.info, shard, entry)
        decides_N = ~np.isin(keys.keys_N, newer)
        self.lost += [
            QuarantineRow(int(keys.keys_N[row]), uris[row], self._reasons[entry.path], self._now_s)
            for row in np.flatnonzero(decides_N & ~keys.deleted_N)
        ]
        stale = keys.keys_N[decides_N & np.isin(keys.keys_N, older)]
        read = f"{len(keys.keys_N)} of its {entry.rows} keys can be read"
        self.actions.append(f"drop {entry.path}: {read}, {len(stale)} that older files hold get tombstones")
        if len(keys.keys_N) < entry.rows and len(older):
            self.actions[-1] += "; older rows of the others show again until the next refresh"
        self.replacements[entry.path] = None if self._dry_run or not len(stale) else self._tombstones(shard, stale)

    def _keys_of(self, shard: int, files: Sequence[FileEntry]) -> Int64Array:
        """Return the keys of all rows of the good files, tombstones too."""
        good = [entry for entry in files if entry.path not in self._reasons]
        return ShardReader(self._store.storage, self._store.info, shard, good).all_keys()

    def _tombstones(self, shard: int, keys_N: Int64Array) -> FileEntry:
        storage, info = self._store.storage, self._store.info
        rows = datafile.FeatureRows.tombstones(keys_N[newest_rows(keys_N)], info)
        return write_shard_file(storage, info, shard, [datafile.table_of(rows, info)], "delta", 0)


def _note(storage: Storage, path: str, reason: str) -> None:
    """Remember that a data file is damaged; to note it again is not an error."""
    name = hashlib.sha256(path.encode()).hexdigest()[:32]
    storage.write_bytes(
        f"{DAMAGED}/{NOTE_PREFIX}{name}.json", seal(DamageNote(path=path, reason=reason, time_s=storage.now()))
    )


def _dashed(path: str) -> str:
    return path.replace("/", "-")


def _keep_copy(storage: Storage, path: str, prefix: str = "") -> None:
    """Copy a small damaged file to `damaged/`, under its path with dashes.

    The copy is empty where the file cannot be read, or is a link out of the store. The file may be gone already."""
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return
    except CorruptFileError:
        data = b""
    storage.write_bytes(f"{DAMAGED}/{prefix}{_dashed(path)}", data)


def _put_aside(storage: Storage, path: str) -> None:
    """Move a small damaged file to `damaged/`, as `_keep_copy` does."""
    _keep_copy(storage, path)
    storage.delete_files([path])


def _rebuild_info(url: str, dry_run: bool) -> str:
    """Write store.json from the copy in a data file of the newest good manifest; return the path of that file.

    A damaged one is kept in damaged/. The store keeps its `store_id`. Raises CorruptFileError where no file is good.
    """
    storage = Storage(url, keep_inside=True)
    found = _info_of_a_file(storage, _newest_good(storage, folders=(log.LOG, log.EXPIRED)))
    if found is None:
        raise CorruptFileError(Problem.CANNOT_REBUILD, storage.full(INFO_PATH))
    path, info = found
    if not dry_run:
        _keep_copy(storage, INFO_PATH)
        storage.write_bytes(INFO_PATH, seal(info))
    return path


def _newest_good(storage: Storage, bad: Collection[int] = (), folders: Sequence[str] = (log.LOG,)) -> Manifest:
    """Read the newest manifest that is whole and none of the `bad` versions, from the first folder that has one.

    Nor does it take one that came late, maybe since the store was verified. Raises CorruptFileError where none has.
    """
    given = _Given.of(storage)
    for folder in folders:
        for version in reversed(log.versions(storage, folder)):
            if version not in bad:
                with contextlib.suppress(FileNotFoundError, CorruptFileError):
                    found = log.read(storage, version, folder)
                    if not given.to_another(found):
                        return found
    raise CorruptFileError(Problem.NO_GOOD_MANIFEST, storage.url, log.EXPIRED, storage.full(log.LOG))


def _recoverable(storage: Storage, damaged: Collection[int]) -> list[Manifest]:
    """Read the manifests in expired/ that can take the place of damaged ones of the log, ascending.

    These are copies of the damaged ones themselves, and where the newest is damaged all that are newer than the newest
    good one. Each must be whole, and name only data files that exist.
    """
    good = max((version for version in log.versions(storage) if version not in damaged), default=0)
    newest = max(damaged, default=0)
    wanted = [v for v in log.versions(storage, log.EXPIRED) if v in damaged or good < v < newest]
    names = {entry.path for entry in storage.entries(DATA)} if wanted else set()
    found = []
    for version in wanted:
        with contextlib.suppress(FileNotFoundError, CorruptFileError):
            manifest = log.read(storage, version, log.EXPIRED)
            if all(entry.path in names for entry in manifest.entries):
                found.append(manifest)
    return found


def _move_back(storage: Storage, manifest: Manifest) -> None:
    """Move a manifest from expired/ to log/, where a damaged one of its version makes room for it."""
    path = log.manifest_path(manifest.version)
    _keep_copy(storage, path, _REPLACED)
    storage.delete_files([f"{DAMAGED}/{_dashed(path)}"])  # of a repair that was killed: this number is one of the log
    storage.write_bytes(path, seal(manifest))
    storage.delete_files([log.manifest_path(manifest.version, log.EXPIRED)])  # last: a kill loses none


def _recommit(storage: Storage, good: Manifest, version: int, operation: str, dry_run: bool) -> None:
    """Commit the newest good manifest again as `version`, the number behind that of the newest, which is damaged.

    Readers and writers stop at a damaged newest manifest, and continue with this one. Where another repair was first,
    its commit stays. Where what came after that has made the number free again, this one is not part of the log: the
    next repair moves it away.
    """
    if not dry_run:
        again = good.model_copy(
            update={
                "version": version,
                "parent": good.commit_id,
                "commit_id": uuid.uuid4().hex,
                "writer": log.writer_name(),
                "time_s": max(time.time(), good.time_s),
                "operation": operation,
            }
        )
        create_sealed(storage, log.manifest_path(version), again)


def _info_of_a_file(storage: Storage, manifest: Manifest) -> tuple[str, StoreInfo] | None:
    for entry in manifest.entries:
        with contextlib.suppress(FileNotFoundError, CorruptFileError):
            info = datafile.info_in(
                datafile.read_verified(storage, entry.path, "sha256", entry.sha256), storage.full(entry.path)
            )
            if info.digest == entry.info_digest:
                return entry.path, info
    return None


def readable_keys(storage: Storage, info: StoreInfo, shard: int, entry: FileEntry) -> tuple[FileKeys, list[str]]:
    """Read the keys that can still be read of a damaged file, and uris (empty where those cannot).

    Row groups whose pages do not fit their checksums are left out. Nothing at all where the file is gone, its footer is
    broken, or it is not the committed file: of another size, other rows, or with keys of other shards."""
    found, uris = [], []
    try:
        if storage.size(entry.path) != entry.bytes:
            return FileKeys.concatenate([]), []
        with storage.open_input(entry.path) as source:
            file = datafile.DataFile(source, info, storage.full(entry.path))
            if file.num_rows != entry.rows:
                return FileKeys.concatenate([]), []
            for group in range(len(file.group_starts) - 1):
                table = _readable_group(file, group)
                if table is not None:
                    found.append(FileKeys.of(table))
                    uris += datafile.text_column(table, datafile.URI)
    except (CorruptFileError, StorageError, FileNotFoundError):
        pass  # all data read before is good
    keys = FileKeys.concatenate(found)
    if (shard_of_hash(splitmix64(keys.keys_N), info.num_shards) != shard).any():
        return FileKeys.concatenate([]), []
    return keys, uris


def _readable_group(file: datafile.DataFile, group: int) -> pa.Table | None:
    try:
        table = file.read([datafile.KEY], [group])
    except CorruptFileError:
        return None
    columns: dict[str, Any] = {
        datafile.URI: pa.array([""] * len(table), pa.string()),
        datafile.DELETED: pa.array(np.zeros(len(table), np.bool_)),
    }
    for name in columns:
        try:
            columns[name] = file.read([name], [group])[name]
        except CorruptFileError:
            continue
    columns[datafile.KEY] = table[datafile.KEY]
    return pa.table(columns)
