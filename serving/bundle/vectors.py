"""Visual vectors of a bundle: its vectors store has the outputs of the networks E for each image, and its signature.

Letters of shapes: N keys, D columns of a row, V width of a visual vector, W words of a signature.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import CorruptFileError, StoreNotFoundError
from featurestore.keys import Int64Array, shard_of
from featurestore.lookup.hashedrows import Lookup
from featurestore.lookup.partition import FeaturePartition
from featurestore.snapshot import Snapshot
from featurestore.store import FeatureStore
from serving.bundle.manifest import VectorsOf
from serving.errors import BrokenBundleError
from trainer.engine.similarity import BITS, WORDS, Words

_BITS_OF_A_COLUMN = 16
SIGNATURE_COLUMNS = BITS // _BITS_OF_A_COLUMN
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]


class RowsByKey(Protocol):
    """The rows behind a table: a partition that is mapped into memory, or the snapshot itself."""

    @property
    def dim(self) -> int:
        """Numbers in a row."""
        ...

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        ...

    snapshot_version: int

    def lookup(self, keys_U: Int64Array) -> Lookup:
        """Return rows in the order asked, with zeros for missing keys, and a mask of the missing keys."""
        ...

    def close(self) -> None:
        """Release the rows."""
        ...


class VectorTable:
    """The vectors of one feature store's images at one snapshot of the vectors store. Lookups are thread-safe."""

    def __init__(self, of: VectorsOf, partition: RowsByKey, time_s: float) -> None:
        """Use `open` or `of_snapshot`."""
        self.manifest, self._partition = of, partition
        self.time_s = time_s
        """When the snapshot was committed, in seconds since 1970."""
        self.no_image: Mapping[str, Float32] = {
            each.name: np.asarray(each.no_image, np.float32) for each in of.networks
        }
        """By network: the vector for images without one, (V,)."""
        self._columns = {each.name: slice(each.start, each.start + each.width) for each in of.networks}
        self._no_image_D = np.zeros(partition.dim, np.float32)
        for name, columns in self._columns.items():
            self._no_image_D[columns] = self.no_image[name]

    @classmethod
    def open(cls, of: VectorsOf, url: str, version: int | None = None, cache_dir: Path | None = None) -> "VectorTable":
        """Map the rows of a snapshot, by default the newest, of the vectors store at `url` by a `FeaturePartition`.
        Raises BrokenBundleError if the store is damaged, missing or a different one; StorageError."""
        try:
            store = FeatureStore.open(url)
            if store.info.store_id != of.store_id:
                raise BrokenBundleError(f"{url} is not the vectors store that was exported, but one made later")
            width = max((each.start + each.width for each in of.networks), default=0)
            if store.info.dim != width + SIGNATURE_COLUMNS * of.signatures:
                raise BrokenBundleError(f"{url} has rows of {store.info.dim} numbers; the networks need {width}")
            snapshot = store.snapshot(version)
            partition = FeaturePartition.load(
                store, cache_dir=cache_dir, missing="zeros", threads=1, version=snapshot.version
            )
        except (CorruptFileError, StoreNotFoundError) as error:
            raise BrokenBundleError(str(error)) from error
        return cls(of, partition, snapshot.manifest.time_s)

    @classmethod
    def of_snapshot(cls, of: VectorsOf, snapshot: Snapshot) -> "VectorTable":
        """Read rows directly from the files of a snapshot, for a few lookups: nothing is copied or mapped."""
        return cls(of, _SnapshotRows(snapshot), snapshot.manifest.time_s)

    @property
    def snapshot(self) -> int:
        """Number of the vectors store's snapshot."""
        return self._partition.snapshot_version

    @property
    def num_images(self) -> int:
        """Images that have vectors."""
        return self._partition.num_rows

    def lookup(self, keys_N: Int64Array) -> tuple[Float32, Bool]:
        """Copy the rows of images, (N, D), and mark those without one, (N,), whose vector is `no_image`."""
        found = self._partition.lookup(keys_N)
        if found.missing_U.any():
            found.features_UD[found.missing_U] = self._no_image_D
        return found.features_UD, found.missing_U

    def of(self, network: str) -> slice:
        """Return the columns of a row with the visual vector of this E."""
        return self._columns[network]

    def words(self, rows_ND: Float32, missing_N: Bool) -> Words:
        """Return the signatures of rows from `lookup`, (N, W), for `trainer.engine.similarity.cosines`."""
        words_NW = np.zeros((len(rows_ND), WORDS), np.uint64)
        words_NW[:, :-1] = rows_ND[:, -SIGNATURE_COLUMNS:].astype("<u2").view(np.uint64)
        words_NW[:, -1] = ~missing_N
        return words_NW

    def close(self) -> None:
        """Release the mapped rows."""
        self._partition.close()


class _SnapshotRows:
    """The rows of a snapshot, read from its files at each lookup."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.snapshot_version = snapshot.version

    @property
    def dim(self) -> int:
        return self._snapshot.info.dim

    @property
    def num_rows(self) -> int:
        return self._snapshot.num_rows

    def lookup(self, keys_U: Int64Array) -> Lookup:
        features_UD = np.zeros((len(keys_U), self.dim), np.float32)
        found_U = np.zeros(len(keys_U), np.bool_)
        shard_U = shard_of(keys_U, self._snapshot.info.num_shards)
        for shard in np.unique(shard_U).tolist():
            here_U = shard_U == shard
            features_UD[here_U], found_U[here_U] = self._snapshot.shard_reader(shard).features(keys_U[here_U])
        return Lookup(features_UD, ~found_U)

    def close(self) -> None:
        """Do nothing, as nothing is open."""


def columns_of_signatures(bits_N64: NDArray[np.uint8]) -> Float32:
    """Return signatures as columns of rows, (N, 32): each number holds 16 bits, which float32 represents exactly."""
    return bits_N64.view("<u2").astype(np.float32)
