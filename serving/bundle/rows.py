"""Rows that a scorer looks up in a bundle, memory-mapped: ID rows, and the visual vectors of images.

Letters of shapes: N ids or keys, T consecutive ranges of ids of one table each, R rows of a file, V numbers in an ID
row or visual vector.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import CorruptFileError, StoreNotFoundError
from featurestore.keys import HashIndex, Int64Array, UInt64Array, shard_of_hash, splitmix64
from featurestore.lookup.partition import FeaturePartition
from featurestore.store import FeatureStore
from serving.bundle import RowDType
from serving.bundle.manifest import RowsFile, TableRows, VectorsOf
from serving.errors import BrokenBundleError

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
FindRows = Callable[[Int64Array], Int64Array]


class BundleIdRows:
    """The ID rows of all tables of a bundle. Thread-safe."""

    def __init__(
        self,
        tables: Sequence[TableRows],
        rows: Sequence[RowsFile],
        dtype: RowDType,
        paths: dict[str, Path],
        trained: Path,
    ) -> None:
        """`paths`: the files that `tables` and `rows` name; `trained`: the file with one bit for each row."""
        self._rows = {each.width: map_rows(paths[each.name], each, dtype) for each in rows}
        self._trained = _mapped(trained, np.dtype(np.uint8))
        self._number = {table.name: number for number, table in enumerate(tables)}
        self._tables = tables
        self._finders = [_finder(table, paths) for table in tables]
        first_bit = {each.width: each.first_bit for each in rows}
        self._first_bit_T = np.array([first_bit[table.width] for table in tables], np.int64)

    def find(self, table: str, ids_N: Int64Array) -> tuple[Int64Array, Bool]:
        """Find the row of each id in the file of its table's width, (N,), and whether training has touched it, (N,).

        An id without a row in an exact table gets the cold row of its shard and counts as unknown. In a hashed table an
        id counts as known if it, or another id with the same row, was in training.
        """
        return self.bulk_finder([table]).find(ids_N, np.array([len(ids_N)]))

    def bulk_finder(self, tables: Sequence[str]) -> "BulkFinder":
        """Return a finder for ids of several tables, always in this order."""
        numbers = [self._number[table] for table in tables]
        return BulkFinder(
            [self._tables[number] for number in numbers],
            [self._finders[number] for number in numbers],
            self._first_bit_T[numbers],
            self._known,
        )

    def gather(self, width: int, rows_N: Int64Array) -> Float32:
        """Copy rows of the tables with this width, (N, width) float32."""
        return self._rows[width].take(rows_N, axis=0).astype(np.float32, copy=False)

    def _known(self, bit_N: Int64Array) -> Bool:
        known_N: Bool = (self._trained.take(bit_N >> 3) >> (bit_N & 7).astype(np.uint8) & 1).astype(np.bool_)
        return known_N


class BulkFinder:
    """Finds the rows of ids of several tables at once, faster than one by one if tables are many and ids few."""

    def __init__(
        self,
        tables: Sequence[TableRows],
        finders: Sequence[FindRows],
        first_bit_T: Int64Array,
        known: Callable[[Int64Array], Bool],
    ) -> None:
        """Use `BundleIdRows.bulk_finder`."""
        self._finders, self._first_bit_T, self._is_known = finders, first_bit_T, known
        shards = {table.num_shards if table.kind == "hashed" else None for table in tables}
        self._num_shards = shards.pop() if len(shards) == 1 else None
        """The same for all tables, if all are hashed."""
        self._first_row_T = np.array([table.first_row for table in tables], np.int64)
        self._rows_per_shard_T = np.array([table.rows_per_shard for table in tables], np.uint32)

    def find(self, ids_N: Int64Array, lengths_T: Int64Array) -> tuple[Int64Array, Bool]:
        """Find rows as `BundleIdRows.find` does; the first `lengths_T[0]` ids belong to the first table, and so on."""
        if self._num_shards is not None:
            hash_N = splitmix64(ids_N)
            shard_N = shard_of_hash(hash_N, self._num_shards)
            rows_N = _hashed_row(hash_N, shard_N, np.repeat(self._rows_per_shard_T, lengths_T))
            rows_N += np.repeat(self._first_row_T, lengths_T)
        else:
            ends_T = np.cumsum(lengths_T)
            rows_N = np.empty(len(ids_N), np.int64)
            for finder, start, end in zip(self._finders, ends_T - lengths_T, ends_T, strict=True):
                rows_N[start:end] = finder(ids_N[start:end])
        return rows_N, self._is_known(rows_N + np.repeat(self._first_bit_T, lengths_T))


def _finder(table: TableRows, paths: Mapping[str, Path]) -> FindRows:
    """Return a function that finds the rows of ids in one table, by its kind (serving/bundle/manifest.py)."""

    def hashed(ids_N: Int64Array) -> Int64Array:
        hash_N = splitmix64(ids_N)
        shard_N = shard_of_hash(hash_N, table.num_shards)
        return _hashed_row(hash_N, shard_N, np.uint32(table.rows_per_shard)) + table.first_row

    def direct(ids_N: Int64Array) -> Int64Array:
        shard_N, row_N = ids_N % table.num_shards, ids_N // table.num_shards
        rows_N: Int64Array = shard_N * table.rows_per_shard + row_N + table.first_row
        return rows_N

    if table.hashes is not None:
        return _exact_finder(table, paths[table.hashes])
    return direct if table.kind == "direct" else hashed


def _exact_finder(table: TableRows, hashes: Path) -> FindRows:
    """Return a finder in a table with rows for a list of ids, and a cold row in each shard for all others."""
    hash_M: UInt64Array = _mapped(hashes, np.dtype("<u8"))
    shards = np.arange(table.num_shards)
    start_S = np.searchsorted(shard_of_hash(hash_M, table.num_shards), np.append(shards, table.num_shards))
    cold_S = start_S[:-1] + shards + table.first_row
    parts = [hash_M[start:end] for start, end in itertools.pairwise(start_S.tolist())]
    index = HashIndex(range(table.num_shards), parts, table.num_shards)

    def exact(ids_N: Int64Array) -> Int64Array:
        hash_N = splitmix64(ids_N)
        shard_N = shard_of_hash(hash_N, table.num_shards)
        if not len(index):
            return cold_S[shard_N]
        place_N = index.places(hash_N, shard_N)
        own_N = place_N + shard_N + 1 + table.first_row  # each shard begins with its cold row
        return np.where(index.hash_M[place_N] == hash_N, own_N, cold_S[shard_N])

    return exact


def row_type(dtype: RowDType) -> np.dtype[np.generic]:
    """Return the numpy type of a row's numbers."""
    return np.dtype({"float32": "<f4", "float16": "<f2"}[dtype])


def map_rows(path: Path, file: RowsFile, dtype: RowDType) -> NDArray[np.generic]:
    """Map a file of rows into memory, read-only."""
    return _mapped(path, row_type(dtype)).reshape(file.num_rows, file.width)


def _hashed_row(hash_N: UInt64Array, shard_N: Int64Array, rows_per_shard: NDArray[np.uint32] | np.uint32) -> Int64Array:
    """The row in its table that a hash chooses, as `trainer.ids.shards.TableShape`: top bits the shard, low the row."""
    row_N = hash_N.astype(np.uint32) % rows_per_shard  # the low 32 bits; a third of the time of 64
    rows_N: Int64Array = shard_N * rows_per_shard + row_N
    return rows_N


def _mapped(path: Path, dtype: np.dtype[np.generic]) -> NDArray[Any]:
    """Map a whole file, read-only; handles empty files, which cannot be mapped."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


class VectorTable:
    """The vectors of one feature store's images at one snapshot of the vectors store. Lookups are thread-safe."""

    def __init__(self, of: VectorsOf, partition: FeaturePartition, time_s: float) -> None:
        """Use `open`."""
        self._partition = partition
        self.time_s = time_s
        """When the snapshot was committed, in seconds since 1970."""
        self.no_image_V: Float32 = np.asarray(of.no_image, np.float32)
        """The vector for images without one."""

    @classmethod
    def open(cls, of: VectorsOf, url: str, version: int | None = None, cache_dir: Path | None = None) -> "VectorTable":
        """Map the rows of a snapshot, by default the newest, of the vectors store at `url` by a `FeaturePartition`.
        Raises BrokenBundleError if the store is damaged, missing or a different one; StorageError."""
        try:
            store = FeatureStore.open(url)
            if store.info.store_id != of.store_id:
                raise BrokenBundleError(f"{url} is not the vectors store that was exported, but one made later")
            if store.info.dim != len(of.no_image):
                raise BrokenBundleError(f"{url} has rows of {store.info.dim} numbers, and E makes {len(of.no_image)}")
            snapshot = store.snapshot(version)
            partition = FeaturePartition.load(
                store, cache_dir=cache_dir, missing="zeros", threads=1, version=snapshot.version
            )
        except (CorruptFileError, StoreNotFoundError) as error:
            raise BrokenBundleError(str(error)) from error
        return cls(of, partition, snapshot.manifest.time_s)

    @property
    def snapshot(self) -> int:
        """Number of the vectors store's snapshot."""
        return self._partition.snapshot_version

    def lookup(self, keys_N: Int64Array) -> tuple[Float32, Bool]:
        """Copy the vectors of images, (N, V), and mark those without one, (N,), whose vector is `no_image_V`."""
        found = self._partition.lookup(keys_N)
        if found.missing_U.any():
            found.features_UD[found.missing_U] = self.no_image_V
        return found.features_UD, found.missing_U

    def close(self) -> None:
        """Release the mapped rows."""
        self._partition.close()
