"""Measure the trainer against its own matrix products and against other ways to bring images into the model.

python -m benchmarks.train --json data/bench/train.json

Every variant trains the same model on the same files from the same first values, each run is a process of its own (two
under horovodrun), and ratios are of the medians of interleaved rounds of one run of this benchmark. The section
"compact" measures rows of fewer numbers. `--small` measures batches of 512 and 2,048 against FuxiCTR, on the demo.
"""

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from benchmarks.problems import Problem
from benchmarks.process import RunFailedError, fuxictr_python
from benchmarks.report import JsonPath, this_run, write_sections
from benchmarks.train.sections import COMPACT, FUXICTR, VARIANTS, Bench, measure
from benchmarks.workload import Knobs, make
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars

app = CommandApp(report=True, failures=(OSError,))
NAMES = (*VARIANTS, COMPACT)


def known(names: list[str]) -> list[str]:
    """Check the names of variants."""
    if strange := [name for name in names if name not in NAMES]:
        raise typer.BadParameter(Problem.NO_SUCH_NAME.of(", ".join(strange), ", ".join(NAMES)), param_hint="--only")
    return names


def check_fuxictr(chosen: list[str]) -> None:
    """Print that FuxiCTR is left out where it is not installed; where it was asked for by name, that is an error."""
    if fuxictr_python().exists():
        return
    if asked := [name for name in chosen if name in FUXICTR]:
        raise RunFailedError(Problem.NO_FUXICTR, ", ".join(asked))
    if not chosen:
        print(f"note: {Problem.NO_FUXICTR.of(', '.join(FUXICTR))}; its figures are left out", file=sys.stderr)


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
    from benchmarks.train.small import BATCHES, KINDS, small_section

    chosen = known(only or [])
    check_fuxictr([FUXICTR[0]] if small else chosen)
    with tempfile.TemporaryDirectory(prefix="train-bench-") as scratch, progress_bars() as progress:
        if small:
            kinds, batches = [kind] if kind else KINDS, [batch] if batch else BATCHES
            sections = [small_section(demo, Path(scratch), kinds, batches, rounds, progress)]
        else:
            knobs = Knobs(images=images, dim=dim, samples_per_rank=samples_per_rank, seed=seed)
            workload = make(folder, knobs, progress)
            sections = measure(Bench(workload, Path(scratch), rounds, steps, dims, settings or [], progress), chosen)
            sizes: dict[str, int] = {"images": images, "dim": dim, "dims": dims, "samples_per_rank": samples_per_rank}
            sections.append(this_run(**sizes, steps=steps, rounds=rounds))
    write_sections(sections, json_path)


if __name__ == "__main__":
    run_app(app)
