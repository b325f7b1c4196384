"""Measure how long training stops for a checkpoint: written during it from a copy, and in the step.

    python -m benchmarks.resume.stall [--json FILE]

One rank, or several, on the paper-shaped workload. Checkpoints come every few steps here, so that a short run has some;
with train.checkpoint_every_s=60 one comes a minute, and `share_of_a_minute` is what it takes of that.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.report import Figure, JsonPath, Section, write_sections
from benchmarks.workload import Knobs, Workload, make
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars
from featurestore.published.paths import read_file, run_path
from trainer.errors import TrainerError

KNOBS = Knobs(images=10_000, steps=10)
EVERY, LEFT = 6, 5
"""Steps between two checkpoints, and steps after the last one, in which it comes to its end."""
_MINUTE_MS = 60_000.0
VARIANTS = {"beside": True, "in_step": False}

app = CommandApp(report=True, failures=(OSError,))


@app.command()
def main(
    json_file: JsonPath = None,
    folder: Annotated[Path, typer.Option("--dir", help="Of the workload, which is kept.")] = Path("data/bench/stall"),
    runs: Annotated[
        str | None, typer.Option(help="Folder or address of the runs.", show_default="a new folder, removed again")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1)] = 1,
    checkpoints: Annotated[int, typer.Option(min=1, help="Of each run.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Of both variants, in turn.")] = 3,
    images: Annotated[int, typer.Option(min=100, help="In the store.")] = KNOBS.images,
    dim: Annotated[int, typer.Option(min=8, help="Numbers of a feature.")] = KNOBS.dim,
    samples: Annotated[int, typer.Option(min=16, help="Of a step, for each rank.")] = KNOBS.samples_per_rank,
) -> None:
    """Measure the stall of the training by a checkpoint, written during it and in the step; prints the figures."""
    knobs = Knobs(images=images, dim=dim, samples_per_rank=samples, steps=KNOBS.steps)
    with progress_bars() as progress, tempfile.TemporaryDirectory() as scratch:
        workload = make(folder, knobs, progress)
        task = progress.add_task("train", total=rounds * len(VARIANTS))
        reports: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
        for _ in range(rounds):
            for variant, found in reports.items():
                found.append(trained(workload, runs or scratch, variant, ranks, checkpoints))
                progress.advance(task)
    write_sections(
        [Section("a checkpoint", grid={variant: figures(variant, reports[variant]) for variant in VARIANTS})], json_file
    )


def trained(workload: Workload, runs: str, variant: str, ranks: int, checkpoints: int) -> dict[str, Any]:
    """Train a run with a number of checkpoints; return its report. Raises TrainerError."""
    settings = {
        "train.epochs": 1000,
        "train.max_steps": checkpoints * EVERY + LEFT,
        "train.checkpoint_every": EVERY,
        "train.checkpoint_every_s": "null",
        "train.checkpoint_beside": VARIANTS[variant],
        "data.test_days": "[]",
        "run.dir": runs,
        "run.name": f"stall-{variant}",
        "run.overwrite": "true",
    }
    launcher = [str(Path(sys.executable).with_name("horovodrun")), "-np", str(ranks)] if ranks > 1 else []
    words = [*workload.settings(ranks), *(f"{name}={value}" for name, value in settings.items())]
    command = [*launcher, sys.executable, "-m", "trainer.main", "--config", str(workload.config), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainerError(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
    report: dict[str, Any] = json.loads(read_file(run_path(runs) / f"stall-{variant}" / "report.json"))
    return report


def figures(variant: str, reports: list[dict[str, Any]]) -> Mapping[str, Figure]:
    """Return the medians over rounds: the stall by a checkpoint, and the speed with one every few steps.

    The stall is also given as a part of a minute, and in steps.
    """
    stalls_ms = [stall_ms(variant, report) for report in reports]
    stall = statistics.median(stalls_ms)
    step_ms = statistics.median(
        1e3 * (r["seconds"]["compute"] + r["seconds"]["wait"]) / r["global_step"] for r in reports
    )
    return {
        "checkpoint_stall_ms": stall,
        "least_ms": min(stalls_ms),
        "most_ms": max(stalls_ms),
        "step_ms": step_ms,
        "share_of_a_minute": stall / _MINUTE_MS,
        "samples_per_s": statistics.median(report["samples_per_s"] for report in reports),
    }


def stall_ms(variant: str, report: Mapping[str, Any]) -> float:
    """Return how long one checkpoint held the training up."""
    if VARIANTS[variant]:
        return float(report["checkpoint_stall_ms"])
    return 1e3 * float(report["seconds"]["checkpoint"]) / int(report["checkpoints"]["written"])


if __name__ == "__main__":
    run_app(app)
