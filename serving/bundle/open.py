"""A version of a bundle, open: all that a scorer needs, verified, its rows mapped into memory."""

import copy
from collections.abc import Mapping
from pathlib import Path

from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from serving.bundle.idrows import IdRows
from serving.bundle.manifest import TRAINED, BundleManifest
from serving.bundle.vectors import VectorTable
from serving.bundle.version import ModelVersion


class Bundle(ModelVersion):
    """One version of a bundle with one snapshot of each of its vectors stores; close it.

    Everything is read-only, and may be used in several threads; workers on one machine share what is mapped. It is
    released when the last array that looks into it is gone.
    """

    def __init__(self, storage: Storage, manifest: BundleManifest, cache_dir: Path | None, verify: bool) -> None:
        super().__init__(storage, manifest, cache_dir, verify)
        self.ids = self._ids()
        self.vectors: Mapping[str, VectorTable] = self._newest_vectors()
        """By the name of their feature store; at the newest snapshots when it was opened."""

    @property
    def identity(self) -> dict[str, int]:
        """The version, and the snapshot of each vectors store by the name of its feature store."""
        return {"version": self.manifest.version, **self._snapshots()}

    def newest_snapshots(self) -> dict[str, int]:
        """Look up the newest snapshot of each vectors store: a small request each. Raises FeatureStoreError."""
        return {of.store: FeatureStore.open(self.vectors_url(of)).snapshot().version for of in self.manifest.vectors}

    def with_newest_vectors(self) -> "Bundle":
        """Open the newest vectors beside these, with the same ID rows and network; itself where nothing is newer.

        Either may be closed while the other is used. Raises as `open`."""
        if self.newest_snapshots() == self._snapshots():
            return self
        newer = copy.copy(self)
        newer.vectors = self._newest_vectors()
        return newer

    def close(self) -> None:
        """Let go of the vectors; ID rows go with the last bundle that has them."""
        for table in self.vectors.values():
            table.close()

    def _snapshots(self) -> dict[str, int]:
        return {name: table.snapshot for name, table in self.vectors.items()}

    def _newest_vectors(self) -> dict[str, VectorTable]:
        cache_dir = self.cache_dir / "vectors" if self.cache_dir else None
        opened: dict[str, VectorTable] = {}
        try:
            for of in self.manifest.vectors:
                opened[of.store] = VectorTable.open(of, self.vectors_url(of), cache_dir=cache_dir)
        except BaseException:
            for table in opened.values():
                table.close()
            raise
        return opened

    def _ids(self) -> IdRows:
        names = {each.name for each in self.manifest.rows}
        names |= {each.hashes for each in self.manifest.tables if each.hashes is not None}
        paths = {name: self.files.path(name) for name in names}
        return IdRows(self.manifest.tables, self.manifest.rows, self.manifest.id_dtype, paths, self.files.path(TRAINED))
