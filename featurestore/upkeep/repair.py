"""Repairs the findings of `verify` in one commit: readers see the store before or after it, never between.

- A damaged data file of the newest snapshot leaves it. Keys that can still be read of it go into the quarantine with
  the reason; where older files hold them too, tombstones take the file's place, so that no stale row shows again. The
  next refresh computes what is missing.
- A file whose statistics are damaged stays without them: its rows are read instead, until it is compacted.
- Files that older snapshots alone name are noted, and no alarm any more: those snapshots cannot be changed.
- A damaged manifest moves to damaged/. Where it was the newest, the newest good one is committed again first, under the
  next number; the files of the lost commit stay until `expire` removes them.
- Where expired/ has manifests that are newer than the newest good one, with all their data files, they are put back
  first; so is a copy of the damaged manifest itself.
- Damaged quarantine files and expired manifests move to damaged/. A damaged store.json is rebuilt from a data file.
"""

import contextlib
import hashlib
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from featurestore import log
from featurestore.errors import CorruptFileError, StorageError
from featurestore.format.datafile import (
    DELETED,
    KEY,
    URI,
    DataFile,
    FeatureRows,
    info_in,
    read_verified,
    table_of,
    text_column,
)
from featurestore.format.shard import ShardReader, newest_rows, write_shard_file
from featurestore.keys import Int64Array, shard_of_hash, splitmix64
from featurestore.spec import FileEntry, Manifest, StoreInfo, create_sealed, seal
from featurestore.staging import QuarantineRow
from featurestore.storage.storage import Progress, Storage
from featurestore.store import INFO_PATH, Commit, FeatureStore
from featurestore.upkeep import DAMAGED, DATA
from featurestore.upkeep.verify import NOTE_PREFIX, DamageNote, FileKeys, Problem, verify

OPERATION = "repair"
Replacements = dict[str, FileEntry | None]  # path of a file of the newest snapshot: what takes its place
_ASIDE = ("expired", "quarantine")
_LEFT = ("folder", "basis", "order", "pin", "channel", "collision")


@dataclass
class RepairReport:
    """Actions of a repair, or of a dry run, one line each, and what no program can mend."""

    actions: list[str] = field(default_factory=list)
    left: list[Problem] = field(default_factory=list)
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
    by_kind: dict[str, list[Problem]] = defaultdict(list)
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


def _put_back(store: FeatureStore, problems: Sequence[Problem], report: RepairReport, dry_run: bool) -> bool:
    """Put manifests back into the log that expired/ still has; return whether there were any.

    The oldest first: a repair that was cut off finds the others again. None where one of the two folders is a link out
    of the store: what it holds cannot be listed, and the problem is left to the user."""
    if any(problem.kind == "folder" and problem.path in (log.LOG, log.EXPIRED) for problem in problems):
        return False
    damaged = {version for problem in problems if problem.kind == "manifest" for version in problem.versions}
    found = _recoverable(store.storage, damaged)
    for manifest in found:
        report.actions.append(f"put snapshot {manifest.version} back from {log.EXPIRED}/")
        if not dry_run:
            _move_back(store.storage, manifest)
    return bool(found)


def _mend_manifests(store: FeatureStore, problems: Sequence[Problem], report: RepairReport, dry_run: bool) -> None:
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


def _mend_files(store: FeatureStore, problems: Sequence[Problem], report: RepairReport, dry_run: bool) -> None:
    """Mend files of the newest snapshot in one commit, and note each, as older snapshots name them or soon will."""
    reasons = {problem.path: problem.message for problem in problems}
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
    """Plan of a repair: what takes the place of which file, and which images are lost.

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
        rows = FeatureRows.tombstones(keys_N[newest_rows(keys_N)], info)
        return write_shard_file(storage, info, shard, [table_of(rows, info)], "delta", 0)


def _note(storage: Storage, path: str, reason: str) -> None:
    """Remember that a data file is damaged; to note it again is not an error."""
    name = hashlib.sha256(path.encode()).hexdigest()[:32]
    storage.write_bytes(
        f"{DAMAGED}/{NOTE_PREFIX}{name}.json", seal(DamageNote(path=path, reason=reason, time_s=storage.now()))
    )


def _keep_copy(storage: Storage, path: str) -> None:
    """Copy a small damaged file to `damaged/`, under its path with dashes.

    The copy is empty where the file cannot be read, or is a link out of the store. The file may be gone already."""
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return
    except CorruptFileError:
        data = b""
    storage.write_bytes(f"{DAMAGED}/{path.replace('/', '-')}", data)


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
        raise CorruptFileError(
            f"{storage.full(INFO_PATH)} cannot be rebuilt, as no data file of the newest snapshot is good: put it back"
            " from a backup"
        )
    path, info = found
    if not dry_run:
        _keep_copy(storage, INFO_PATH)
        storage.write_bytes(INFO_PATH, seal(info))
    return path


def _newest_good(storage: Storage, bad: Collection[int] = (), folders: Sequence[str] = (log.LOG,)) -> Manifest:
    """Read the newest manifest that is whole and none of the `bad` versions, from the first folder that has one.

    Raises CorruptFileError where none has.
    """
    for folder in folders:
        for version in reversed(log.versions(storage, folder)):
            if version not in bad:
                with contextlib.suppress(FileNotFoundError, CorruptFileError):
                    return log.read(storage, version, folder)
    raise CorruptFileError(
        f"no manifest of {storage.url} is good, and none in {log.EXPIRED}/ has all of its files:"
        f" put {storage.full(log.LOG)} back from a backup"
    )


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
    _keep_copy(storage, path)
    storage.write_bytes(path, seal(manifest))
    storage.delete_files([log.manifest_path(manifest.version, log.EXPIRED)])  # second: a kill loses none


def _recommit(storage: Storage, good: Manifest, version: int, operation: str, dry_run: bool) -> None:
    """Commit the newest good manifest again as `version`, the number behind that of the newest, which is damaged.

    Readers and writers stop at a damaged newest manifest, and continue with this one. Where another repair was first,
    its commit stays.
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
            info = info_in(read_verified(storage, entry.path, "sha256", entry.sha256), storage.full(entry.path))
            if info.digest == entry.info_digest:
                return entry.path, info
    return None


def readable_keys(storage: Storage, info: StoreInfo, shard: int, entry: FileEntry) -> tuple[FileKeys, list[str]]:
    """Read the keys that can still be read of a damaged file, and uris (empty where those cannot).

    Row groups whose pages do not fit their checksums are left out. Nothing at all where the file is gone, its footer is
    broken, or it is another file than the one that was committed: of another size, other rows, or with keys of other
    shards."""
    found, uris = [], []
    try:
        if storage.size(entry.path) != entry.bytes:
            return FileKeys.concatenate([]), []
        with storage.open_input(entry.path) as source:
            file = DataFile(source, info, storage.full(entry.path))
            if file.num_rows != entry.rows:
                return FileKeys.concatenate([]), []
            for group in range(len(file.group_starts) - 1):
                table = _readable_group(file, group)
                if table is not None:
                    found.append(FileKeys.of(table))
                    uris += text_column(table, URI)
    except (CorruptFileError, StorageError, FileNotFoundError):
        pass  # all data read before is good
    keys = FileKeys.concatenate(found)
    if (shard_of_hash(splitmix64(keys.keys_N), info.num_shards) != shard).any():
        return FileKeys.concatenate([]), []
    return keys, uris


def _readable_group(file: DataFile, group: int) -> pa.Table | None:
    try:
        table = file.read([KEY], [group])
    except CorruptFileError:
        return None
    columns: dict[str, Any] = {
        URI: pa.array([""] * len(table), pa.string()),
        DELETED: pa.array(np.zeros(len(table), np.bool_)),
    }
    for name in columns:
        try:
            columns[name] = file.read([name], [group])[name]
        except CorruptFileError:
            continue
    columns[KEY] = table[KEY]
    return pa.table(columns)
