"""Bulk lookups at a feature server over loopback, against the same partition in this process.

The server has one core, and this process another one. Both sides look up new random keys in every round, with all rows
in memory: once into new memory, as `lookup(keys)` gives it, and once into a buffer that is used again.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.progress import Progress

from benchmarks.report import Section
from benchmarks.timing import interleaved
from featurestore import FeatureClient, FeaturePartition, FeatureStore, connect
from featurestore.errors import ServerError


def flight_figures(store: FeatureStore, cache: Path, num_keys: int, rounds: int, progress: Progress) -> Section:
    """Measure lookups of `num_keys` random keys of a store; `cache` is a folder for the files that both sides map.

    `flight_vs_local` is the ratio of the medians of `lookup(keys)`, `flight_out_vs_local` that into a buffer. Rows are
    compared first.
    """
    info = store.info
    known, rng = store.snapshot().keys(), np.random.default_rng(0)
    keys_U = np.empty(num_keys, np.int64)
    out_UD = np.empty((num_keys, info.dim), info.storage_dtype)

    def draw() -> None:
        keys_U[:] = rng.choice(known, num_keys)

    first, *others = sorted(os.sched_getaffinity(0))
    with (
        on_cores(others or [first]),
        feature_server(store.url, cache, first) as address,
        connect(address) as client,
        FeaturePartition.load(store, cache_dir=cache, threads=1) as partition,
    ):
        draw()
        if client.lookup(keys_U).features_UD.tobytes() != partition.lookup(keys_U).features_UD.tobytes():
            raise AssertionError("the server gave other rows than the partition")
        timings = interleaved(
            variants(client, partition, keys_U, out_UD), rounds, progress, f"Flight, {info.dim} x {info.dtype}", draw
        )
    rows_per_s = {name: num_keys / timings.median(name) for name in timings.seconds}
    figures = {
        "flight_vs_local": timings.speedup("flight", "partition"),
        "flight_vs_local_fastest": timings.fastest_speedup("flight", "partition"),
        "flight_out_vs_local": timings.speedup("flight into buffer", "partition into buffer"),
        "flight_rows_per_s": rows_per_s["flight"],
        "flight_mb_per_s": rows_per_s["flight"] * info.row_bytes / 1e6,
        "flight_out_mb_per_s": rows_per_s["flight into buffer"] * info.row_bytes / 1e6,
        "partition_mb_per_s": rows_per_s["partition"] * info.row_bytes / 1e6,
        "partition_out_mb_per_s": rows_per_s["partition into buffer"] * info.row_bytes / 1e6,
    }
    return Section(f"{num_keys:,} random keys over loopback, {info.dim} x {info.dtype}", figures)


def variants(
    client: FeatureClient, partition: FeaturePartition, keys_U: np.ndarray, out_UD: np.ndarray
) -> dict[str, Callable[[], object]]:
    """Return what is timed."""
    return {
        "partition": lambda: partition.lookup(keys_U),
        "flight": lambda: client.lookup(keys_U),
        "partition into buffer": lambda: partition.lookup(keys_U, out=out_UD),
        "flight into buffer": lambda: client.lookup(keys_U, out=out_UD),
    }


@contextmanager
def feature_server(url: str, cache: Path, core: int, words: Sequence[str] = ()) -> Iterator[str]:
    """Start a feature server on one core; lend its address. Raises ServerError."""
    command = [sys.executable, "-m", "featurestore", "serve", url, "--port", "0", "--cache-dir", str(cache), *words]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command], stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert process.stdout is not None
            address = process.stdout.readline().partition(" ")[0]
            if not address.startswith("grpc"):
                log.seek(0)
                raise ServerError(f"the feature server did not start: {log.read()}")
            yield address
        finally:
            process.kill()
            process.wait()


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Keep this thread, and threads that it starts, on some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
