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

from featurestore.errors import CorruptFileError
from featurestore.keys import HashIndex, Int64Array, UInt64Array, shard_of_hash, splitmix64
from featurestore.lookup.partition import FeaturePartition
from featurestore.store import FeatureStore, Snapshot
from serving.bundle.manifest import RowsFile, TableRows, VectorsOf
from serving.errors import BrokenBundleError
from serving.problems import Problem
from trainer.ids.shards import TableShape, hashed_place

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
FindRows = Callable[[Int64Array, UInt64Array], Int64Array]
"""Finds the rows of ids, given them and their splitmix64 hashes, (N,) each."""


class BundleIdRows:
    """The ID rows of all tables of a bundle. Thread-safe."""

    def __init__(
        self, tables: Sequence[TableRows], rows: Sequence[RowsFile], paths: dict[str, Path], trained: Path
    ) -> None:
        """`paths`: the files that `tables` and `rows` name; `trained`: the file with one bit for each row."""
        self._rows: dict[int, Float32] = {}
        for each in rows:
            self._rows[each.width] = _mapped(paths[each.name], np.dtype("<f4")).reshape(each.num_rows, each.width)
        self._trained = _mapped(trained, np.dtype(np.uint8))
        self._tables = {table.name: table for table in tables}
        self._finders = {table.name: _finder(table, paths) for table in tables}
        self._first_bit = {each.width: each.first_bit for each in rows}
        self._several: dict[tuple[str, ...], tuple[int, Int64Array, Int64Array, Int64Array]] = {}

    def find(self, tables: Sequence[str], ids_N: Int64Array, lengths_T: Int64Array) -> tuple[Int64Array, Bool]:
        """Find the row of each id in the file of its table's width, (N,), and whether training has touched it, (N,).

        The first `lengths_T[0]` ids belong to the first table, and so on. An id without a row in an exact table gets
        the cold row of its shard and counts as unknown. In a hashed table an id counts as known if it, or another id
        with the same row, was in training. 27 hashed tables with 200 ids each take a fifth of the time of one by one.
        """
        several = self._several.get(names := tuple(tables))
        if several is None:
            several = self._several[names] = self._laid_out([self._tables[name] for name in names])
        num_shards, rows_per_shard_T, first_row_T, first_bit_T = several
        hash_N = splitmix64(ids_N)
        if num_shards:
            rows_per_shard_N = np.repeat(rows_per_shard_T, lengths_T)
            shard_N, row_N = hashed_place(hash_N, num_shards, rows_per_shard_N)
            rows_N = shard_N * rows_per_shard_N + row_N + np.repeat(first_row_T, lengths_T)
        else:
            ends = np.cumsum(lengths_T).tolist()
            parts = zip(names, [0, *ends], ends, strict=False)
            rows_N = np.concatenate([self._finders[t](ids_N[start:end], hash_N[start:end]) for t, start, end in parts])
        bit_N = rows_N + np.repeat(first_bit_T, lengths_T)
        known_N: Bool = (self._trained.take(bit_N >> 3) >> (bit_N & 7).astype(np.uint8) & 1).astype(np.bool_)
        return rows_N, known_N

    def gather(self, width: int, rows_N: Int64Array) -> Float32:
        """Copy rows of the tables with this width, (N, width)."""
        rows_NV: Float32 = self._rows[width].take(rows_N, axis=0)
        return rows_NV

    def _laid_out(self, tables: Sequence[TableRows]) -> tuple[int, Int64Array, Int64Array, Int64Array]:
        """Return the shards of each of several tables, 0 unless all are hashed and have as many, and by table, (T,):
        rows of a shard, its first row in the file of its width, and the first bit of that file."""
        num_shards, *others = {table.num_shards if table.kind == "hashed" else 0 for table in tables}
        of_table = [(each.num_rows // each.num_shards, each.first_row, self._first_bit[each.width]) for each in tables]
        rows_per_shard_T, first_row_T, first_bit_T = np.array(of_table, np.int64).T
        return 0 if others else num_shards, rows_per_shard_T, first_row_T, first_bit_T


def _finder(table: TableRows, paths: Mapping[str, Path]) -> FindRows:
    """Return a function that finds the rows of ids in one table, by its kind (serving/bundle/manifest.py)."""
    if table.hashes is not None:
        return _exact_finder(table, paths[table.hashes])
    shape = TableShape(table.name, table.width, table.num_rows, table.num_shards, direct=table.kind == "direct")

    def find(ids_N: Int64Array, _: UInt64Array) -> Int64Array:
        shard_N, row_N = shape.place_of(ids_N)
        return shard_N * shape.rows_per_shard + row_N + table.first_row

    return find


def _exact_finder(table: TableRows, hashes: Path) -> FindRows:
    """Return a finder in a table with rows for a list of ids, and a cold row in each shard for all others."""
    hash_M: UInt64Array = _mapped(hashes, np.dtype("<u8"))
    shards = np.arange(table.num_shards)
    start_S = np.searchsorted(shard_of_hash(hash_M, table.num_shards), np.append(shards, table.num_shards))
    cold_S = start_S[:-1] + shards + table.first_row
    parts = [hash_M[start:end] for start, end in itertools.pairwise(start_S.tolist())]
    index = HashIndex(range(table.num_shards), parts, table.num_shards)

    def exact(ids_N: Int64Array, hash_N: UInt64Array) -> Int64Array:
        shard_N = shard_of_hash(hash_N, table.num_shards)
        if not len(index):
            return cold_S[shard_N]
        place_N = index.places(hash_N, shard_N)
        own_N = place_N + shard_N + 1 + table.first_row  # each shard begins with its cold row
        return np.where(index.hash_M[place_N] == hash_N, own_N, cold_S[shard_N])

    return exact


def _mapped(path: Path, dtype: np.dtype[np.generic]) -> NDArray[Any]:
    """Map a whole file, read-only; handles empty files, which cannot be mapped."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


class VectorTable:
    """The vectors of one feature store's images at one snapshot of the vectors store. Lookups are thread-safe."""

    def __init__(self, of: VectorsOf, snapshot: Snapshot, cache_dir: Path | None) -> None:
        """Map the rows of the snapshot of a vectors store. Raises BrokenBundleError if it is damaged; StorageError."""
        if snapshot.info.dim != len(of.no_image):
            raise BrokenBundleError(Problem.OTHER_WIDTH, snapshot.storage.url, snapshot.info.dim, len(of.no_image))
        store = FeatureStore(snapshot.storage, snapshot.info)
        try:
            self._partition = FeaturePartition.load(
                store, cache_dir=cache_dir, missing="zeros", threads=1, version=snapshot.version
            )
        except CorruptFileError as error:
            raise BrokenBundleError(*error.args) from error
        self.time_s = snapshot.manifest.time_s
        """When the snapshot was committed, in seconds since 1970."""
        self.no_image_V: Float32 = np.asarray(of.no_image, np.float32)
        """The vector for images without one."""

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
