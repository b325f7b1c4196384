"""Measure the store against numpy.take, LMDB, RocksDB, Lance and plain pyarrow; ratios are of one run.

python -m benchmarks.store --json build/bench/store.json
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.report import Section, write_sections
from benchmarks.store.builds import cache_figures, write_figures
from benchmarks.store.cold import cold_figures
from benchmarks.store.data import DIM, Bench, cores
from benchmarks.store.lookup import delta_figures, warm_figures
from benchmarks.store.peers import fill_peers

_HEADLINE = [
    "lookup_vs_numpy_take",
    "lookup_vs_numpy_take_10_deltas",
    "lookup_vs_lmdb",
    "lookup_vs_lance",
    "lookup_vs_rocksdb",
    "warm_open_s",
    "cache_build_vs_list_column",
    "store_over_limit",
]


def measure(bench: Bench) -> list[Section]:
    """All sections, the headline first."""
    held = bench.make_store()
    newest = replace(held, version=bench.add_deltas(held))
    sections = [cache_figures(bench, held, newest), write_figures(bench, held)]
    peers = fill_peers(held, bench.folder / "peers", bench.progress)
    sections = [
        warm_figures(bench, held, peers),
        delta_figures(bench, held, newest, peers["store"].folder),
        cold_figures(bench, held, peers),
        *sections,
    ]
    figures = {name: value for section in sections for name, value in section.flat().items()}
    return [Section("headline", {name: figures[name] for name in _HEADLINE if name in figures}), *sections]


@contextmanager
def working_folder(parent: Path | None) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="store-bench-", dir=parent) as name:
        yield Path(name)


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of 4096 bfloat16 numbers.", min=1000)] = 100_000,
    keys: Annotated[int, typer.Option(help="Random keys of one lookup.", min=1)] = 4096,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where to put the data; about 70 kB per row.")] = None,
    threads: Annotated[int, typer.Option(help="That build the cache, on both sides.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Of lookups; builds take a fifth of them.", min=3)] = 60,
    seed: Annotated[int, typer.Option(help="Of the drawn rows and keys.")] = 0,
) -> None:
    """Measure the store against numpy.take, LMDB, RocksDB, Lance and plain pyarrow."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with working_folder(folder) as work, Progress(*columns, console=Console(stderr=True)) as progress:
        sections = measure(Bench(work, rows, keys, rounds, threads, progress, seed))
    run = {"rows": rows, "dim": DIM, "keys_per_lookup": keys, "threads": threads, "rounds": rounds, "cores": cores()}
    write_sections([*sections, Section("this run", run)], json_path)


if __name__ == "__main__":
    typer.run(main)
