"""Measure the trainer against its own matrix products and against other ways to bring images into the model.

python -m benchmarks.train --json data/bench/train.json

Every variant trains the same model on the same files from the same first values, each run is a process of its own (two
under horovodrun), and ratios are of the medians of interleaved rounds of one run of this benchmark. The section
"compact" measures rows of fewer numbers. `--small` measures batches of 512 and 2,048 against FuxiCTR, on the demo.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, TimeElapsedColumn

from benchmarks.process import RunFailedError
from benchmarks.quality.runs import fuxictr_python
from benchmarks.report import JsonPath, Section, write_sections
from benchmarks.train.sections import COMPACT, FUXICTR, VARIANTS, Bench, measure
from benchmarks.train.small import BATCHES, KINDS, small_section
from benchmarks.workload import Knobs, make
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars, text_column

app = CommandApp(report=True, failures=(OSError,))
NAMES = (*VARIANTS, COMPACT)
_QUIET_SPREAD = 1.5


def known(names: list[str]) -> list[str]:
    """Check the names of variants."""
    if strange := [name for name in names if name not in NAMES]:
        raise typer.BadParameter(f"{', '.join(strange)}: choose among {', '.join(NAMES)}", param_hint="--only")
    return names


def check_fuxictr(chosen: list[str]) -> None:
    """Print that FuxiCTR is left out where it is not installed; where it was asked for by name, that is an error."""
    if fuxictr_python().exists():
        return
    missing = "FuxiCTR is not installed in this environment (make bench installs it)"
    if asked := [name for name in chosen if name in FUXICTR]:
        raise RunFailedError(f"{', '.join(asked)}: {missing}")
    if not chosen:
        print(f"note: {missing}; its figures are left out", file=sys.stderr)


def spread(sections: list[Section]) -> float:
    """Compute the fastest over the slowest round of the variant in which they differ most."""
    cells = [each for section in sections for each in section.grid.values() if "slowest" in each]
    return max((float(each["fastest"] or 0) / float(each["slowest"] or 1) for each in cells), default=1.0)


@app.command()
def main(
    json_path: JsonPath = None,
    folder: Annotated[Path, typer.Option("--dir", help="Of the workload, which is kept.")] = Path(
        "data/bench/workload"
    ),
    rounds: Annotated[int, typer.Option(help="Of all variants.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Of a run at one rank.", min=2)] = 24,
    dims: Annotated[int, typer.Option(help="Numbers of a compact row.", min=1)] = 256,
    only: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(NAMES)}; may be repeated. Default: all.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="One setting of every run.")
    ] = None,
    images: Annotated[int, typer.Option(help="Of the store.", min=100)] = Knobs.images,
    dim: Annotated[int, typer.Option(help="Width of a feature.", min=2)] = Knobs.dim,
    samples_per_rank: Annotated[int, typer.Option(help="Of a step.", min=1)] = Knobs.samples_per_rank,
    seed: Annotated[int, typer.Option(help="Of the workload.", min=0)] = Knobs.seed,
    small: Annotated[bool, typer.Option("--small", help="Batches of 512 and 2,048 against FuxiCTR, alone.")] = False,
    demo: Annotated[Path, typer.Option(help="Of --small: a demo's folder.")] = Path("data/demo"),
    kind: Annotated[Literal["ids", "images"] | None, typer.Option(help="Of --small. Default: both.")] = None,
    batch: Annotated[int | None, typer.Option(help="Of --small. Default: both.", min=1)] = None,
) -> None:
    """Measure the trainer against its own matrix products and against other ways to bring images into the model."""
    chosen = known(only or [])
    check_fuxictr([FUXICTR[0]] if small else chosen)
    columns = text_column(), BarColumn(), TimeElapsedColumn()
    if small:
        with tempfile.TemporaryDirectory(prefix="train-bench-") as scratch, progress_bars(*columns) as progress:
            section = small_section(
                demo, Path(scratch), [kind] if kind else KINDS, [batch] if batch else BATCHES, rounds, progress
            )
        write_sections([section], json_path)
        return
    knobs = Knobs(images=images, dim=dim, samples_per_rank=samples_per_rank, seed=seed)
    with (
        tempfile.TemporaryDirectory(prefix="train-bench-") as scratch,
        progress_bars(*columns) as progress,
    ):
        workload = make(folder, knobs, progress)
        bench = Bench(workload, Path(scratch), rounds, steps, dims, settings or [], progress)
        sections = measure(bench, chosen)
    if (worst := spread(sections)) > _QUIET_SPREAD:
        print(f"warning: one round was {worst:.1f} times as fast as another: this machine was busy", file=sys.stderr)
    run = {
        "images": images,
        "dim": dim,
        "dims": dims,
        "samples_per_rank": samples_per_rank,
        "steps": steps,
        "rounds": rounds,
    }
    write_sections([*sections, Section("this run", {**run, "cores": len(os.sched_getaffinity(0))})], json_path)


if __name__ == "__main__":
    run_app(app)
