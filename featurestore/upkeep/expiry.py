"""Expiry: removes snapshots that nobody keeps, and after a grace time the files that only they, or dead writers, had.

Every manifest is read before anything changes: a damaged one ends the run, as its snapshot may be kept. Then a manifest
moves from log/ to expired/: its snapshot can no longer be opened. Files go when no manifest in log/ names them, none
that has been in expired/ for less than the grace time, and they are older than that themselves. So a process that
opened a snapshot, or began a commit, less than a grace time ago finds all of its files. What a manifest named that a
repair moved to damaged/ is not known: for a grace time from then on no data goes. Every step can be cut off anywhere:
the next run continues. All ages are counted by the storage's own clock.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from featurestore import log
from featurestore.errors import CorruptFileError, StorageError
from featurestore.format.codec import BASES
from featurestore.problems import Problem
from featurestore.spec import seal
from featurestore.staging import STAGING
from featurestore.storage.local import TEMPORARY, StorageEntry
from featurestore.storage.storage import Progress, in_threads
from featurestore.store import FeatureStore
from featurestore.upkeep import DAMAGED, DATA, GRACE_DAYS, KEEP_DAYS, KEEP_LAST
from featurestore.upkeep.history import referenced_versions

_DAY_S = 86_400.0
_THREADS = 8  # waiting for answers, not computing
_MOVED_AT_ONCE = 64
_DELETED_AT_ONCE = 512


@dataclass(frozen=True)
class ExpireReport:
    """Results of an expiry, or of its dry run."""

    kept: tuple[int, ...]  # snapshots that can be opened
    expired: tuple[int, ...]  # that no longer can, since this run
    paths: tuple[str, ...]  # deleted, old copies of manifests too, which are not counted
    num_files: int  # deleted
    num_bytes: int
    runs: tuple[str, ...]  # of dead writers, whose staged parts are among the deleted files
    num_waiting: int  # files of expired snapshots alone that go after the grace time
    num_waiting_bytes: int
    num_damaged: int  # manifests that a repair put aside within the grace time: until it is over, no data goes
    is_complete: bool  # not so where it took longer than half the grace time and stopped: run it again


def expire(
    store: FeatureStore,
    *,
    keep_last: int = KEEP_LAST,
    keep_days: float = KEEP_DAYS,
    grace_days: float = GRACE_DAYS,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ExpireReport:
    """Keep the newest snapshots and those in use, and delete files that nobody needs any more.

    What is kept: the newest snapshot, the `keep_last` last ones, those that were the newest at some time in the last
    `keep_days`, and those that a pin or a channel keeps.

    The grace time must be longer than any commit takes from its first file on, and than anybody reads a snapshot
    without a pin. Readers and writers may be at work; run one expiry at a time. Lists all files once, and reads all
    manifests. Raises CorruptFileError where one of these, a pin or a channel is damaged, so that it is not known what
    is needed; nothing is moved or deleted.
    """
    for name, value in (("keep_last", keep_last), ("keep_days", keep_days), ("grace_days", grace_days)):
        if not value >= 0:
            raise ValueError(Problem.NEGATIVE.of(name, value))
    return _Expiry(store, keep_last, keep_days * _DAY_S, grace_days * _DAY_S, dry_run).run(progress)


def kept_versions(
    made_s: Sequence[tuple[int, float]], now_s: float, keep_last: int, keep_s: float, pinned: Iterable[int]
) -> set[int]:
    """Return those of the versions, ascending with the times they were made at, that the policy keeps.

    The age of a snapshot counts from when the next one took its place: any state of the last `keep_s` can be opened.
    """
    kept = {version for version, _ in made_s[-max(1, keep_last) :]} | set(pinned)
    for (version, _), (_, next_s) in pairwise(made_s):
        if now_s - next_s < keep_s:
            kept.add(version)
    return kept


def move_aside(store: FeatureStore, versions: Sequence[int]) -> list[int]:
    """Take snapshots out of the log, those that a pin or a channel keeps left out: nobody can open them any more.

    Their manifests stay in expired/ for the grace time of the next expiry, so that writers learn that theirs have
    expired. Returns the versions that went.
    """
    there = set(log.versions(store.storage))
    return _Expiry(store, 0, 0.0, 0.0, dry_run=False).move_aside([each for each in versions if each in there])


class _Expiry:
    """One run. Nothing is deleted after half the grace time: its first look at the store may be out of date."""

    def __init__(self, store: FeatureStore, keep_last: int, keep_s: float, grace_s: float, dry_run: bool) -> None:
        self.store, self.storage = store, store.storage
        self.keep_last, self.keep_s, self.grace_s = keep_last, keep_s, grace_s
        self.dry_run = dry_run
        self.now_s = self.storage.now()
        self._end_s = time.monotonic() + grace_s / 2 if grace_s else float("inf")

    def run(self, progress: Progress | None) -> ExpireReport:
        """Move manifests aside, and delete files."""
        made_s = log.versions_and_times(self.storage.entries(log.LOG, recursive=False))
        pinned = referenced_versions(self.storage)
        wanted = kept_versions(made_s, self.now_s, self.keep_last, self.keep_s, pinned)
        leaving = [version for version, _ in made_s if version not in wanted]
        staying = [version for version in log.versions(self.storage) if version not in leaving]
        kept_files = self._files(staying, (log.LOG, log.EXPIRED))
        self._files(leaving, (log.LOG, log.EXPIRED))
        self._files(self._expired((), [version for version, _ in made_s]), (log.EXPIRED, log.LOG))
        if not self.dry_run:
            leaving = self.move_aside(leaving)
        # Listed before the other manifests are read: what is committed from here on is named by one of them.
        listed = self.storage.entries()
        kept = [version for version in log.versions(self.storage) if version not in leaving]
        kept_files |= self._files([version for version in kept if version not in staying], (log.LOG, log.EXPIRED))
        expired = self._expired(leaving, kept)  # after log/: what another expiry moves now is in one of the two
        expired_files = self._files(expired, (log.EXPIRED, log.LOG))
        waiting = {path: size for path, size in expired_files.items() if path not in kept_files}
        num_damaged = self._num_put_aside()  # after the others: a repair copies a manifest before it takes it away
        doomed, runs = self._doomed(listed, {*kept_files, *waiting}, data_too=bool(kept) and not num_damaged)
        num_deleted = len(doomed) if self.dry_run else self._delete([entry.path for entry in doomed], progress)
        is_complete = self.dry_run or (num_deleted == len(doomed) and not self._is_late())
        copies = self._old_copies(kept) if is_complete else []
        if not self.dry_run:
            self.storage.delete_files(copies)
        return ExpireReport(
            kept=tuple(kept),
            expired=tuple(leaving),
            paths=(*(entry.path for entry in doomed[:num_deleted]), *copies),
            num_files=num_deleted,
            num_bytes=sum(entry.size_bytes for entry in doomed[:num_deleted]),
            runs=tuple(runs),
            num_waiting=len(waiting),
            num_waiting_bytes=sum(waiting.values()),
            num_damaged=num_damaged,
            is_complete=is_complete,
        )

    def _is_late(self) -> bool:
        return time.monotonic() > self._end_s

    def _age_s(self, entry: StorageEntry) -> float:
        return self.now_s - entry.mtime_s

    def move_aside(self, leaving: Sequence[int]) -> list[int]:
        """Move manifests from log/ to expired/; return the versions that went.

        A pin that was made meanwhile is seen, or sees the copy. So a copy stays also where a pin was seen, until it is
        old: another expiry may have looked at the pins before, and be about to remove the manifest."""
        moved: list[int] = []
        for start in range(0, len(leaving), _MOVED_AT_ONCE):
            batch = leaving[start : start + _MOVED_AT_ONCE]
            copied = in_threads(self._copy_aside, batch, _THREADS)
            copies = {version: data for version, data in zip(batch, copied, strict=True) if data}
            pinned = referenced_versions(self.storage)
            if self._is_late():
                return moved
            going = [version for version in copies if version not in pinned]
            self.storage.delete_files(map(log.manifest_path, going))
            there = set(log.versions(self.storage, log.EXPIRED))
            for version in going:
                if version not in there:  # this run was away for long, and another one has taken the copy away
                    self.storage.write_bytes(log.manifest_path(version, log.EXPIRED), copies[version])
            moved += going
        return moved

    def _copy_aside(self, version: int) -> bytes | None:
        """Copy a manifest to expired/, replacing a copy, so that its grace time begins now; None if it is missing."""
        try:
            data = seal(log.read(self.storage, version))
        except FileNotFoundError:  # another expiry was quicker
            return None
        path = log.manifest_path(version, log.EXPIRED)
        try:
            is_other = self.storage.read_bytes(path) != data
        except FileNotFoundError:
            is_other = False
        if is_other:
            # Made by a writer that was away while the true manifest of this version expired; it does not count.
            self.storage.delete(log.manifest_path(version))
            return None
        self.storage.write_bytes(path, data)
        return data

    def _expired(self, leaving: Iterable[int], kept: Iterable[int]) -> list[int]:
        """List versions in expired/ that readers may have open, and those that a dry run would move there."""
        # Twice: POSIX lets a listing miss a file that another expiry puts in the place of its like at that moment.
        listings = [self.storage.entries(log.EXPIRED, recursive=False) for _ in range(2)]
        copies = [copy for listing in listings for copy in log.versions_and_times(listing)]
        young = {version for version, made_s in copies if self.now_s - made_s <= self.grace_s}
        return sorted((young | set(leaving)) - set(kept))

    def _num_put_aside(self) -> int:
        """Count manifests that were found damaged within the grace time: readers may have those snapshots open."""
        aside = self.storage.entries(DAMAGED, recursive=False)
        return sum(_is_manifest(entry.path) and self._age_s(entry) <= self.grace_s for entry in aside)

    def _files(self, versions: Sequence[int], folders: Sequence[str]) -> dict[str, int]:
        """Return the files that the manifests name, and the bytes of those with rows; the first folder counts."""
        found: dict[str, int] = {}
        for files in in_threads(lambda version: self._files_of(version, folders), versions, _THREADS):
            found |= files
        return found

    def _files_of(self, version: int, folders: Sequence[str]) -> dict[str, int]:
        try:
            manifest = log.find(self.storage, version, folders)
        except CorruptFileError as error:
            way_out = f"crossmedia store repair {self.store.url}, then run expire again"
            raise CorruptFileError(Problem.BROKEN_UNTIL_MENDED, error, way_out) from error
        if manifest is None:
            raise StorageError(Problem.MANIFEST_REMOVED, version, self.store.url)
        statistics = {e.statistics_path: 0 for e in manifest.entries if e.statistics_path is not None}
        return {entry.path: entry.bytes for entry in manifest.entries} | statistics

    def _doomed(
        self, listed: Sequence[StorageEntry], named: set[str], data_too: bool
    ) -> tuple[list[StorageEntry], list[str]]:
        """List old files that nobody needs, and the runs that some of them were staged by.

        Without `data_too` data stays: where there is no manifest, the log may be what was lost; and one that was
        damaged may have named it.
        """
        needed = named if self.store.info.reduction is None else named | {self.store.info.reduction.path}
        folders = {BASES, DATA} if data_too else {BASES}
        doomed: list[StorageEntry] = []
        by_run: dict[str, list[StorageEntry]] = {}
        for entry in listed:
            folder, *between, name = entry.path.split("/") if "/" in entry.path else ("", entry.path)
            if folder == STAGING and between:
                by_run.setdefault(between[0], []).append(entry)
                continue
            is_temporary = name.startswith(TEMPORARY) or folder.startswith(TEMPORARY)
            is_needless = is_temporary or (folder in folders and entry.path not in needed)
            if is_needless and self._age_s(entry) > self.grace_s:
                doomed.append(entry)
        dead = [run for run, parts in by_run.items() if min(map(self._age_s, parts)) > self.grace_s]
        return [*doomed, *(entry for run in dead for entry in by_run[run])], dead

    def _delete(self, paths: Sequence[str], progress: Progress | None) -> int:
        """Delete files until half the grace time is over; return how many are gone."""
        for start in range(0, len(paths), _DELETED_AT_ONCE):
            if self._is_late():
                return start
            self.storage.delete_files(paths[start : start + _DELETED_AT_ONCE])
            if progress is not None:
                progress(min(start + _DELETED_AT_ONCE, len(paths)), len(paths))
        return len(paths)

    def _old_copies(self, kept: Iterable[int]) -> list[str]:
        """List manifests whose files are gone, and those of kept snapshots, copied by a run that was cut off."""
        still_there = set(kept)
        # No run takes longer than half the grace: a copy that is older than that is nobody's.
        return [
            log.manifest_path(version, log.EXPIRED)
            for version, made_s in log.versions_and_times(self.storage.entries(log.EXPIRED, recursive=False))
            if self.now_s - made_s > (self.grace_s / 2 if version in still_there else self.grace_s)
        ]


def _is_manifest(path: str) -> bool:
    """Return whether a file of `damaged/` was put aside from log/ or expired/."""
    folder, _, name = path.removeprefix(f"{DAMAGED}/").partition("-")
    return folder in (log.LOG, log.EXPIRED) and log.version_of(name) is not None
