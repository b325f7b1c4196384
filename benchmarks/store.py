"""How fast the store serves features, beside what else one could use. Prints ratios taken in one run.

    python -m benchmarks.store --json build/bench/store.json

- lookup: random keys from a partition, against numpy.take with known row numbers on the same matrix in RAM, and against
  LMDB; all in one thread. Once into new memory and once into a buffer: the ratio to numpy.take is the lower of the two.
- warm open: `FeaturePartition.load` with its cache files there.
- cache build: from the store's Parquet files, against the same rows in a list column, with the same compression, row
  groups, batches and threads, into the same files. The store checks a digest of each file, the list its page checksums.
  A list column of bfloat16 is one of its bits in uint16; the same bits taken for float16 stand beside it.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import lmdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.report import Figure, write_report
from benchmarks.timing import interleaved_medians
from featurestore import ExtractorSpec, FeaturePartition, FeatureRows, FeatureStore, StoreInfo, to_bits
from featurestore.cache import append_rows, open_or_build
from featurestore.datafile import ROW_GROUP_BYTES

DIM = 4096
PART_ROWS = 4096
LOOKUP_KEYS = 4096
BATCH_BYTES = 2 << 20  # as the store reads: larger ones are slower for lists too
EXTRACTOR = ExtractorSpec(
    backbone="drawn", layer="none", weights_digest="none", preprocessing="none", compute_dtype="bfloat16"
)

Rows = npt.NDArray[np.uint16]


@dataclass
class Bench:
    """The data of one run, and where it lies."""

    folder: Path
    num_rows: int
    threads: int
    progress: Progress
    seed: int
    keys_N: npt.NDArray[np.int64] = field(init=False)
    matrix_ND: Rows = field(init=False)
    store: FeatureStore = field(init=False)

    def make_store(self) -> None:
        """Draw rows (half of the numbers are 0, as after a ReLU) and write them as the extractor does."""
        rng = np.random.default_rng(self.seed)
        info = StoreInfo(dim=DIM, extractor=EXTRACTOR)
        self.store = FeatureStore.create(self.folder / "store", info)
        self.matrix_ND = np.empty((self.num_rows, DIM), np.uint16)
        keys = []
        starts = range(0, self.num_rows, PART_ROWS)
        for start in self.progress.track(starts, description="draw and stage rows"):
            count = min(PART_ROWS, self.num_rows - start)
            values = np.maximum(rng.standard_normal((count, DIM), dtype=np.float32), 0)
            rows = FeatureRows.of([f"{i}.jpg" for i in range(start, start + count)], to_bits(values, "bfloat16"))
            self.store.stage_part("bench", f"{start:09d}", rows)
            self.matrix_ND[start : start + count] = rows.features_ND
            keys.append(rows.keys_N)
        self.keys_N = np.concatenate(keys)
        parts = self.store.staged_parts("bench")
        shards = range(info.num_shards)
        with ThreadPoolExecutor(cores()) as pool:
            built = pool.map(lambda shard: self.store.build_shard("bench", shard, parts), shards)
            entries = dict(
                zip(shards, self.progress.track(built, total=len(shards), description="build shards"), strict=True)
            )
        self.store.commit({shard: entry for shard, entry in entries.items() if entry}, "extract")
        self.store.discard_staging("bench")

    def make_list_columns(self, name: str, value_type: pa.DataType) -> Path:
        """The same shards with the feature as a fixed-size list."""
        folder = self.folder / name
        folder.mkdir()
        snapshot = self.store.snapshot()
        for shard in self.progress.track(range(self.store.info.num_shards), description=f"write {name}"):
            rows = snapshot.read_shard(shard)
            bits = np.ascontiguousarray(rows.features_ND).reshape(-1)
            values = pa.array(bits).view(value_type)
            table = pa.table({"key": pa.array(rows.keys_N), "feature": pa.FixedSizeListArray.from_arrays(values, DIM)})
            group = ROW_GROUP_BYTES // (DIM * 2)
            pq.write_table(
                table, folder / f"{shard}.parquet", row_group_size=group, compression="lz4", use_dictionary=False,
                write_page_checksum=True,
            )  # fmt: skip
        return folder

    def make_lmdb(self) -> lmdb.Environment:
        """The same rows in LMDB, by the key's eight bytes."""
        size = int(self.matrix_ND.nbytes * 1.7) + (64 << 20)
        environment = lmdb.open(str(self.folder / "lmdb"), map_size=size, sync=False)
        order_N = np.argsort(self.keys_N.view(np.uint64))  # appended in its own order: the best case for its tree
        with environment.begin(write=True) as transaction:
            for i in self.progress.track(order_N, description="fill LMDB"):
                transaction.put(int(self.keys_N[i]).to_bytes(8, "big", signed=True), self.matrix_ND[i].tobytes())
        return environment


def cache_from_lists(source: Path, target: Path, num_shards: int, threads: int) -> None:
    """What `FeaturePartition.load` builds, from list columns."""
    target.mkdir(exist_ok=True)

    def build(shard: int) -> None:
        keys = []
        file = pq.ParquetFile(source / f"{shard}.parquet", page_checksum_verification=True)
        with file, (target / f"{shard}.rows.bin").open("xb", buffering=0) as rows:
            for batch in file.iter_batches(BATCH_BYTES // (DIM * 2), use_threads=False):
                column: Any = batch["feature"]
                feature = column.flatten()
                values = np.frombuffer(feature.buffers()[1], np.uint16)
                append_rows(rows, values[feature.offset : feature.offset + len(feature)])
                keys.append(batch["key"].to_numpy())
        np.save(target / f"{shard}.keys.npy", np.concatenate(keys))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(build, range(num_shards)))


def cache_figures(bench: Bench, repeats: int) -> dict[str, Figure]:
    """Builds of the cache, from a warm page cache, and its opening."""
    shards = bench.store.info.num_shards
    lists = {
        "list of uint16": bench.make_list_columns("list-uint16", pa.uint16()),
        "list of float16": bench.make_list_columns("list-float16", pa.float16()),
    }
    scratch = bench.folder / "cache"

    readers = [bench.store.snapshot().shard_reader(shard) for shard in range(shards)]
    variants: dict[str, Callable[[], object]] = {
        "cache build": lambda: open_or_build(readers, scratch, bench.threads),
        **{name: partial(cache_from_lists, source, scratch, shards, bench.threads) for name, source in lists.items()},
    }

    def begin() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        os.sync()  # or the writes of what came before slow down those of what comes next
        touch_memory(bench.num_rows * DIM * 3)

    medians = interleaved_medians(variants, repeats, bench.progress, begin)
    shutil.rmtree(scratch, ignore_errors=True)
    open_or_build(readers, scratch, bench.threads)

    def load() -> None:
        FeaturePartition.load(bench.store, cache_dir=scratch).close()

    opened = interleaved_medians({"warm open": load}, max(repeats, 5), bench.progress)
    return {
        "cache_build_vs_list_column": medians["list of uint16"] / medians["cache build"],
        "cache_build_vs_list_column_float16": medians["list of float16"] / medians["cache build"],
        "warm_open_s": opened["warm open"],
        "cache_build_rows_per_s": bench.num_rows / medians["cache build"],
        "list_uint16_build_rows_per_s": bench.num_rows / medians["list of uint16"],
        "list_float16_build_rows_per_s": bench.num_rows / medians["list of float16"],
    }


def touch_memory(size_bytes: int) -> None:
    """Have free memory at hand for the files to come. A virtual machine gives freed memory back to its host, and who
    writes next waits for it: that cost up to four times the rest of a build, and hit the variants at random."""
    np.ones(size_bytes // 8)


def lmdb_get(environment: lmdb.Environment, keys_U: npt.NDArray[np.int64], out_UD: Rows) -> None:
    """One read transaction; values are views into its map, copied once."""
    big_endian = keys_U.astype(">i8").tobytes()
    with environment.begin(buffers=True) as transaction:
        for i in range(len(keys_U)):
            value: Any = transaction.get(big_endian[8 * i : 8 * i + 8])
            out_UD[i] = np.frombuffer(value, np.uint16)


def lookup_figures(bench: Bench, repeats: int) -> dict[str, Figure]:
    """Random keys, new ones for each run, so that no variant finds the rows of another in the processor's cache."""
    environment = bench.make_lmdb()
    rng = np.random.default_rng(bench.seed + 1)
    index_U = rng.integers(0, bench.num_rows, LOOKUP_KEYS)
    out_UD = np.empty((LOOKUP_KEYS, DIM), np.uint16)
    matrix_ND, keys_N = bench.matrix_ND, bench.keys_N

    def draw() -> None:
        index_U[:] = rng.integers(0, bench.num_rows, LOOKUP_KEYS)

    cache = bench.folder / "cache"
    with (
        FeaturePartition.load(bench.store, cache_dir=cache, threads=1) as single,
        FeaturePartition.load(bench.store, cache_dir=cache, threads=cores()) as several,
    ):
        for partition in (several, single):
            check(partition.lookup(keys_N[index_U]).features_UD, matrix_ND[index_U])
        lmdb_get(environment, keys_N[index_U], out_UD)
        check(out_UD, matrix_ND[index_U])
        medians = interleaved_medians(
            {
                "numpy.take": lambda: np.take(matrix_ND, index_U, axis=0),
                "lookup": lambda: single.lookup(keys_N[index_U]),
                "lookup all cores": lambda: several.lookup(keys_N[index_U]),
                "numpy.take out": lambda: np.take(matrix_ND, index_U, axis=0, out=out_UD, mode="clip"),
                "lookup out": lambda: single.lookup(keys_N[index_U], out=out_UD),
                "lookup all cores out": lambda: several.lookup(keys_N[index_U], out=out_UD),
                "lmdb out": lambda: lmdb_get(environment, keys_N[index_U], out_UD),
            },
            repeats,
            bench.progress,
            draw,
        )
    environment.close()
    plain, into = medians["numpy.take"] / medians["lookup"], medians["numpy.take out"] / medians["lookup out"]
    figures: dict[str, Figure] = {
        "lookup_vs_numpy_take": min(plain, into),
        "lookup_vs_lmdb": medians["lmdb out"] / medians["lookup out"],
        "lookup_vs_numpy_take_allocating": plain,
        "lookup_vs_numpy_take_into_buffer": into,
        "lookup_all_cores_vs_numpy_take_allocating": medians["numpy.take"] / medians["lookup all cores"],
        "lookup_all_cores_vs_numpy_take_into_buffer": medians["numpy.take out"] / medians["lookup all cores out"],
    }
    return figures | {
        f"{name.replace('.', '_').replace(' ', '_')}_rows_per_s": LOOKUP_KEYS / seconds
        for name, seconds in medians.items()
    }


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def check(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """A fast wrong answer is no figure."""
    if not np.array_equal(found, expected):
        raise AssertionError("a lookup gave other rows than the matrix")


@contextmanager
def working_folder(parent: Path | None) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="store-bench-", dir=parent) as name:
        yield Path(name)


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of 4096 bfloat16 numbers.", min=LOOKUP_KEYS)] = 100_000,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where to put the data; about 50 kB per row.")] = None,
    threads: Annotated[int, typer.Option(help="That build the cache, on both sides.", min=1)] = 1,
    repeats: Annotated[int, typer.Option(help="Rounds of lookups; builds take a sixth of them.", min=3)] = 60,
    seed: Annotated[int, typer.Option(help="Of the drawn rows and keys.")] = 0,
) -> None:
    """Measure the store against numpy.take, LMDB and list columns."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with working_folder(folder) as work, Progress(*columns, console=Console(stderr=True)) as progress:
        bench = Bench(work, rows, threads, progress, seed)
        bench.make_store()
        built = cache_figures(bench, max(3, repeats // 6))
        looked_up = lookup_figures(bench, repeats)
    headline = ["lookup_vs_numpy_take", "lookup_vs_lmdb", "warm_open_s", "cache_build_vs_list_column"]
    figures = {**looked_up, **built}
    figures = {name: figures[name] for name in [*headline, *sorted(figures.keys() - set(headline))]}
    write_report(
        {
            **figures,
            "rows": rows,
            "dim": DIM,
            "keys_per_lookup": LOOKUP_KEYS,
            "threads": threads or "default",
            "cores": cores(),
        },
        json_path,
    )


if __name__ == "__main__":
    typer.run(main)
