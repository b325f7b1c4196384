"""The log of manifests: creating the next one is the commit."""

import random
import re
import time
from collections.abc import Callable

from featurestore.errors import CommitConflictError, CorruptFileError, SnapshotNotFoundError, StorageError
from featurestore.spec import Manifest, seal, unseal
from featurestore.storage import Storage

LOG = "log"
_NAME = re.compile(r"(\d{20})\.json")
_MAX_ATTEMPTS = 300
_MAX_FAILURES = 5

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


def manifest_path(version: int) -> str:
    """Where the manifest of `version` stands, relative to the store."""
    return f"{LOG}/{version:020d}.json"


def versions(storage: Storage) -> list[int]:
    """Committed versions, ascending."""
    return [int(match[1]) for match in map(_NAME.fullmatch, storage.list(LOG)) if match]


def read_manifest(storage: Storage, version: int | None = None) -> Manifest:
    """The manifest of `version`, the newest by default; version 0 is the empty store. Raises SnapshotNotFoundError."""
    known = versions(storage) if version is None else []
    wanted = version if version is not None else (known[-1] if known else 0)
    if wanted == 0:
        return EMPTY
    try:
        return _read(storage, wanted)
    except FileNotFoundError:
        newest = (versions(storage) or [0])[-1]
        raise SnapshotNotFoundError(f"{storage.url} has no snapshot {wanted}; the newest is {newest}") from None


def publish(storage: Storage, commit_id: str, following: Callable[[Manifest], Manifest]) -> Manifest:
    """Commit `following(parent)` onto the newest manifest, and again onto a newer one when another writer was first.

    `following` gives the same `commit_id` each time. The manifest is read back after success and after every error:
    what stands in the log decides, not the answer. Raises CommitConflictError after hundreds of lost races.
    """
    first: int | None = None
    failures = 0
    for attempt in range(_MAX_ATTEMPTS):
        parent = read_manifest(storage)
        if first is None:
            first = parent.version + 1
        elif (found := _find(storage, commit_id, first, parent.version)) is not None:
            return found
        manifest = following(parent)
        try:
            if _create_and_read_back(storage, manifest).commit_id == commit_id:
                return manifest
        except StorageError:
            failures += 1
            if failures == _MAX_FAILURES:
                raise
        time.sleep(random.uniform(0, 0.002 * min(attempt + 1, 20)))
    raise CommitConflictError(
        f"other writers were first {_MAX_ATTEMPTS} times in a row at {storage.url}: retry, or commit less often"
    )


def _create_and_read_back(storage: Storage, manifest: Manifest) -> Manifest:
    """The manifest that stands under the version, ours or that of the writer who was first. Raises StorageError."""
    path = manifest_path(manifest.version)
    failure: StorageError | None = None
    try:
        storage.create_exclusive(path, seal(manifest))
    except StorageError as error:  # the answer may have been lost: the file is looked for all the same
        failure = error
    try:
        return _read(storage, manifest.version)
    except FileNotFoundError:
        raise failure or StorageError(f"{storage.full(path)} vanished after it was created") from failure


def _read(storage: Storage, version: int) -> Manifest:
    path = manifest_path(version)
    manifest = unseal(storage.read_bytes(path), Manifest, storage.full(path))
    if manifest.version != version:
        raise CorruptFileError(f"{storage.full(path)} is the manifest of version {manifest.version}")
    return manifest


def _find(storage: Storage, commit_id: str, first: int, last: int) -> Manifest | None:
    """Our own commit among the versions that appeared since we began: its answer may have been lost."""
    for version in range(first, last + 1):
        manifest = _read(storage, version)
        if manifest.commit_id == commit_id:
            return manifest
    return None
