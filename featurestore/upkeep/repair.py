"""Mend what `verify` finds, in one commit: readers see the store before it or after it, never between.

- A damaged data file of the newest snapshot leaves it. Keys that can still be read of it go into the quarantine with
  the reason; where older files hold them too, tombstones take the file's place, so that no stale row shows again. The
  next refresh computes what is missing.
- A file whose statistics are damaged stays without them: its rows are read instead, until it is compacted.
- Files that older snapshots alone name are noted, and no alarm any more: those snapshots cannot be changed.
- A damaged manifest moves to damaged/. Where it was the newest, the newest good one is committed again first, under the
  next number; the files of the lost commit stay until `expire` removes them. Where nothing was committed under its
  number, as there is a gap before it, it is a stray file, and the numbers continue after the newest good one.
- Where expired/ has manifests that are newer than the newest good one, with all their data files, they are put back
  first; so is a copy of the damaged manifest itself.
- A file with a name that no manifest can have moves from log/ to damaged/.
- Damaged quarantine files and expired manifests move to damaged/. A damaged store.json is rebuilt from a data file.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from featurestore import log
from featurestore.commit import Commit
from featurestore.format.datafile import table_of
from featurestore.format.rows import FeatureRows
from featurestore.format.shard import ShardReader, newest_rows, write_shard_file
from featurestore.keys import Int64Array
from featurestore.spec import FileEntry
from featurestore.staging import QuarantineRow
from featurestore.storage.threads import Progress
from featurestore.store import FeatureStore
from featurestore.upkeep import damage
from featurestore.upkeep.damage import (
    newest_good,
    put_back,
    readable_keys,
    rebuild_info,
    recommit,
    recoverable,
    was_committed,
)
from featurestore.upkeep.verify import Problem, verify

OPERATION = "repair"
Replacements = dict[str, FileEntry | None]  # path of a file of the newest snapshot: what takes its place
_ASIDE = ("stray", "expired", "quarantine")


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
        source = rebuild_info(url, dry_run)
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
        report.actions.append(f"move {problem.path} to {damage.DAMAGED}/")
        if not dry_run:
            damage.put_aside(store.storage, problem.path)
    report.left = [problem for kind in ("folder", "basis", "order", "pin", "collision") for problem in by_kind[kind]]
    return report


def _put_back(store: FeatureStore, problems: Sequence[Problem], report: RepairReport, dry_run: bool) -> bool:
    """Put manifests back into the log that expired/ still has; return whether there were any.

    The oldest first: a repair that was cut off finds the others again. None where one of the two folders is a link out
    of the store: what it holds cannot be listed, and the problem is left for people."""
    if any(problem.kind == "folder" and problem.path in (log.LOG, log.EXPIRED) for problem in problems):
        return False
    damaged = {version for problem in problems if problem.kind == "manifest" for version in problem.versions}
    found = recoverable(store.storage, damaged)
    for manifest in found:
        report.actions.append(f"put snapshot {manifest.version} back from {log.EXPIRED}/")
        if not dry_run:
            put_back(store.storage, manifest)
    return bool(found)


def _mend_manifests(store: FeatureStore, problems: Sequence[Problem], report: RepairReport, dry_run: bool) -> None:
    """Mend manifests from the newest on: behind a stray file may be a damaged commit, which is then the newest."""
    if not problems:
        return
    left = set(log.versions(store.storage))
    good = newest_good(store.storage, {version for problem in problems for version in problem.versions})
    for problem in sorted(problems, key=lambda problem: problem.versions, reverse=True):
        (version,) = problem.versions
        if version == max(left, default=0) and was_committed(store.storage, good, version):
            recommit(store.storage, good, version + 1, OPERATION, dry_run)
            report.actions.append(
                f"commit snapshot {good.version} again as {version + 1}: what {version} had changed is lost"
            )
            report.version = None if dry_run else version + 1
            left.add(version + 1)
        report.actions.append(f"move {problem.path} to {damage.DAMAGED}/")
        left.discard(version)
        if not dry_run:
            damage.put_aside(store.storage, problem.path)


def _mend_files(store: FeatureStore, problems: Sequence[Problem], report: RepairReport, dry_run: bool) -> None:
    """Mend files of the newest snapshot in one commit, and note each, as older snapshots name them or soon will."""
    reasons = {problem.path: problem.message for problem in problems}
    if not reasons:
        return
    plan = _RepairPlan(store, reasons, store.storage.now(), dry_run)
    for shard, files in newest_good(store.storage).shards.items():
        plan.add(shard, files)
    report.num_quarantined = len(plan.lost)
    report.actions += [*plan.actions, *(f"note {path} as damaged, for snapshots that name it" for path in reasons)]
    if dry_run:
        return
    for path, reason in reasons.items():
        damage.note(store.storage, path, reason)
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
        """Return what puts each file in the place of the one that it replaces; what others append stays behind it.

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
