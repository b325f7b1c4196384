"""Lookups with everything in memory, in one thread: the store against all others, with and without deltas.

Random keys, new ones for each run, so that no variant finds the rows of another in the processor's cache. The store and
numpy.take are timed once into new memory and once into a buffer, and their ratio is the lower of the two; the others
are timed into a buffer alone. Ratios are of medians; `*_fastest` is of the fastest rounds: where the two differ much,
other processes had the cores.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.report import Figure, Section
from benchmarks.store.data import NUM_DELTAS, Bench, Held, Indices, check_equal
from benchmarks.store.peers import Peer, StorePeer
from benchmarks.timing import Timings, interleaved

_COLUMNS = {  # what is timed, and what the JSON calls it
    "numpy.take": "numpy_take",
    "numpy.take into buffer": "numpy_take_out",
    "store": "lookup",
    "store into buffer": "lookup_out",
    "LMDB": "lmdb_out",
    "RocksDB": "rocksdb_get",
    "Lance": "lance_take",
}


def warm_figures(bench: Bench, held: Held, peers: Mapping[str, Peer], cache: Path) -> Section:
    """Measure all ways."""
    timings = _timed(bench, held, StorePeer(held, cache), lambda index_U: index_U, peers, "lookups")
    figures: dict[str, Figure] = {
        "lookup_vs_numpy_take": _vs_numpy(timings.speedup),
        "lookup_vs_numpy_take_fastest": _vs_numpy(timings.fastest_speedup),
        "lookup_vs_lmdb": timings.speedup("store into buffer", over="LMDB"),
        "lookup_vs_rocksdb": timings.speedup("store into buffer", over="RocksDB"),
        "lookup_vs_lance": timings.speedup("store into buffer", over="Lance"),
    }
    grid = {name: {"rows_per_s": bench.num_keys / timings.median(timed)} for timed, name in _COLUMNS.items()}
    return Section(f"lookups of {bench.num_keys:,} random keys, warm", figures, grid)


def delta_figures(bench: Bench, held: Held, newest: Held, cache: Path) -> Section:
    """Measure the snapshot with deltas over the same rows."""
    title = f"lookups over {NUM_DELTAS} deltas"
    timings = _timed(bench, held, StorePeer(newest, cache), bench.sources_of, {}, title)
    key = f"lookup_vs_numpy_take_{NUM_DELTAS}_deltas"
    figures = {
        key: _vs_numpy(timings.speedup),
        f"{key}_fastest": _vs_numpy(timings.fastest_speedup),
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


def _vs_numpy(speedup: Callable[[str, str], float]) -> float:
    return min(speedup("store", "numpy.take"), speedup("store into buffer", "numpy.take into buffer"))
