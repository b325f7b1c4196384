"""Measure compact features: samples per second against the full width, its own products and FuxiCTR; and bytes.

    python -m benchmarks.compact --json data/bench/compact.json

The paper-shaped workload is trained at both widths in interleaved rounds, each run a process of its own; beside them,
on the same compact rows, E and the worker model in isolation, and FuxiCTR's layer in the place of E. What they keep of
GAUC is a table of stores (benchmarks/tables/beyond.yaml).
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, TimeElapsedColumn

from benchmarks.report import JsonPath, Section, write_sections
from benchmarks.workload import Knobs, make
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars, text_column

app = CommandApp(report=True, failures=(OSError,))


@app.command()
def main(
    json_path: JsonPath = None,
    folder: Annotated[Path, typer.Option("--dir", help="Of the workload, which is kept.")] = Path("data/bench/compact"),
    dims: Annotated[int, typer.Option(min=1, help="Numbers of a compact row.")] = 256,
    rounds: Annotated[int, typer.Option(help="Of all variants.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Of a run.", min=2)] = 24,
    images: Annotated[int, typer.Option(help="Of the store.", min=100)] = Knobs.images,
    dim: Annotated[int, typer.Option(help="Width of a full row.", min=2)] = Knobs.dim,
    samples_per_rank: Annotated[int, typer.Option(help="Of a step.", min=1)] = Knobs.samples_per_rank,
) -> None:
    """Measure compact features compared with the full width."""
    from benchmarks.compact.sections import speed_sections

    columns = text_column(), BarColumn(), TimeElapsedColumn()
    knobs = Knobs(images=images, dim=dim, samples_per_rank=samples_per_rank)
    with tempfile.TemporaryDirectory(prefix="compact-bench-") as scratch, progress_bars(*columns) as progress:
        workload = make(folder, knobs, progress)
        sections = speed_sections(workload, Path(scratch), dims, rounds, steps, progress)
    run = {"images": images, "dim": dim, "dims": dims, "samples_per_rank": samples_per_rank, "rounds": rounds}
    write_sections([*sections, Section("this run", {**run, "cores": len(os.sched_getaffinity(0))})], json_path)


if __name__ == "__main__":
    run_app(app)
