"""A published model's versions, when each was in use, and the age of its vectors."""

from dataclasses import dataclass

from featurestore.errors import FeatureStoreError
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from serving.bundle.log import choices, known_versions, read_version, version_in_use
from serving.bundle.manifest import BundleManifest
from serving.errors import BrokenBundleError

_MOST_VERSIONS = 50


@dataclass(frozen=True)
class PublishedVectors:
    """The newest vectors of a feature store's images in a version."""

    store: str
    snapshot: int
    committed_s: float
    num_images: int
    source: str
    source_version: int
    """The snapshot of the feature store that they were computed from."""
    newest_source: int | None
    """The newest snapshot of that store; None if it cannot be read."""


@dataclass(frozen=True)
class ListedVersion:
    """A version of the model; `manifest` is None if it is damaged."""

    version: int
    manifest: BundleManifest | None
    in_use: bool
    chosen_s: tuple[float, ...]
    """When it was put in use."""


@dataclass(frozen=True)
class PublishedModel:
    """A model's versions, the newest first, and the vectors of the one in use."""

    url: str
    versions: tuple[ListedVersion, ...]
    num_versions: int
    in_use: BundleManifest
    vectors: tuple[PublishedVectors, ...]


def read_model(url: str) -> PublishedModel:
    """Read the published versions at an address; a few small files. Raises ServingError, StorageError."""
    storage = Storage(url)
    known, chosen, in_use = known_versions(storage), choices(storage), version_in_use(storage)
    manifest = read_version(storage)
    versions = tuple(
        ListedVersion(
            version,
            _readable(storage, version),
            version == in_use,
            tuple(each.time_s for each in chosen if each.version == version),
        )
        for version in known[::-1][:_MOST_VERSIONS]
    )
    return PublishedModel(storage.url, versions, len(known), manifest, tuple(_vectors(storage, manifest)))


def _vectors(storage: Storage, manifest: BundleManifest) -> list[PublishedVectors]:
    found = []
    for of in manifest.vectors:
        snapshot = FeatureStore.open(storage.full(f"{manifest.folder}/{of.folder}")).snapshot()
        source = snapshot.manifest.mirrors or of.source
        found.append(
            PublishedVectors(
                store=of.store,
                snapshot=snapshot.version,
                committed_s=snapshot.manifest.time_s,
                num_images=snapshot.num_rows,
                source=source.url,
                source_version=source.version,
                newest_source=_newest(source.url),
            )
        )
    return found


def _newest(url: str) -> int | None:
    try:
        return FeatureStore.open(url).snapshot().version
    except FeatureStoreError:
        return None


def _readable(storage: Storage, version: int) -> BundleManifest | None:
    try:
        return read_version(storage, version)
    except BrokenBundleError:
        return None
