"""Measure the store against numpy.take, LMDB and Lance; ratios are of one run.

python -m benchmarks.store --json build/bench/store.json
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.report import JsonPath, Section, this_run, write_sections
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars

if TYPE_CHECKING:
    from benchmarks.store.data import Bench

app = CommandApp(report=True, failures=(OSError,))


def measure(bench: "Bench") -> list[Section]:
    """Measure all sections."""
    from benchmarks.store.sections import delta_figures, fill_peers, warm_figures

    held = bench.make_store()
    newest = replace(held, version=bench.add_deltas(held))
    peers, cache = fill_peers(held, bench.folder / "peers", bench.progress), bench.folder / "cache"
    return [warm_figures(bench, held, peers, cache), delta_figures(bench, held, newest, cache)]


@app.command()
def main(
    json_path: JsonPath = None,
    rows: Annotated[int, typer.Option(help="Rows of 4096 bfloat16 numbers.", min=1000)] = 100_000,
    keys: Annotated[int, typer.Option(help="Random keys of one lookup.", min=1)] = 4096,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where to put the data; about 55 kB per row.")] = None,
    rounds: Annotated[int, typer.Option(help="Of lookups.", min=3)] = 60,
    seed: Annotated[int, typer.Option(help="Of the drawn rows and keys.")] = 0,
) -> None:
    """Measure the store against numpy.take, LMDB and Lance."""
    from benchmarks.store.data import DIM, Bench

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="store-bench-", dir=folder) as work, progress_bars() as progress:
        sections = measure(Bench(Path(work), rows, keys, rounds, progress, seed))
    write_sections([*sections, this_run(rows=rows, dim=DIM, keys_per_lookup=keys, rounds=rounds)], json_path)


if __name__ == "__main__":
    run_app(app)
