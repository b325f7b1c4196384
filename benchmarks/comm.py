"""Horovod compared with torch.distributed: training on the paper-shaped workload, and collectives of a step's sizes.

    python -m benchmarks.comm [--dir DIR] [--json FILE] [--ranks 2,4]

Both train the same model, to the same first losses; their runs take turns, and ratios are of the medians of the rounds.
Ranks beyond the number of cores take turns on them.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from benchmarks.process import run_to_end
from benchmarks.report import Figure, JsonPath, Section, write_sections
from benchmarks.train.launch import Launcher
from benchmarks.train.rounds import Run, check_losses, interleaved
from benchmarks.workload import Knobs, Workload, make
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars

app = CommandApp(report=True, failures=(OSError,))

_LARGE_BYTES = 8 << 20
"""About what a rank sends in a step: dense gradients are 5 MB, vectors and their gradients 1 to 10 MB."""


def launchers(ranks: int) -> dict[str, list[str]]:
    """Return the words before a program that start it on ranks, by launcher."""
    horovodrun, torchrun = (str(Path(sys.executable).with_name(name)) for name in ("horovodrun", "torchrun"))
    return {
        "horovodrun": [horovodrun, "-np", str(ranks)],
        "torchrun": [torchrun, "--standalone", "--nproc-per-node", str(ranks), "--no-python"],
    }


@app.command()
def main(
    folder: Annotated[Path, typer.Option("--dir", help="Of the workload, which is kept.")] = Path("data/bench/comm"),
    json_file: JsonPath = None,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, with commas.")] = "2,4",
    rounds: Annotated[int, typer.Option(help="Of all runs.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Of a run.", min=3)] = 12,
    images: Annotated[int, typer.Option(help="In the store.", min=100)] = 20_000,
    samples_per_rank: Annotated[int, typer.Option(help="Of a step.", min=16)] = 1_500,
) -> None:
    """Compare Horovod with torch.distributed, by whole runs and by single collectives."""
    from trainer.plan.calibrate import numbers

    counts = numbers(ranks)
    with progress_bars() as progress:
        knobs = Knobs(images=images, samples_per_rank=samples_per_rank, steps=24, test_samples=600)
        workload = make(folder, knobs, progress)
        with tempfile.TemporaryDirectory(prefix="comm-bench-") as scratch:
            sections = []
            for count in counts:
                sections += [
                    training(workload, Path(scratch), count, rounds, steps, progress),
                    collectives(Path(scratch), count, rounds),
                ]
    write_sections(sections, json_file)


def training(workload: Workload, scratch: Path, ranks: int, rounds: int, steps: int, progress: Progress) -> Section:
    """Measure samples per second of both on `ranks` ranks, and torch_vs_horovod. Raises DifferentLossesError."""
    runs: dict[str, Run] = {}
    for name, prefix in launchers(ranks).items():
        launcher = Launcher(workload, scratch, ranks, prefix)
        runs[name] = partial(launcher.trainer, name, steps, ["train.log_every=1"])
    found = interleaved(runs, rounds, progress, f"{ranks} ranks")
    check_losses(found.outcomes, tuple(runs))
    ratio = {f"torch_vs_horovod_at_{ranks}": found.ratio("torchrun", "horovodrun")}
    grid = {f"{name}_{ranks}_ranks": cells for name, cells in found.grid().items()}
    return Section(f"training on {ranks} ranks", ratio, grid)


def collectives(scratch: Path, ranks: int, rounds: int) -> Section:
    """Measure milliseconds of collectives with almost nothing in them, and with much; the median of the rounds."""
    seen: dict[str, list[Mapping[str, float]]] = {name: [] for name in launchers(ranks)}
    for _ in range(rounds):
        for name, prefix in launchers(ranks).items():
            log = scratch / "collectives.txt"
            run_to_end([*prefix, sys.executable, "-m", "trainer.plan.collectives"], log)
            output = log.read_text()
            seen[name].append(json.loads(output[output.index('{"ranks"') :].splitlines()[0]))
    grid: dict[str, dict[str, Figure]] = {}
    for name, figures in seen.items():
        cells = grid[f"{name}_{ranks}_ranks"] = {}
        for kind, factor in (("alltoall", 1), ("allreduce", 2)):
            call_s, byte_s = (statistics.median(each[f"{kind}_{of}_s"] for each in figures) for of in ("call", "byte"))
            cells[f"{kind}_ms"] = 1e3 * call_s
            cells[f"{kind}_of_8_mb_ms"] = 1e3 * (call_s + byte_s * _LARGE_BYTES * factor * (ranks - 1) / ranks)
    return Section(f"collectives of {ranks} ranks", grid=grid)


if __name__ == "__main__":
    run_app(app)
