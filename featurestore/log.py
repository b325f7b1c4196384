"""The log of manifests, in which a commit creates the next one.

`expire` takes old manifests out of the log again, so that a name in it can become free. The newest manifest never goes:
by that a writer that was away for a while, and created a version that once was another's, finds out (`_is_ours`).
"""

import contextlib
import os
import platform
import random
import re
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Protocol

from featurestore.errors import CommitConflictError, CorruptFileError, SnapshotNotFoundError, StorageError
from featurestore.problems import Problem
from featurestore.spec import MAX_VERSION, Manifest, create_sealed, read_sealed
from featurestore.storage.local import StorageEntry
from featurestore.storage.storage import Storage

LOG = "log"
EXPIRED = "expired"
PINS = "pins"
CHANNELS = "channels"
_DAMAGED = "damaged"  # of featurestore.upkeep, which is above this module
_NAME = re.compile(r"([0-9]{20})\.json")
_MAX_ATTEMPTS = 300
_MAX_FAILURES = 5
_MAX_LISTINGS = 20
_SLOW_S = 5.0
"""A listing that took longer is made again: the list of a folder may lack files that came or expired meanwhile."""

EMPTY = Manifest(
    version=0,
    parent=None,
    commit_id="",
    writer="",
    time_s=0.0,
    operation="create",
    num_files=0,
    file_rows=0,
    file_bytes=0,
    shards={},
)


def writer_name() -> str:
    """Return host and process, for display."""
    return f"{platform.node()}:{os.getpid()}"


def manifest_path(version: int, folder: str = LOG) -> str:
    """Return the path of the manifest of `version`, relative to the store."""
    return f"{folder}/{version:020d}.json"


def version_of(name: str) -> int | None:
    """Return the version in a manifest's file name; None for other names, and for versions beyond MAX_VERSION."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and 1 <= int(match[1]) <= MAX_VERSION else None


def versions(storage: Storage, folder: str = LOG) -> list[int]:
    """List the versions of the manifests in a folder, ascending."""
    began_s, names = time.monotonic(), storage.list(folder)
    if time.monotonic() - began_s > _SLOW_S:
        names = storage.list(folder)
    return [version for version in map(version_of, names) if version is not None]


def versions_and_times(entries: Iterable[StorageEntry]) -> list[tuple[int, float]]:
    """List versions and times of the manifests among files, ascending."""
    found = ((version_of(entry.path.rpartition("/")[2]), entry.mtime_s) for entry in entries)
    return sorted((version, made_s) for version, made_s in found if version is not None)


def read_manifest(storage: Storage, version: int | None = None) -> Manifest:
    """Read the manifest of `version`, the newest by default; 0 is the empty store. Raises SnapshotNotFoundError."""
    if version == 0:
        return EMPTY
    if version is None:
        return _newest(storage)
    with contextlib.suppress(FileNotFoundError):
        found = read(storage, version)
        if not _is_stray(storage, found):
            return found
    known = versions(storage) or [0]
    if version < known[-1]:
        raise SnapshotNotFoundError(Problem.EXPIRED, storage.url, version, known[-1], known[0])
    raise SnapshotNotFoundError(Problem.NO_SNAPSHOT, storage.url, version, known[-1])


class Appendable(Protocol):
    """A `featurestore.store.Commit` as the log sees it, which `append` publishes."""

    commit_id: str

    def manifest_after(self, parent: Manifest) -> Manifest:
        """Return the next manifest; any error that it raises ends the commit."""
        ...


def append(storage: Storage, commit: Appendable) -> Manifest:
    """Put a commit onto the newest manifest, and again onto a newer one when another writer was first.

    The manifest is read back after success and after every error: what is in the log decides, not the answer. Raises
    CommitConflictError after hundreds of lost races, CorruptFileError where the newest manifest is damaged.
    """
    unsure: set[int] = set()  # versions that may be ours, though no answer and no reading said so
    failures = 0
    for attempt in range(_MAX_ATTEMPTS):
        parent = read_manifest(storage)
        for version in sorted(unsure):
            found = find(storage, version)
            if found is not None and _is_ours(storage, found, commit.commit_id):
                return found
        manifest = commit.manifest_after(parent)
        try:
            path = manifest_path(manifest.version)
            first = _checked(storage, path, manifest.version, create_sealed(storage, path, manifest))
            if _is_ours(storage, first, commit.commit_id):
                return first
        except StorageError:
            unsure.add(manifest.version)
            failures += 1
            if failures == _MAX_FAILURES:
                raise
        time.sleep(random.uniform(0, 0.002 * min(attempt + 1, 20)))
    raise CommitConflictError(Problem.OTHERS_COMMITTED_FIRST, _MAX_ATTEMPTS, storage.url)


def read(storage: Storage, version: int, folder: str = LOG) -> Manifest:
    """Read a manifest from a folder. Raises FileNotFoundError, CorruptFileError."""
    path = manifest_path(version, folder)
    return _checked(storage, path, version, read_sealed(storage, path, Manifest))


def find(storage: Storage, version: int, folders: Sequence[str] = (LOG, EXPIRED)) -> Manifest | None:
    """Read a manifest, also one that has just expired; None if it was removed."""
    for folder in folders:
        try:
            return read(storage, version, folder)
        except FileNotFoundError:
            continue
    return None


def _is_ours(storage: Storage, found: Manifest, commit_id: str) -> bool:
    """Return whether this is our commit, and the newest manifest comes after it or is it.

    Not so where its version was free only because the commit that had it has expired, or was moved away as damaged: it
    is taken away again. Raises StorageError where that cannot be found out.
    """
    if found.commit_id != commit_id:
        return False
    followed = is_followed(storage, found)
    if followed:
        return True
    # Snapshots go from the oldest on, except those kept by name: ours would have gone before its follower. A repair may
    # have moved a damaged follower away, whose files are then those of ours.
    if followed is None and any(map(storage.list, (PINS, CHANNELS, _DAMAGED))):
        path = storage.full(manifest_path(found.version))
        raise StorageError(Problem.UNKNOWN_IF_LOGGED, path)
    storage.delete(manifest_path(found.version))
    return False


def is_followed(storage: Storage, found: Manifest) -> bool | None:
    """Return whether a manifest is the newest, or the parent of the next one; None where the next one is gone.

    Raises CorruptFileError where the next one is damaged.
    """
    if versions(storage)[-1:] == [found.version]:
        return True
    follower = find(storage, found.version + 1)
    return None if follower is None else follower.parent == found.commit_id


def utc_text(time_s: float) -> str:
    """Format seconds since 1970."""
    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _newest(storage: Storage) -> Manifest:
    """Read the newest manifest, listed again while `expire` removes what it would read."""
    for _ in range(_MAX_LISTINGS):
        try:
            known = versions(storage)
            return read(storage, known[-1]) if known else EMPTY
        except FileNotFoundError:
            continue
    raise StorageError(Problem.LISTED_BUT_MISSING, "manifests", storage.url, _MAX_LISTINGS)


def _checked(storage: Storage, path: str, version: int, manifest: Manifest) -> Manifest:
    if manifest.version != version:
        raise CorruptFileError(Problem.ANOTHER_MANIFEST, storage.full(path), manifest.version)
    return manifest


def _is_stray(storage: Storage, found: Manifest) -> bool:
    """Return whether a manifest landed when its version had expired: the next one comes after another.

    Its writer takes it away, unless it was killed. Where the next one is damaged or gone, the manifest counts.
    """
    with contextlib.suppress(CorruptFileError):
        return is_followed(storage, found) is False
    return False
