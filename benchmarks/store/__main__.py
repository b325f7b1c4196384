"""Measure the store against numpy.take, LMDB, Lance and plain pyarrow; ratios are of one run.

python -m benchmarks.store --json build/bench/store.json
"""

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, TimeElapsedColumn

from benchmarks.report import JsonPath, Section, write_sections
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars, text_column

if TYPE_CHECKING:
    from benchmarks.store.data import Bench

_HEADLINE = [
    "lookup_vs_numpy_take",
    "lookup_vs_numpy_take_10_deltas",
    "lookup_vs_lmdb",
    "lookup_vs_lance",
    "warm_open_s",
    "cache_build_vs_list_column",
]

app = CommandApp(report=True, failures=(OSError,))


class Part(StrEnum):
    """What can be measured by itself."""

    warm = "warm"
    build = "build"


def measure(bench: "Bench", parts: Collection[Part] = tuple(Part)) -> list[Section]:
    """Measure the sections of these parts, the headline first."""
    from benchmarks.store.sections import cache_figures, delta_figures, fill_peers, warm_figures

    held = bench.make_store()
    newest = replace(held, version=bench.add_deltas(held))
    built = [cache_figures(bench, held, newest)] if Part.build in parts else []
    sections = []
    if Part.warm in parts:
        folder = bench.folder / "peers"
        peers = fill_peers(held, folder, bench.progress)
        sections.append(warm_figures(bench, held, peers, folder / "cache"))
        sections.append(delta_figures(bench, held, newest, folder / "cache"))
        shutil.rmtree(folder)
    sections += built
    figures = {name: value for section in sections for name, value in section.flat().items()}
    return [Section("headline", {name: figures[name] for name in _HEADLINE if name in figures}), *sections]


@contextmanager
def working_folder(parent: Path | None) -> Iterator[Path]:
    """Make a folder that is gone afterwards."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="store-bench-", dir=parent) as name:
        yield Path(name)


@app.command()
def main(
    json_path: JsonPath = None,
    rows: Annotated[int, typer.Option(help="Rows of 4096 bfloat16 numbers.", min=1000)] = 100_000,
    keys: Annotated[int, typer.Option(help="Random keys of one lookup.", min=1)] = 4096,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where to put the data; about 70 kB per row.")] = None,
    threads: Annotated[int, typer.Option(help="That build the cache, on both sides.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Of lookups; builds take a fifth of them.", min=3)] = 60,
    seed: Annotated[int, typer.Option(help="Of the drawn rows and keys.")] = 0,
    only: Annotated[
        list[Part] | None, typer.Option(help="Measure this part; may be repeated.", show_default="all")
    ] = None,
) -> None:
    """Measure the store against numpy.take, LMDB, Lance and plain pyarrow."""
    columns = text_column(), BarColumn(), TimeElapsedColumn()
    from benchmarks.store.data import DIM, Bench, cores

    with working_folder(folder) as work, progress_bars(*columns) as progress:
        bench = Bench(work, rows, keys, rounds, threads, progress, seed)
        sections = measure(bench, only or tuple(Part))
    run = {"rows": rows, "dim": DIM, "keys_per_lookup": keys, "threads": threads, "rounds": rounds, "cores": cores()}
    write_sections([*sections, Section("this run", run)], json_path)


if __name__ == "__main__":
    run_app(app)
