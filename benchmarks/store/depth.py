"""Opening a store that is 1, 10, 100 snapshots deep, before and after compaction.

One base, then commits that each replace 1 % of the rows, in every shard. At each depth a copy (hard links: files of a
store never change) is compacted. Measured are, with everything in the page cache:

- open: `FeatureStore.open(url).snapshot()`, which lists the log and reads one manifest;
- load: a partition of it whose cache is there;
- build: a partition of it whose cache is not there, so all files are read and merged.

The newest snapshot is opened and so is the first: what came after it must not matter.
"""

import os
import shutil
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.report import Figure, Section
from benchmarks.store.data import DIM, EXTRACTOR, Bench, Held, uris_of
from benchmarks.timing import interleaved
from featurestore import FeaturePartition, FeatureRows, FeatureStore, StoreInfo
from featurestore.upkeep.compaction import compact

_NUM_SHARDS = 16
_MOST_ROWS = 10_000
_CHANGED_SHARE = 0.01


def depth_figures(bench: Bench, held: Held, depths: Sequence[int]) -> Section:
    """Measure milliseconds at each of `depths`, ascending."""
    count = min(_MOST_ROWS, bench.num_rows)
    store = FeatureStore.create(bench.folder / "deep", StoreInfo(dim=DIM, extractor=EXTRACTOR, num_shards=_NUM_SHARDS))
    store.put(FeatureRows.of(uris_of(range(count)), held.matrix_ND[:count]))
    rng = np.random.default_rng(bench.seed + 4)
    grid: dict[str, dict[str, Figure]] = {}
    task = bench.progress.add_task("commits for depth", total=max(depths))
    for depth in range(1, max(depths) + 1):
        if depth > 1:
            changed_K = rng.choice(count, max(_NUM_SHARDS, int(count * _CHANGED_SHARE)), replace=False)
            store.put(FeatureRows.of(uris_of(changed_K), held.matrix_ND[changed_K]))
        bench.progress.update(task, completed=depth)
        if depth in depths:
            grid[f"{depth}_deep"] = _measure(bench, store)
            copy = bench.folder / "compacted"
            shutil.copytree(store.url, copy, copy_function=os.link)
            compacted = FeatureStore.open(copy)
            compact(compacted, force=True)
            grid[f"{depth}_deep_compacted"] = _measure(bench, compacted)
            shutil.rmtree(copy)
    shutil.rmtree(store.url)
    return Section(f"opening {count:,} rows in {_NUM_SHARDS} shards", {}, grid, prefix="open_")


def _measure(bench: Bench, store: FeatureStore) -> dict[str, Figure]:
    cache = bench.folder / "deep-cache"

    def load() -> None:
        FeaturePartition.load(store.url, cache_dir=cache, threads=bench.threads).close()

    def build() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        load()

    variants: dict[str, Callable[[], object]] = {
        "open_ms": lambda: FeatureStore.open(store.url).snapshot(),
        "open_first_ms": lambda: FeatureStore.open(store.url).snapshot(1),
        "load_ms": load,
    }
    manifest = store.snapshot().manifest
    title = f"open {manifest.version} deep, {manifest.num_files} files"
    built = interleaved({"build_ms": build}, 3, bench.progress, title)
    opened = interleaved(variants, max(3, bench.rounds // 8), bench.progress, title)
    shutil.rmtree(cache)
    return {
        **{name: opened.median(name) * 1000 for name in variants},
        "build_ms": built.fastest("build_ms") * 1000,
        "files": manifest.num_files,
    }
