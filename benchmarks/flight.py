"""Bulk lookups at a feature server over loopback, against the same partition in this process.

python -m benchmarks.flight --json data/bench/flight.json

The server has one core, and this process another one. Both sides look up new random keys in every round, with all rows
in memory: once into new memory, as `lookup(keys)` gives it, and once into a buffer that is used again. Ratios are of
medians; `*_fastest` is of the fastest rounds.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.progress import Progress

from benchmarks.report import JsonPath, Section, write_sections
from benchmarks.timing import Timings, interleaved
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars
from featurestore.errors import ServerError

if TYPE_CHECKING:
    from featurestore import FeatureClient, FeaturePartition, FeatureStore

_VECTOR_DIM = 12
_VECTORS_PER_ROW = 16  # of the narrow store, for each row of the wide one

app = CommandApp(report=True, failures=(OSError,))


def measure(store: "FeatureStore", cache: Path, num_keys: int, rounds: int, progress: Progress) -> Timings:
    """Time lookups of `num_keys` random keys of a store; `cache` is a folder for the files that both sides map.

    Rows are compared first.
    """
    from featurestore import FeaturePartition, connect

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
        timed = variants(client, partition, keys_U, out_UD)
        return interleaved(timed, rounds, progress, f"{info.dim} x {info.dtype}", draw)


def variants(
    client: "FeatureClient", partition: "FeaturePartition", keys_U: npt.NDArray[np.int64], out_UD: npt.NDArray[Any]
) -> dict[str, Callable[[], object]]:
    """Return what is timed."""
    return {
        "partition": lambda: partition.lookup(keys_U),
        "flight": lambda: client.lookup(keys_U),
        "partition_out": lambda: partition.lookup(keys_U, out=out_UD),
        "flight_out": lambda: client.lookup(keys_U, out=out_UD),
    }


def section_of(timings: Timings, num_keys: int, info: Any, prefix: str) -> Section:
    """Return ratios, rows and bytes per second."""
    figures: dict[str, float] = {
        f"{prefix}flight_vs_local": timings.speedup("flight", "partition"),
        f"{prefix}flight_vs_local_fastest": timings.fastest_speedup("flight", "partition"),
        f"{prefix}flight_out_vs_local": timings.speedup("flight_out", "partition_out"),
        f"{prefix}flight_out_vs_local_fastest": timings.fastest_speedup("flight_out", "partition_out"),
    }
    for name in timings.seconds:
        figures[f"{prefix}{name}_rows_per_s"] = num_keys / timings.median(name)
        figures[f"{prefix}{name}_mb_per_s"] = num_keys * info.row_bytes / timings.median(name) / 1e6
    return Section(f"{num_keys:,} random keys over loopback, {info.dim} x {info.dtype}", figures)


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


def make_vectors(folder: Path, num_rows: int) -> "FeatureStore":
    """Make a store of drawn visual vectors."""
    from benchmarks.store.data import EXTRACTOR, uris_of
    from featurestore import FeatureRows, FeatureStore, StoreInfo

    store = FeatureStore.create(folder, StoreInfo(dim=_VECTOR_DIM, dtype="float32", extractor=EXTRACTOR))
    values_ND = np.random.default_rng(1).standard_normal((num_rows, _VECTOR_DIM), dtype=np.float32)
    store.put(FeatureRows.of(uris_of(range(num_rows)), values_ND))
    return store


@app.command()
def main(
    json_path: JsonPath = None,
    rows: Annotated[int, typer.Option(help="Rows of 4096 bfloat16 numbers.", min=1000, max=1 << 24)] = 16_384,
    keys: Annotated[int, typer.Option(help="Random keys of one lookup.", min=1, max=1 << 20)] = 8192,
    rounds: Annotated[int, typer.Option(help="Lookups of each kind.", min=3, max=10_000)] = 25,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where to put the data; about 30 kB per row.")] = None,
) -> None:
    """Measure lookups at a feature server over loopback against those of a partition: features, and visual vectors."""
    from benchmarks.store.__main__ import working_folder
    from benchmarks.store.data import Bench

    with working_folder(folder) as work, progress_bars() as progress:
        wide = Bench(work, rows, keys, rounds, 1, progress, 0).make_store().store
        narrow = make_vectors(work / "vectors", rows * _VECTORS_PER_ROW)
        sections = []
        for store, count, prefix in ((wide, keys, ""), (narrow, keys * _VECTORS_PER_ROW, "vectors_")):
            timings = measure(store, work / "cache", count, rounds, progress)
            sections.append(section_of(timings, count, store.info, prefix))
    write_sections(sections, json_path)


if __name__ == "__main__":
    run_app(app)
