"""Publish files as the next version of an address, and remove what has been replaced for long enough."""

import contextlib
import itertools
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from featurestore.errors import CommitConflictError
from featurestore.log import manifest_path, versions, writer_name
from featurestore.published.files import FILES, VERSIONS, PublishedFile, PublishedVersion, read_version
from featurestore.spec import seal
from featurestore.storage.storage import Storage

_MAX_ATTEMPTS = 300
_OURS = re.compile(FILES + r"/[^/]*-[0-9a-f]{32}(\.[^/.]*)?")


def upload(storage: Storage, file: Path, name: str) -> PublishedFile:
    """Write a file of this machine to a place of its own, where nobody sees it until a version names it.

    Holds its bytes in memory on the way to an object store."""
    last = PurePosixPath(name)
    place, data = f"{FILES}/{last.stem}-{uuid.uuid4().hex}{last.suffix}", file.read_bytes()
    storage.write_bytes(place, data)
    return PublishedFile(path=place, size_bytes=len(data))


def publish(
    storage: Storage, files: Mapping[str, PublishedFile], after: int | None = None, publication: str | None = None
) -> PublishedVersion:
    """Create the next version, of these files by name, all of which have to be there already.

    `after`: the version that it was made from, 0 where there was none: where another one is the newest by then,
    CommitConflictError is raised. None: it needs none, and becomes the newest. `publication`: by which the caller knows
    it again where an answer is lost; by default one that is drawn. Killed at any moment, it is published
    or not. Raises CommitConflictError also for a file that is gone, StorageError: then nobody knows whether it was
    published.
    """
    _check_there(storage, files)
    for _ in range(_MAX_ATTEMPTS):
        newest = max(versions(storage, VERSIONS), default=0)
        if after is not None and newest != after:
            break
        mine = PublishedVersion(
            version=newest + 1,
            publication=publication or uuid.uuid4().hex,
            writer=writer_name(),
            time_s=time.time(),
            files=dict(sorted(files.items())),
        )
        data = seal(mine)
        if storage.create_or_read(manifest_path(mine.version, VERSIONS), data) == data:
            return mine
    raise CommitConflictError(f"{storage.url} was published by another writer meanwhile; run it again")


def expire(storage: Storage, keep_s: float) -> list[str]:
    """Remove versions that were replaced longer than `keep_s` ago, and files that no version names and that are as old.

    Those that a killed writer left are among these. The newest version stays, and whatever was at the address before
    there were versions. Ages are by the storage's clock. Returns the paths that were removed, versions first.
    """
    since_s = storage.now() - keep_s
    published = [each for each in storage.entries(VERSIONS, recursive=False) if each.path in _paths(storage)]
    old = [each.path for each, after in itertools.pairwise(published) if after.mtime_s < since_s]
    storage.delete_files(old)
    named: set[str] = set()
    for version in versions(storage, VERSIONS):
        with contextlib.suppress(FileNotFoundError):  # another expiry is at work
            named |= {file.path for file in read_version(storage, version).files.values()}
    unnamed = [
        each.path
        for each in storage.entries(FILES, recursive=False)
        if each.path not in named and each.mtime_s < since_s and _OURS.fullmatch(each.path)
    ]
    storage.delete_files(unnamed)
    return [*old, *unnamed]


def _paths(storage: Storage) -> set[str]:
    return {manifest_path(version, VERSIONS) for version in versions(storage, VERSIONS)}


def missing(storage: Storage, files: Iterable[PublishedFile]) -> list[str]:
    """List the places of files that are not there, sorted. Raises StorageError."""
    places = {file.path for file in files}
    folders = {place.rpartition("/")[0] for place in places}
    found = {each.path for folder in folders for each in storage.entries(folder, recursive=False)}
    return sorted(places - found)


def _check_there(storage: Storage, files: Mapping[str, PublishedFile]) -> None:
    if gone := missing(storage, files.values()):
        raise CommitConflictError(f"{storage.full(gone[0])} was removed before it was published; run it again")
