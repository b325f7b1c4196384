"""Lookups with everything in memory: the store against all others, in one thread and in two, with and without deltas.

Random keys, new ones for each run, so that no variant finds the rows of another in the processor's cache. The store and
numpy.take are timed once into new memory and once into a buffer, and their ratio is the lower of the two; the others
are timed into a buffer alone. Ratios are of medians; `*_fastest` is of the fastest rounds: where the two differ much,
other processes had the cores. Of RocksDB's and Lance's two ways the faster one counts.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.report import Figure, Section
from benchmarks.store.data import NUM_DELTAS, Bench, Held, Indices, Matrix, check_equal
from benchmarks.store.peers import LancePeer, Peer, RocksPeer, Split, StorePeer
from benchmarks.timing import Timings, interleaved

_SHOWN = {  # rows of the table, and what the JSON calls them
    "numpy.take": "numpy_take",
    "numpy.take into buffer": "numpy_take_out",
    "store": "lookup",
    "store into buffer": "lookup_out",
    "LMDB": "lmdb_out",
    "RocksDB get": "rocksdb_get",
    "RocksDB multi_get": "rocksdb_multi_get",
    "Lance take": "lance_take",
    "Lance by key": "lance_by_key",
}


def warm_figures(bench: Bench, held: Held, peers: Mapping[str, Peer]) -> Section:
    """Measure all ways, in 1 and in 2 threads, on rows of one dtype; the names have it unless it is bfloat16."""
    dtype = held.store.info.dtype
    suffix = "" if dtype == "bfloat16" else f"_{dtype}"
    one, two = (_timings(bench, held, peers, threads) for threads in (1, 2))
    figures: dict[str, Figure] = {f"{name}{suffix}": value for name, value in _ratios(one).items()}
    figures |= {f"{name}{suffix}_2_threads": value for name, value in _ratios(two).items()}
    grid = {
        name: {
            f"1_thread{suffix}_rows_per_s": bench.num_keys / one.median(shown),
            f"2_threads{suffix}_rows_per_s": bench.num_keys / two.median(shown),
        }
        for shown, name in _SHOWN.items()
    }
    return Section(f"lookups of {bench.num_keys:,} random keys, warm, {dtype}", figures, grid)


def delta_figures(bench: Bench, held: Held, newest: Held, cache: Path) -> Section:
    """Measure the snapshot with deltas over the same rows, and check what a partition of it serves."""
    peer = StorePeer(newest, cache)
    peer.open(threads=1)
    index_U, out_UD = np.empty(bench.num_keys, np.int64), _buffer(bench, held)
    draw = _drawer(bench, index_U)
    draw()
    index_U[: len(bench.changed)] = list(bench.changed)[: len(index_U)]
    peer.lookup(index_U, out_UD)
    check_equal(out_UD, held.matrix_ND[bench.sources_of(index_U)], "the store with deltas")
    timings = interleaved(
        {
            "numpy.take": lambda: np.take(held.matrix_ND, index_U, axis=0),
            "store": lambda: peer.partition.lookup(held.keys_N[index_U]),
            "numpy.take into buffer": lambda: np.take(held.matrix_ND, index_U, axis=0, out=out_UD, mode="clip"),
            "store into buffer": lambda: peer.lookup(index_U, out_UD),
        },
        bench.rounds,
        bench.progress,
        f"lookups over {NUM_DELTAS} deltas",
        draw,
    )
    peer.close()
    key = f"lookup_vs_numpy_take_{NUM_DELTAS}_deltas"
    figures = {
        key: _vs_numpy(timings.speedup),
        f"{key}_fastest": _vs_numpy(timings.fastest_speedup),
        f"lookup_{NUM_DELTAS}_deltas_rows_per_s": bench.num_keys / timings.median("store into buffer"),
    }
    return Section(f"lookups, warm, {NUM_DELTAS} delta commits of 1 % over the store", figures)


def _timings(bench: Bench, held: Held, peers: Mapping[str, Peer], threads: int) -> Timings:
    for peer in peers.values():
        peer.open(threads)
    split = Split(threads)
    index_U, out_UD = np.empty(bench.num_keys, np.int64), _buffer(bench, held)
    draw = _drawer(bench, index_U)
    variants = _variants(held, peers, split, index_U, out_UD)
    for name in list(_SHOWN)[3:]:
        draw()
        out_UD[:] = 0
        variants[name]()
        check_equal(out_UD, held.matrix_ND[index_U], name)
    title = f"lookups, {held.store.info.dtype}, {threads} thread{'s' if threads > 1 else ''}"
    timings = interleaved(variants, bench.rounds, bench.progress, title, draw)
    split.close()
    for peer in peers.values():
        peer.close()
    return timings


def _variants(
    held: Held, peers: Mapping[str, Peer], split: Split, index_U: Indices, out_UD: Matrix
) -> dict[str, Callable[[], object]]:
    store, rocks, lance_ = peers["store"], peers["rocksdb"], peers["lance"]
    assert isinstance(store, StorePeer) and isinstance(rocks, RocksPeer) and isinstance(lance_, LancePeer)
    matrix_ND = held.matrix_ND

    def take_new() -> None:
        if split.threads == 1:
            np.take(matrix_ND, index_U, axis=0)
        else:
            split(
                lambda index, out: np.take(matrix_ND, index, axis=0, out=out, mode="clip"),
                index_U,
                np.empty_like(out_UD),
            )

    def take_into() -> None:
        split(lambda index, out: np.take(matrix_ND, index, axis=0, out=out, mode="clip"), index_U, out_UD)

    return {
        "numpy.take": take_new,
        "store": lambda: store.partition.lookup(held.keys_N[index_U]),
        "numpy.take into buffer": take_into,
        "store into buffer": partial(store.lookup, index_U, out_UD),
        "LMDB": partial(peers["lmdb"].lookup, index_U, out_UD),
        "RocksDB get": partial(rocks.lookup, index_U, out_UD),
        "RocksDB multi_get": partial(rocks.lookup_multi, index_U, out_UD),
        "Lance take": partial(lance_.lookup, index_U, out_UD),
        "Lance by key": partial(lance_.lookup_by_key, index_U, out_UD),
    }


def _ratios(timings: Timings) -> dict[str, float]:
    def best_of(*names: str) -> float:
        return min(timings.speedup("store into buffer", over=name) for name in names)

    return {
        "lookup_vs_numpy_take": _vs_numpy(timings.speedup),
        "lookup_vs_numpy_take_fastest": _vs_numpy(timings.fastest_speedup),
        "lookup_vs_lmdb": best_of("LMDB"),
        "lookup_vs_rocksdb": best_of("RocksDB get", "RocksDB multi_get"),
        "lookup_vs_lance": best_of("Lance take", "Lance by key"),
    }


def _vs_numpy(speedup: Callable[[str, str], float]) -> float:
    return min(speedup("store", "numpy.take"), speedup("store into buffer", "numpy.take into buffer"))


def _drawer(bench: Bench, index_U: Indices) -> Callable[[], None]:
    rng = np.random.default_rng(bench.seed + 2)

    def draw() -> None:
        index_U[:] = rng.integers(0, bench.num_rows, len(index_U))

    return draw


def _buffer(bench: Bench, held: Held) -> Matrix:
    return np.zeros((bench.num_keys, held.matrix_ND.shape[1]), held.matrix_ND.dtype)
