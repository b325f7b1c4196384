"""Verification of the files of a version against its manifest, without opening it."""

from collections.abc import Iterator

from featurestore.errors import CorruptFileError, FeatureStoreError, StorageError
from featurestore.format.shard import check_digest
from featurestore.storage.storage import Storage
from featurestore.storage.threads import Progress
from featurestore.store import FeatureStore
from serving.bundle.files import check_file
from serving.bundle.manifest import BundleManifest, VectorsOf
from serving.errors import BrokenBundleError


def find_damage(
    storage: Storage, manifest: BundleManifest, *, digests: bool = False, progress: Progress | None = None
) -> list[str]:
    """List the damaged or missing files of a version, one line each.

    Checks the size of each file, also of those of the newest snapshots of its vectors. With `digests` reads all files
    and compares their content as well. Raises StorageError."""
    found: list[str] = []
    num_all = len(manifest.files) + len(manifest.vectors)
    for number, file in enumerate(manifest.files, start=1):
        try:
            check_file(storage, manifest, file, digests)
        except BrokenBundleError as error:
            found.append(str(error))
        if progress is not None:
            progress(number, num_all)
    for number, of in enumerate(manifest.vectors, start=1 + len(manifest.files)):
        found += _of_vectors(storage.full(f"{manifest.folder}/{of.folder}"), of, digests)
        if progress is not None:
            progress(number, num_all)
    return found


def _of_vectors(url: str, of: VectorsOf, digests: bool) -> Iterator[str]:
    try:
        store = FeatureStore.open(url)
        snapshot = store.snapshot()
    except StorageError:
        raise
    except FeatureStoreError as error:
        yield str(error)
        return
    if store.info.store_id != of.store_id:
        yield f"{url} is not the vectors store that was exported, but one made later"
    if snapshot.version == 0:
        yield f"{url} has no snapshot: the files of its log are missing"
    for entry in snapshot.manifest.entries:
        try:
            size_bytes = store.storage.size(entry.path)
            if size_bytes != entry.bytes:
                yield f"{store.storage.full(entry.path)} has {size_bytes:,} bytes instead of {entry.bytes:,}"
            elif digests:
                check_digest(store.storage, entry.path, entry.bytes, "sha256", entry.sha256)
        except FileNotFoundError:
            yield f"{store.storage.full(entry.path)} is missing"
        except CorruptFileError as error:
            yield str(error)
