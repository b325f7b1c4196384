"""Measure the trainer against its own matrix products and against other ways to bring images into the model.

python -m benchmarks.train --json data/bench/train.json

Every variant trains the same model on the same files from the same first values, each run is a process of its own (two
under horovodrun), and ratios are of the medians of interleaved rounds of one run of this benchmark.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.report import Section, write_sections
from benchmarks.train.launch import Launcher, Outcome, RunFailedError
from benchmarks.train.rounds import DifferentLossesError, Rounds, check_losses, interleaved
from benchmarks.workload import Knobs, Workload, WorkloadError, make

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Bench:
    """What all sections share. `steps`: of a run of the trainer at one rank; slower variants make fewer."""

    workload: Workload
    scratch: Path
    rounds: int
    steps: int
    settings: Sequence[str]
    progress: Progress

    def launcher(self, ranks: int) -> Launcher:
        """Ranks on this host."""
        return Launcher(self.workload, self.scratch, ranks)

    def variants(self) -> dict[str, Callable[[], Outcome]]:
        """All that take part in the rounds, by name."""
        one, two = self.launcher(1), self.launcher(2)
        return {
            "ours": lambda: one.trainer("ours", self.steps, self.settings),
            "compute": lambda: one.peer("compute", self.steps, self.settings),
            "ours_2_ranks": lambda: two.trainer("ours", max(2, self.steps // 2), self.settings),
        }


_SAME_BATCHES = (("ours", "compute"), ("ours_2_ranks",))


def measure(bench: Bench, only: Sequence[str]) -> list[Section]:
    """All sections, the headline first. Raises RunFailedError, DifferentLossesError."""
    variants = bench.variants()
    chosen = {name: run for name, run in variants.items() if not only or name in only}
    warm = bench.progress.add_task("build the cache of the store", total=None)
    bench.launcher(1).trainer("warm", 2)
    bench.progress.update(warm, total=1, completed=1)
    rounds = interleaved(chosen, bench.rounds, bench.progress, "rounds")
    for same in _SAME_BATCHES:
        check_losses(rounds, same)
    return [Section("headline", headline(rounds)), Section("samples per second", grid=rounds.grid())]


def headline(rounds: Rounds) -> dict[str, float | None]:
    """The figures that have a target."""
    return {
        "step_vs_compute": rounds.ratio("compute", "ours"),
        "two_ranks_vs_one": rounds.ratio("ours_2_ranks", "ours"),
        "samples_per_s": rounds.speed("ours") if "ours" in rounds else None,
    }


@app.command()
def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Of the workload, which is kept.")] = Path(
        "data/bench/workload"
    ),
    rounds: Annotated[int, typer.Option(help="Of all variants.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Of a run at one rank.", min=2)] = 24,
    only: Annotated[list[str] | None, typer.Option(help="A variant to run; may be repeated. Default: all.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="One setting of every run.")
    ] = None,
    images: Annotated[int, typer.Option(help="Of the store.", min=100)] = Knobs.images,
    dim: Annotated[int, typer.Option(help="Width of a feature.", min=2)] = Knobs.dim,
    samples_per_rank: Annotated[int, typer.Option(help="Of a step.", min=1)] = Knobs.samples_per_rank,
) -> None:
    """Measure the trainer against its own matrix products and against other ways to bring images into the model."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    knobs = Knobs(images=images, dim=dim, samples_per_rank=samples_per_rank)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="train-bench-") as scratch,
            Progress(*columns, console=Console(stderr=True)) as progress,
        ):
            workload = make(folder, knobs, progress)
            bench = Bench(workload, Path(scratch), rounds, steps, settings or [], progress)
            sections = measure(bench, only or [])
    except (WorkloadError, RunFailedError, DifferentLossesError) as failure:
        print(f"error: {failure}")
        raise typer.Exit(1) from failure
    write_sections(sections, json_path)


if __name__ == "__main__":
    app()
