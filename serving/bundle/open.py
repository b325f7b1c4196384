"""An open version of a bundle: all files of a scorer, verified, with ID rows and vectors mapped into memory."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from featurestore.errors import FeatureStoreError, StorageError
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from serving.bundle.idrows import BundleIdRows
from serving.bundle.log import read_version
from serving.bundle.manifest import TRAINED, BundleManifest
from serving.bundle.vectors import VectorTable
from serving.bundle.version import ModelVersion
from serving.errors import BrokenBundleError
from serving.network.exporting import PORTABLE
from serving.network.machine import compiled_name
from serving.network.served import ServedNetwork


@dataclass(frozen=True)
class BundleIdentity:
    """A bundle's version, and the snapshot of each vectors store by the name of its feature store."""

    version: int
    vectors: Mapping[str, int]

    @classmethod
    def newest(cls, url: str) -> "BundleIdentity":
        """Look up the version in use of the bundle at `url`, and its newest vectors; a few small reads.

        Raises BundleNotFoundError, BrokenBundleError, StorageError."""
        storage = Storage(url)
        return cls.of(storage, read_version(storage))

    @classmethod
    def of(cls, storage: Storage, manifest: BundleManifest) -> "BundleIdentity":
        """Look up the newest vectors of a version. Raises BrokenBundleError, StorageError."""
        try:
            urls = {of.store: storage.full(f"{manifest.folder}/{of.folder}") for of in manifest.vectors}
            return cls(
                manifest.version, {name: FeatureStore.open(url).snapshot().version for name, url in urls.items()}
            )
        except StorageError:
            raise
        except FeatureStoreError as error:
            raise BrokenBundleError(str(error)) from error


class Bundle(ModelVersion):
    """One version of a bundle with one snapshot of each of its vectors stores; close it.

    Everything is read-only and thread-safe; workers on one machine share the mapped memory, which is released with the
    last array that uses it.
    """

    def __init__(self, storage: Storage, manifest: BundleManifest, cache_dir: Path | None, verify: bool) -> None:
        """Use `open` instead; a new object has no vectors until `with_vectors`."""
        super().__init__(storage, manifest, cache_dir, verify)
        self.ids = self._ids()
        self.vectors: Mapping[str, VectorTable] = {}
        """By the name of their feature store."""

    @classmethod
    def open(
        cls,
        url: str,
        version: int | None = None,
        *,
        vectors: Mapping[str, int] | None = None,
        cache_dir: str | Path | None = None,
        verify: bool = True,
    ) -> Self:
        """Open a version, by default the one in use, with these snapshots of its vectors, by default the newest.

        Files of an object store are copied to `cache_dir` first, and rows of vectors are decoded there. With `verify`
        each file is read once and its digest compared. Raises BundleNotFoundError, SnapshotNotFoundError, StorageError,
        and BrokenBundleError, which names the missing or changed file."""
        bundle = super().open(url, version, cache_dir=cache_dir, verify=verify)
        return bundle.with_vectors(vectors)

    @property
    def identity(self) -> BundleIdentity:
        """The version, and the snapshots of the vectors that are open."""
        return BundleIdentity(self.manifest.version, {name: table.snapshot for name, table in self.vectors.items()})

    @cached_property
    def network(self) -> ServedNetwork:
        """The network, verified and loaded at the first access, in about two seconds. Raises BrokenBundleError.

        Uses code compiled for this machine if the version has it."""
        portable = self.files.path(PORTABLE)
        if self.manifest.file(compiled_name()) is not None:
            self.files.path(compiled_name())
        return ServedNetwork.load(portable.parent)

    def with_vectors(self, snapshots: Mapping[str, int] | None = None) -> Self:
        """Open these snapshots of the vectors, by default the newest, with the same ID rows and network.

        Either bundle may be closed while the other is used. Raises the same errors as `open`."""
        chosen = snapshots or {}
        other, cache_dir = copy.copy(self), self.cache_dir / "vectors" if self.cache_dir else None
        opened: dict[str, VectorTable] = {}
        try:
            for of in self.manifest.vectors:
                url = self.vectors_url(of)
                opened[of.store] = VectorTable.open(of, url, chosen.get(of.store), cache_dir=cache_dir)
        except BaseException:
            for table in opened.values():
                table.close()
            raise
        other.vectors = opened
        return other

    def close(self) -> None:
        """Release the vectors; ID rows are released with the last bundle that uses them."""
        for table in self.vectors.values():
            table.close()

    def _ids(self) -> BundleIdRows:
        names = {each.name for each in self.manifest.rows}
        names |= {each.hashes for each in self.manifest.tables if each.hashes is not None}
        paths = {name: self.files.path(name) for name in names}
        return BundleIdRows(
            self.manifest.tables, self.manifest.rows, self.manifest.id_dtype, paths, self.files.path(TRAINED)
        )
