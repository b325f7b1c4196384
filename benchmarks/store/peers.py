"""Everything that the store's lookups are compared with, each as its users would have it and at its fastest.

All take row numbers of the matrix and find the rows by what they have: `numpy.take` by the row numbers themselves, the
others by the rows' keys. All write into a given buffer, in the order asked.

- LMDB: one read transaction, values are views into its map. Filled in the order of its tree.
- RocksDB through rocksdict: no compression (the numbers hardly compress), compacted, and its files mapped, which is
  faster than any size of its block cache. `get` in a loop and `multi_get` (a list of keys) are both measured: in memory
  `get` wins, as it keeps no second list of values.
- Lance: `take` by row numbers, which leaves the way from key to row to the user, and a filter on the key with a scalar
  index. It has threads of its own; a lookup "in one thread" has them all on one core.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import lance
import lmdb
import numpy as np
import pyarrow as pa
from rich.progress import Progress
from rocksdict import BlockBasedOptions, DBCompressionType, Options, Rdict, WriteBatch

from benchmarks.store.data import Held, Indices, Matrix
from featurestore import FeaturePartition

_BATCH_ROWS = 256
_LANCE_ROWS = 8192


class Peer(Protocol):
    """One way to keep rows in files and to look them up."""

    folder: Path  # its files

    def open(self, threads: int) -> None:
        """Make ready for lookups in a number of threads."""

    def lookup(self, index_U: Indices, out_UD: Matrix) -> None:
        """Write the rows into `out_UD` in the order asked."""

    def close(self) -> None:
        """Let go of the files."""


class StorePeer:
    """This package: a partition with its mapped cache."""

    def __init__(self, held: Held, cache: Path) -> None:
        self.folder, self._held = cache, held
        self.partition: FeaturePartition

    def open(self, threads: int) -> None:
        """Build the cache where it is not there."""
        version = self._held.version
        self.partition = FeaturePartition.load(
            self._held.store, cache_dir=self.folder, threads=threads, version=version
        )

    def lookup(self, index_U: Indices, out_UD: Matrix) -> None:
        """Look up by key."""
        self.partition.lookup(self._held.keys_N[index_U], out=out_UD)

    def close(self) -> None:
        """Unmap."""
        self.partition.close()


class NumpyPeer:
    """numpy.take on the matrix in one mapped file; warm that is as fast as from memory."""

    def __init__(self, held: Held, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self._dtype, self._dim = held.matrix_ND.dtype, held.matrix_ND.shape[1]
        held.matrix_ND.tofile(folder / "matrix.bin")

    def open(self, threads: int) -> None:
        """Map."""
        self._matrix: Matrix = np.memmap(self.folder / "matrix.bin", self._dtype, "r").reshape(-1, self._dim)
        self._split = Split(threads)

    def lookup(self, index_U: Indices, out_UD: Matrix) -> None:
        """Look up by row number."""
        self._split(lambda index, out: np.take(self._matrix, index, axis=0, out=out, mode="clip"), index_U, out_UD)

    def close(self) -> None:
        """Unmap."""
        del self._matrix
        self._split.close()


class LmdbPeer:
    """LMDB by the key's eight bytes."""

    def __init__(self, held: Held, folder: Path, progress: Progress) -> None:
        self.folder, self._keys = folder, key_bytes(held)
        self._dtype = held.matrix_ND.dtype
        self._size = int(held.matrix_ND.nbytes * 2.2) + (64 << 20)
        environment = lmdb.open(str(folder), map_size=self._size, sync=False)
        with environment.begin(write=True) as transaction:
            for row in progress.track(np.argsort(held.keys_N.view(np.uint64)), description="fill LMDB"):
                transaction.put(self._keys[row], held.matrix_ND[row].tobytes())
        environment.close()

    def open(self, threads: int) -> None:
        """Map."""
        self._environment = lmdb.open(str(self.folder), map_size=self._size, readonly=True, lock=False)
        self._split = Split(threads)

    def lookup(self, index_U: Indices, out_UD: Matrix) -> None:
        """Look up in one transaction of each thread."""
        self._split(self._get, index_U, out_UD)

    def _get(self, index_U: Indices, out_UD: Matrix) -> None:
        keys, dtype = self._keys, self._dtype
        with self._environment.begin(buffers=True) as transaction:
            for place, row in enumerate(index_U.tolist()):
                value: Any = transaction.get(keys[row])
                out_UD[place] = np.frombuffer(value, dtype)

    def close(self) -> None:
        """Unmap."""
        self._environment.close()
        self._split.close()


class RocksPeer:
    """RocksDB by the key's eight bytes."""

    def __init__(self, held: Held, folder: Path, progress: Progress) -> None:
        self.folder, self._keys = folder, key_bytes(held)
        self._dtype = held.matrix_ND.dtype
        database = Rdict(str(folder), _rocks_options())
        order_N = np.argsort(held.keys_N.view(np.uint64))
        for start in progress.track(range(0, len(order_N), _BATCH_ROWS), description="fill RocksDB"):
            batch = WriteBatch(raw_mode=True)
            for row in order_N[start : start + _BATCH_ROWS]:
                batch.put(self._keys[row], held.matrix_ND[row].tobytes())
            database.write(batch)
        database.flush()
        database.compact_range(None, None)
        database.close()

    def open(self, threads: int) -> None:
        """Open and map."""
        self._database = Rdict(str(self.folder), _rocks_options())
        self._split = Split(threads)

    def lookup(self, index_U: Indices, out_UD: Matrix) -> None:
        """Look up by a `get` of each key."""
        self._split(self._get, index_U, out_UD)

    def lookup_multi(self, index_U: Indices, out_UD: Matrix) -> None:
        """Look up by a `get` of a list of keys."""
        self._split(self._multi_get, index_U, out_UD)

    def _get(self, index_U: Indices, out_UD: Matrix) -> None:
        database, keys, dtype = self._database, self._keys, self._dtype
        for place, row in enumerate(index_U.tolist()):
            value: Any = database.get(keys[row])
            out_UD[place] = np.frombuffer(value, dtype)

    def _multi_get(self, index_U: Indices, out_UD: Matrix) -> None:
        values: Any = self._database.get([self._keys[row] for row in index_U.tolist()])
        for place, value in enumerate(values):
            out_UD[place] = np.frombuffer(value, self._dtype)

    def close(self) -> None:
        """Close."""
        self._database.close()
        self._split.close()


class LancePeer:
    """Lance with the feature as fixed-size binary, and a B-tree on the key."""

    def __init__(self, held: Held, folder: Path, progress: Progress) -> None:
        self.folder, self._keys_N = folder, held.keys_N
        task = progress.add_task("fill Lance", total=None)
        row_bytes = held.matrix_ND[0].nbytes
        schema = pa.schema([("key", pa.int64()), ("feature", pa.binary(row_bytes))])

        def batches() -> Iterator[pa.RecordBatch]:
            for start in range(0, len(held.keys_N), _LANCE_ROWS):
                rows = slice(start, start + _LANCE_ROWS)
                buffer = pa.py_buffer(held.matrix_ND[rows].reshape(-1).data)
                keys = pa.array(held.keys_N[rows])
                feature = pa.FixedSizeBinaryArray.from_buffers(pa.binary(row_bytes), len(keys), [None, buffer])
                yield pa.RecordBatch.from_arrays([keys, feature], schema=schema)

        dataset = lance.write_dataset(batches(), str(folder), schema=schema)
        dataset.create_scalar_index("key", "BTREE")
        progress.update(task, total=1, completed=1)

    def open(self, threads: int) -> None:
        """Open; its threads are its own."""
        self._dataset = lance.dataset(str(self.folder))
        self._one_core = threads == 1

    def lookup(self, index_U: Indices, out_UD: Matrix) -> None:
        """Look up by row number."""
        with on_one_core(self._one_core):
            table = self._dataset.take(pa.array(index_U), columns=["feature"])
        out_UD[:] = _matrix_of(table["feature"], out_UD)

    def lookup_by_key(self, index_U: Indices, out_UD: Matrix) -> None:
        """Look up by a filter with all keys; rows come in any order, each once."""
        keys_U = self._keys_N[index_U]
        with on_one_core(self._one_core):
            wanted = f"key IN ({', '.join(map(str, keys_U.tolist()))})"
            table = self._dataset.to_table(columns=["key", "feature"], filter=wanted)
        found_Q = table["key"].to_numpy()
        order_Q = np.argsort(found_Q)
        place_U = order_Q[np.searchsorted(found_Q[order_Q], keys_U)]
        np.take(_matrix_of(table["feature"], out_UD), place_U, axis=0, out=out_UD, mode="clip")

    def close(self) -> None:
        """Let go of it."""
        del self._dataset


class Split:
    """Runs a lookup in some threads, each with its share of the keys."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self, work: Callable[[Indices, Matrix], object], index_U: Indices, out_UD: Matrix) -> None:
        if self.threads == 1:
            work(index_U, out_UD)
            return
        size = -(-len(index_U) // self.threads)
        parts = [slice(start, start + size) for start in range(0, len(index_U), size)]
        list(self._pool.map(lambda part: work(index_U[part], out_UD[part]), parts))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


@contextmanager
def on_one_core(wanted: bool) -> Iterator[None]:
    """Hold every thread of this process on one core; costs a microsecond a thread."""
    if not wanted:
        yield
        return
    allowed = os.sched_getaffinity(0)
    _pin({max(allowed)})
    try:
        yield
    finally:
        _pin(allowed)


def fill_peers(held: Held, folder: Path, progress: Progress) -> Mapping[str, Peer]:
    """Make all peers, filled with the rows of `held`, below `folder`."""
    folder.mkdir()
    return {
        "store": StorePeer(held, folder / "cache"),
        "numpy": NumpyPeer(held, folder / "numpy"),
        "lmdb": LmdbPeer(held, folder / "lmdb", progress),
        "rocksdb": RocksPeer(held, folder / "rocksdb", progress),
        "lance": LancePeer(held, folder / "lance", progress),
    }


def key_bytes(held: Held) -> list[bytes]:
    """Write the key of each row as eight bytes, in the order of unsigned numbers."""
    data = held.keys_N.view(np.uint64).astype(">u8").tobytes()
    return [data[start : start + 8] for start in range(0, len(data), 8)]


def _pin(allowed: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):  # noqa: PTH208 - names alone are wanted
        try:
            os.sched_setaffinity(int(thread), allowed)
        except ProcessLookupError:  # it has ended
            continue


def _matrix_of(column: Any, like_UD: Matrix) -> Matrix:
    """A fixed-size binary column as a matrix."""
    chunk = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    width = chunk.type.byte_width
    data = memoryview(chunk.buffers()[1])[chunk.offset * width : (chunk.offset + len(chunk)) * width]
    return np.frombuffer(data, like_UD.dtype).reshape(-1, like_UD.shape[1])


def _rocks_options() -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_compression_type(DBCompressionType.none())
    options.set_allow_mmap_reads(True)
    table = BlockBasedOptions()
    table.set_bloom_filter(10, False)
    options.set_block_based_table_factory(table)
    return options
