"""A store ten times a memory limit, built into the cache and served from it by a process that has no more memory.

The process is one of its own; before it opens the store it sets RLIMIT_DATA to what the started interpreter has and
`limit_mb` more. That limits all private memory: of Python, numpy, Arrow and the stacks of threads. It does not limit
the pages of mapped files, which the kernel keeps while there is room and drops when there is none: that is the point of
a mapped cache. That the limit holds is tried first: to read the features into an array fails with MemoryError.

A row is made from its key, so that the process knows every right answer without holding the rows.
"""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.report import Figure, Section
from benchmarks.store.data import DIM, EXTRACTOR, Bench, Matrix, cores
from featurestore import FeaturePartition, FeatureRows, FeatureStore, StoreInfo, to_bits
from featurestore.keys import Int64Array, shard_of

TIMES_OVER = 10.5
_NUM_SHARDS = 64
_LOOKUP_KEYS = 512
_LOOKUPS = 160
_PATTERNS = 251  # a prime, so that neither keys nor shards go round with them


def limit_figures(bench: Bench, limit_mb: int) -> Section:
    """Write the store, and have it served under the limit. Raises CalledProcessError where that fails."""
    url, folder = bench.folder / "large", bench.folder / "large-cache"
    num_rows = int(limit_mb * 2**20 * TIMES_OVER / (DIM * 2))
    write_large(bench, url, num_rows)
    task = bench.progress.add_task(f"serve {num_rows:,} rows with {limit_mb} MB", total=None)
    command = [sys.executable, "-m", "benchmarks.store.limit", str(url), str(folder), str(limit_mb), str(num_rows)]
    command.append(str(bench.threads))
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # Arrow's own reserves a gigabyte, which counts
    served = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    bench.progress.update(task, total=1, completed=1)
    figures: dict[str, Figure] = json.loads(served.stdout)
    size_mb = num_rows * DIM * 2 / 2**20
    head = {"memory_limit_mb": limit_mb, "store_over_limit": size_mb / limit_mb}
    sizes = {"limit_store_mb": size_mb, "limit_shard_mb": size_mb / _NUM_SHARDS}
    return Section("a store larger than memory", {**head, **sizes, **figures})


def write_large(bench: Bench, url: Path, num_rows: int) -> None:
    """Write rows of `num_rows` keys, one commit for each shard."""
    store = FeatureStore.create(url, StoreInfo(dim=DIM, extractor=EXTRACTOR, num_shards=_NUM_SHARDS))
    keys_N = large_keys(num_rows)
    shard_N = shard_of(keys_N, _NUM_SHARDS)

    def put(shard: int) -> None:
        here_M = keys_N[shard_N == shard]
        store.put(FeatureRows.of([str(key) for key in here_M], features_of(here_M), keys=here_M))

    with ThreadPoolExecutor(cores()) as pool:
        written = pool.map(put, range(_NUM_SHARDS))
        for _ in bench.progress.track(written, total=_NUM_SHARDS, description=f"write {num_rows:,} rows"):
            pass


def large_keys(num_rows: int) -> Int64Array:
    """Return the keys of the large store."""
    return np.random.default_rng(0).integers(-(2**63), 2**63, num_rows, dtype=np.int64)


def features_of(keys_U: Int64Array) -> Matrix:
    """Make the rows of keys: one of some patterns, the key itself in its first numbers, (U, D) bits of bfloat16."""
    features_UD = _patterns()[keys_U % _PATTERNS]
    for place in range(5):  # 14 bits each: finite whatever they are
        features_UD[:, place] = (keys_U.view(np.uint64) >> np.uint64(14 * place)) & np.uint64(0x3FFF)
    return features_UD


@cache
def _patterns() -> Matrix:
    values = np.maximum(np.random.default_rng(1).standard_normal((_PATTERNS, DIM), dtype=np.float32), 0)
    return to_bits(values, "bfloat16")


def serve(url: str, folder: str, limit_mb: int, num_rows: int, threads: int) -> dict[str, Figure]:
    """Build and look up under the limit; every answer is compared."""
    threading.stack_size(1 << 20)  # eight times as much by default, and all of it counts, used or not
    limit = data_bytes() + (limit_mb << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        np.ones((num_rows, DIM), np.uint16)
    except MemoryError:
        pass
    else:
        raise AssertionError(f"a limit of {limit_mb} MB did not keep an array of all rows from being made")
    start = time.perf_counter()
    with peak_of_data() as peak:
        partition = FeaturePartition.load(url, cache_dir=folder, threads=threads)
    built = time.perf_counter()
    wrong = sum(not np.array_equal(found, features_of(keys)) for keys, found in lookups(partition, num_rows))
    if wrong or partition.num_rows != num_rows:
        raise AssertionError(
            f"{wrong} of {_LOOKUPS} lookups are wrong; {partition.num_rows} rows instead of {num_rows}"
        )
    partition.close()
    opened = time.perf_counter()
    partition = FeaturePartition.load(url, cache_dir=folder, threads=1)
    ready = time.perf_counter()
    seconds = []
    for keys in draw_keys(num_rows):
        begin = time.perf_counter()
        partition.lookup(keys)
        seconds.append(time.perf_counter() - begin)
    return {
        "limit_cache_build_rows_per_s": num_rows / (built - start),
        "limit_cache_build_peak_mb": peak[0] / 2**20,
        "limit_open_s": ready - opened,
        "limit_lookup_rows_per_s": _LOOKUP_KEYS / float(np.median(seconds)),
        "limit_checked_rows": _LOOKUPS * _LOOKUP_KEYS,
    }


def lookups(partition: FeaturePartition, num_rows: int) -> Iterator[tuple[Int64Array, Matrix]]:
    """Yield random keys and what the partition gives for them."""
    for keys in draw_keys(num_rows):
        yield keys, partition.lookup(keys).features_UD


def draw_keys(num_rows: int) -> Iterator[Int64Array]:
    """Draw random keys of the large store, lookup by lookup."""
    keys_N = large_keys(num_rows)
    rng = np.random.default_rng(2)
    for _ in range(_LOOKUPS):
        yield rng.choice(keys_N, _LOOKUP_KEYS)


@contextmanager
def peak_of_data() -> Iterator[list[int]]:
    """Measure the most private memory in the block beyond what there was before, bytes, looked at every millisecond."""
    before, peak, ended = data_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            peak[0] = max(peak[0], data_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def data_bytes() -> int:
    """Read the private memory that this process may write, as RLIMIT_DATA counts it, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    print(json.dumps(serve(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))))
