"""The store against all others: lookups with everything in memory, each as its users would have it and at its fastest.

Lookups are of random keys, new ones for each run, in one thread, so that no variant finds the rows of another in the
processor's cache. The store and numpy.take are timed once into new memory and once into a buffer, and their ratio is
the lower of the two; the others are timed into a buffer alone. Ratios are of medians.

All find rows by keys, but for Lance, which takes row numbers and leaves the way from key to row to its user. All write
into a given buffer, in the order asked, in one thread.

- LMDB: one read transaction, values are views into its map. Filled in the order of its tree.
- Lance: `take`, which is faster than a filter on the key with a scalar index. Its own threads all share one core.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import lance
import lmdb
import numpy as np
import pyarrow as pa
from rich.progress import Progress

from benchmarks.report import Figure, Section
from benchmarks.store.data import NUM_DELTAS, Bench, Held, Indices, Matrix, check_equal
from benchmarks.timing import Timings, interleaved
from featurestore import FeaturePartition

_LANCE_ROWS = 8192


class Peer(Protocol):
    """One way to keep rows in files and to look them up; filled and opened when it is made."""

    def lookup(self, index_U: Indices, out_UD: Matrix) -> None:
        """Write the rows into `out_UD` in the order asked."""

    def close(self) -> None:
        """Let go of the files."""


class StorePeer:
    """This package: a partition with its mapped cache, in `cache`."""

    def __init__(self, held: Held, cache: Path) -> None:
        self.cache, self._held = cache, held
        self.partition = FeaturePartition.load(held.store, cache_dir=cache, threads=1, version=held.version)

    def lookup(self, index_U: Indices, out_UD: Matrix) -> None:
        """Look up by key."""
        self.partition.lookup(self._held.keys_N[index_U], out=out_UD)

    def close(self) -> None:
        """Unmap."""
        self.partition.close()


class LmdbPeer:
    """LMDB by the key's eight bytes."""

    def __init__(self, held: Held, folder: Path, progress: Progress) -> None:
        self._keys, self._dtype = key_bytes(held), held.matrix_ND.dtype
        size = int(held.matrix_ND.nbytes * 2.2) + (64 << 20)
        environment = lmdb.open(str(folder), map_size=size, sync=False)
        with environment.begin(write=True) as transaction:
            for row in progress.track(np.argsort(held.keys_N.view(np.uint64)), description="fill LMDB"):
                transaction.put(self._keys[row], held.matrix_ND[row].tobytes())
        environment.close()
        self._environment = lmdb.open(str(folder), map_size=size, readonly=True, lock=False)

    def lookup(self, index_U: Indices, out_UD: Matrix) -> None:
        """Look up in one transaction."""
        keys, dtype = self._keys, self._dtype
        with self._environment.begin(buffers=True) as transaction:
            for place, row in enumerate(index_U.tolist()):
                value: Any = transaction.get(keys[row])
                out_UD[place] = np.frombuffer(value, dtype)

    def close(self) -> None:
        """Unmap."""
        self._environment.close()


class LancePeer:
    """Lance with the feature as fixed-size binary."""

    def __init__(self, held: Held, folder: Path, progress: Progress) -> None:
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

        self._dataset = lance.write_dataset(batches(), str(folder), schema=schema)
        progress.update(task, total=1, completed=1)

    def lookup(self, index_U: Indices, out_UD: Matrix) -> None:
        """Look up by row number."""
        with on_one_core():
            column: Any = self._dataset.take(pa.array(index_U), columns=["feature"])["feature"].combine_chunks()
        width = column.type.byte_width
        data = memoryview(column.buffers()[1])[column.offset * width : (column.offset + len(column)) * width]
        out_UD[:] = np.frombuffer(data, out_UD.dtype).reshape(out_UD.shape)

    def close(self) -> None:
        """Let go of it."""
        del self._dataset


@contextmanager
def on_one_core() -> Iterator[None]:
    """Hold every thread of this process on one core; costs a microsecond a thread."""
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
        "LMDB": LmdbPeer(held, folder / "lmdb", progress),
        "Lance": LancePeer(held, folder / "lance", progress),
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


_COLUMNS = {  # what is timed, and what the JSON calls it
    "numpy.take": "numpy_take",
    "numpy.take into buffer": "numpy_take_out",
    "store": "lookup",
    "store into buffer": "lookup_out",
    "LMDB": "lmdb_out",
    "Lance": "lance_take",
}


def warm_figures(bench: Bench, held: Held, peers: Mapping[str, Peer], cache: Path) -> Section:
    """Measure all ways, and how long a partition takes to open whose cache is there."""
    timings = _timed(bench, held, StorePeer(held, cache), lambda index_U: index_U, peers, "lookups")
    opened = interleaved(
        {"open": lambda: StorePeer(held, cache).close()}, max(5, bench.rounds // 6), bench.progress, "warm opening"
    )
    figures: dict[str, Figure] = {
        "lookup_vs_numpy_take": _vs_numpy(timings),
        "lookup_vs_lmdb": timings.speedup("store into buffer", over="LMDB"),
        "lookup_vs_lance": timings.speedup("store into buffer", over="Lance"),
        "warm_open_s": opened.median("open"),
    }
    grid = {name: {"rows_per_s": bench.num_keys / timings.median(timed)} for timed, name in _COLUMNS.items()}
    return Section(f"lookups of {bench.num_keys:,} random keys, warm", figures, grid)


def delta_figures(bench: Bench, held: Held, newest: Held, cache: Path) -> Section:
    """Measure the snapshot with deltas over the same rows."""
    title = f"lookups over {NUM_DELTAS} deltas"
    timings = _timed(bench, held, StorePeer(newest, cache), bench.sources_of, {}, title)
    figures = {
        f"lookup_vs_numpy_take_{NUM_DELTAS}_deltas": _vs_numpy(timings),
        f"lookup_{NUM_DELTAS}_deltas_rows_per_s": bench.num_keys / timings.median("store into buffer"),
    }
    return Section(f"lookups, warm, {NUM_DELTAS} delta commits of 1 % over the store", figures)


def _timed(
    bench: Bench,
    held: Held,
    store: StorePeer,
    sources_of: Callable[[Indices], Indices],
    peers: Mapping[str, Peer],
    title: str,
) -> Timings:
    """Check each way once, then time it. `sources_of` says whose feature the store has of each row."""
    matrix_ND = held.matrix_ND
    index_U = np.empty(bench.num_keys, np.int64)
    out_UD = np.zeros((bench.num_keys, matrix_ND.shape[1]), matrix_ND.dtype)
    rng = np.random.default_rng(bench.seed + 2)

    def draw() -> None:
        index_U[:] = rng.integers(0, bench.num_rows, len(index_U))

    ways: dict[str, Peer] = {"store": store, **peers}
    for name, peer in ways.items():
        draw()
        out_UD[:] = 0
        peer.lookup(index_U, out_UD)
        check_equal(out_UD, matrix_ND[sources_of(index_U) if peer is store else index_U], name)
    variants: dict[str, Callable[[], object]] = {
        "numpy.take": lambda: np.take(matrix_ND, index_U, axis=0),
        "store": lambda: store.partition.lookup(held.keys_N[index_U]),
        "numpy.take into buffer": lambda: np.take(matrix_ND, index_U, axis=0, out=out_UD, mode="clip"),
        "store into buffer": partial(store.lookup, index_U, out_UD),
        **{name: partial(peer.lookup, index_U, out_UD) for name, peer in peers.items()},
    }
    timings = interleaved(variants, bench.rounds, bench.progress, title, draw)
    for peer in ways.values():
        peer.close()
    return timings


def _vs_numpy(timings: Timings) -> float:
    pairs = (("store", "numpy.take"), ("store into buffer", "numpy.take into buffer"))
    return min(timings.speedup(store, over=numpy) for store, numpy in pairs)
