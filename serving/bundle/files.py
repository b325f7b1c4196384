"""Files of a version: written with their digests and read back; verified when they are opened."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from featurestore.errors import CorruptFileError, FeatureStoreError, SnapshotNotFoundError, StorageError
from featurestore.format.shard import HashedOutput, check_digest
from featurestore.lookup.cache import default_cache_dir
from featurestore.spec import FileEntry, SourceSnapshot, is_random_id
from featurestore.storage.local import claim
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore, Snapshot
from serving.bundle.manifest import BundleFile, BundleManifest, VectorsOf
from serving.errors import BrokenBundleError
from serving.problems import Problem

_CHUNK_BYTES = 8 << 20
_UNUSED_S = 30 * 24 * 3600.0


class WrittenFiles:
    """The files that an export has written so far into the folder of its version."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self.storage, self.folder = storage, folder
        self.files: list[BundleFile] = []

    @contextlib.contextmanager
    def output(self, name: str) -> Iterator[Any]:
        """Open a file for writing; at the end of the block it gets its final name, is read back and compared.

        Streams to a disk; buffers the whole file in memory for an object store. Raises StorageError, and
        CorruptFileError if the storage returns other bytes."""
        path = f"{self.folder}/{name}"
        with self.storage.open_output(path) as file:
            hashed = HashedOutput(file)
            yield hashed
        digest = hashed.sha256.hexdigest()
        check_digest(self.storage, path, hashed.size_bytes, "sha256", digest)
        self.files.append(BundleFile(name=name, bytes=hashed.size_bytes, sha256=digest))

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self.output(name) as file:
            file.write(data)


def check_file(storage: Storage, path: str, file: BundleFile | FileEntry, verify: bool) -> None:
    """Compare the size of a file in the storage, and with `verify` its content, with what a manifest says.

    Raises BrokenBundleError, StorageError."""
    try:
        size_bytes = storage.size(path)
        if size_bytes != file.bytes:
            raise BrokenBundleError(Problem.OTHER_SIZE, storage.full(path), size_bytes, file.bytes)
        if verify:
            check_digest(storage, path, file.bytes, "sha256", file.sha256)
    except FileNotFoundError as error:
        raise BrokenBundleError(Problem.MISSING, storage.full(path)) from error
    except CorruptFileError as error:
        raise BrokenBundleError(*error.args) from error


class LocalFiles:
    """The files of a version on this machine's disk: the originals, or local copies from an object store.

    Before a file is opened, its size and digest are compared with the manifest. Copies are in a folder that this user
    alone may open, as compiled networks are programs; those of versions not opened for 30 days are removed.
    """

    def __init__(self, storage: Storage, manifest: BundleManifest, cache_dir: Path | None) -> None:
        self._storage, self._manifest = storage, manifest
        if storage.is_local:
            self._folder = Path(storage.url, manifest.folder)
        else:
            cache = cache_dir or default_cache_dir().parent / "bundles"
            self._folder = cache / manifest.bundle_id
            claim(self._folder)
            os.utime(self._folder)
            for folder in cache.iterdir():  # processes that have mapped copies keep their mappings
                with contextlib.suppress(OSError):  # another process removed it first
                    if is_random_id(folder.name) and time.time() - folder.stat().st_mtime > _UNUSED_S:
                        shutil.rmtree(folder)

    def path(self, name: str) -> Path:
        """Return the file's local path; copies it first if needed. Raises BrokenBundleError, StorageError."""
        file = self._manifest.file(name)
        if file is None:
            raise BrokenBundleError(Problem.NO_FILE, self._manifest.version, self._storage.url, name)
        place = self._folder / name
        if self._storage.is_local:
            check_file(self._storage, f"{self._manifest.folder}/{name}", file, verify=True)
            return place
        try:
            check_file(Storage(place.parent), place.name, file, verify=True)
        except (BrokenBundleError, StorageError):  # no earlier fetch has left the complete file
            self._fetch(file)
        return place

    def _fetch(self, file: BundleFile) -> None:
        """Copy a file from the object store; it gets its final name after its digest was checked."""
        source = f"{self._manifest.folder}/{file.name}"
        try:
            with self._storage.open_input(source) as reader, Storage(self._folder).open_output(file.name) as writer:
                copied = HashedOutput(writer)
                shutil.copyfileobj(reader, copied, _CHUNK_BYTES)
                if copied.sha256.hexdigest() != file.sha256:
                    raise BrokenBundleError(Problem.OTHER_DIGEST, self._storage.full(source))
        except FileNotFoundError as error:
            raise BrokenBundleError(Problem.MISSING, self._storage.full(source)) from error


class Vectors(NamedTuple):
    """The vectors of a feature store's images in a version."""

    snapshot: Snapshot
    source: SourceSnapshot
    """The snapshot of features that they are computed from."""


def open_vectors(storage: Storage, manifest: BundleManifest, of: VectorsOf, version: int | None = None) -> Vectors:
    """Open a snapshot of a vectors store, by default the newest.

    Raises BrokenBundleError if the store is damaged, missing or another one; SnapshotNotFoundError, StorageError.
    """
    url = storage.full(f"{manifest.folder}/{of.folder}")
    try:
        store = FeatureStore.open(url)
        snapshot = store.snapshot(version)
    except (StorageError, SnapshotNotFoundError):
        raise
    except FeatureStoreError as error:
        raise BrokenBundleError(*error.args) from error
    if store.info.store_id != of.store_id:
        raise BrokenBundleError(Problem.OTHER_VECTORS, url)
    if snapshot.manifest.mirrors is None:
        raise BrokenBundleError(Problem.NO_SNAPSHOT, url)
    return Vectors(snapshot, snapshot.manifest.mirrors)


def newest_vectors(storage: Storage, manifest: BundleManifest) -> dict[str, Vectors | None]:
    """Open a version's newest vectors by the name of their feature store; None if they are damaged.

    Raises StorageError.
    """
    found: dict[str, Vectors | None] = {}
    for of in manifest.vectors:
        found[of.store] = None
        with contextlib.suppress(BrokenBundleError):
            found[of.store] = open_vectors(storage, manifest, of)
    return found


def find_damage(storage: Storage, manifest: BundleManifest) -> list[str]:
    """List the missing files of a version and those of another size, one line each.

    Looks also at those of the newest snapshots of its vectors. Raises StorageError."""
    found: list[str] = []
    files: list[tuple[Storage, str, BundleFile | FileEntry]]
    files = [(storage, f"{manifest.folder}/{file.name}", file) for file in manifest.files]
    for of in manifest.vectors:
        try:
            snapshot, _ = open_vectors(storage, manifest, of)
            files += [(snapshot.storage, entry.path, entry) for entry in snapshot.manifest.entries]
        except BrokenBundleError as error:
            found.append(str(error))
    for place, path, file in files:
        try:
            check_file(place, path, file, verify=False)
        except BrokenBundleError as error:
            found.append(str(error))
    return found
