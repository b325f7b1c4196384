"""What is published at an address: the versions, when each was put in use, and the vectors of each as they are now."""

from collections.abc import Iterator
from dataclasses import dataclass

from featurestore.errors import FeatureStoreError, StorageError
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from serving.bundle.log import choices, known_versions, read_version, version_in_use
from serving.bundle.manifest import BundleManifest
from serving.errors import BrokenBundleError


@dataclass(frozen=True)
class ListedVersion:
    """A version of a model; `manifest` is None if it is damaged."""

    version: int
    manifest: BundleManifest | None
    in_use: bool
    chosen_s: tuple[float, ...]
    """When it was put in use, in seconds since 1970."""


def list_versions(storage: Storage, last: int | None = None) -> list[ListedVersion]:
    """List the last published versions, by default all, newest first.

    Raises BundleNotFoundError if there is none, and BrokenBundleError if a choice is damaged.
    """
    known = known_versions(storage)
    if not known:
        read_version(storage)  # says what is wrong
    in_use, chosen = version_in_use(storage), choices(storage)
    return [
        ListedVersion(
            version,
            _readable(storage, version),
            version == in_use,
            tuple(each.time_s for each in chosen if each.version == version),
        )
        for version in known[::-1][:last]
    ]


def _readable(storage: Storage, version: int) -> BundleManifest | None:
    try:
        return read_version(storage, version)
    except BrokenBundleError:
        return None


@dataclass(frozen=True)
class NewestVectors:
    """The newest vectors of a feature store's images in a version."""

    snapshot: int
    images: int
    bytes: int
    committed_s: float
    source: str
    """Address of the feature store, and its snapshot that they were computed from."""
    source_version: int


def newest_vectors(storage: Storage, manifest: BundleManifest) -> Iterator[tuple[str, NewestVectors | None]]:
    """Yield the name of each feature store with the version's vectors of it; None if they are damaged.

    Raises StorageError.
    """
    for of in manifest.vectors:
        try:
            snapshot = FeatureStore.open(storage.full(f"{manifest.folder}/{of.folder}")).snapshot()
            source, found = snapshot.manifest.mirrors or of.source, snapshot.manifest
            yield (
                of.store,
                NewestVectors(
                    snapshot.version, snapshot.num_rows, found.file_bytes, found.time_s, source.url, source.version
                ),
            )
        except StorageError:
            raise
        except FeatureStoreError:
            yield of.store, None
