"""Measure how near a run that was killed and resumed, with other numbers of ranks, ends to an undisturbed one.

    python -m benchmarks.resume [--json FILE]

Every run is compared with one of one rank that nothing disturbed; one that is killed and continues with two ranks each
time, with an undisturbed one of two. Two controls say what a difference is worth: a run of one rank, undisturbed, in
which one weight began with another last bit (how rounding grows), and one of another seed (how far two good models are
apart). In float64 rounding is too small to hide anything: a step, a sample or a row that were lost or taken twice would
show there.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from benchmarks.report import Figure, JsonPath, Section, write_sections
from benchmarks.workload import Knobs, make
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars

if TYPE_CHECKING:
    from benchmarks.resume.runs import End, Float, Runs

KNOBS = Knobs(images=2_000, dim=64, steps=1_000, test_samples=3_000, behaviors=10, users=2_000, shards=8, row_group=100)
STEPS = (10, 100, 1_000)
MOST_KILLS = 5


class DType(StrEnum):
    """The type of E's products; float64 is that of all else too."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


app = CommandApp(report=True, failures=(OSError,))


@app.command()
def main(
    json_file: JsonPath = None,
    folder: Annotated[Path, typer.Option("--dir", help="Of the workload, which is kept.")] = Path("data/bench/resume"),
    steps: Annotated[
        list[int] | None, typer.Option(help="Length of the runs; may be repeated. Default: 10, 100 and 1,000.", min=10)
    ] = None,
    dtype: Annotated[list[DType] | None, typer.Option(help="May be repeated. Default: all.")] = None,
    samples: Annotated[int, typer.Option(help="Of a step.", min=16)] = 64,
) -> None:
    """Compare killed and resumed runs with undisturbed ones; prints the figures."""
    from benchmarks.resume.runs import Runs

    lengths, dtypes = steps or STEPS, dtype or tuple(DType)
    with progress_bars() as progress, tempfile.TemporaryDirectory() as scratch:
        workload = make(folder, replace(KNOBS, samples_per_rank=samples), progress)
        task = progress.add_task("train", total=len(dtypes) * len(lengths))
        sections = []
        for name in dtypes:
            grid: dict[str, Mapping[str, Figure]] = {}
            for length in lengths:
                grid |= compare(Runs(workload, Path(scratch), name, length))
                progress.advance(task)
            sections.append(Section(f"{name}: differences from one undisturbed rank", grid=grid, prefix=f"{name}_"))
    write_sections(sections, json_file)


def compare(runs: "Runs") -> dict[str, Mapping[str, Figure]]:
    """Measure how far each run ends from the undisturbed one of one rank, or of two where it says so."""
    from benchmarks.resume.runs import CHANGING

    kills = kills_of(runs.steps)
    alone, of_two = runs.alone(), runs.on_ranks(2)
    found = {
        "2_ranks_killed_vs_2_ranks": differences(runs.on_ranks(2, kills=kills), of_two),
        "2_ranks": differences(of_two, alone),
        "4_ranks": differences(runs.on_ranks(4), alone),
        "killed_and_changed": differences(runs.on_ranks(*CHANGING, kills=kills), alone),
        "last_bit": differences(runs.alone(nudged=True), alone),
        "other_seed": differences(runs.alone("train.seed=1"), alone),
    }
    return {f"{runs.steps}_steps_{name}": figures for name, figures in found.items()}


def kills_of(steps: int) -> list[int]:
    """Choose the steps in which a run is killed, some steps after a checkpoint, so that those are taken twice."""
    from benchmarks.resume.runs import checkpoint_every

    every, count = checkpoint_every(steps), min(MOST_KILLS, 2 + steps // 50)
    return [number * steps // (count + 1) // every * every + every // 2 + 1 for number in range(1, count + 1)]


def differences(found: "End", expected: "End") -> dict[str, Figure]:
    """Measure how far apart two runs have ended."""
    apart_N = np.abs(found.logit_N - expected.logit_N)
    return {
        "dense": largest(found.dense, expected.dense),
        "id_rows": largest(found.rows, expected.rows),
        "logit_max": float(apart_N.max()),
        "logit_mean": float(apart_N.mean()),
        "log_loss": abs(found.log_loss - expected.log_loss),
    }


def largest(found: Mapping[str, "Float"], expected: Mapping[str, "Float"]) -> float:
    """Return the largest difference of any number; both have the same names."""
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - expected[name]).max()) for name in expected)


if __name__ == "__main__":
    run_app(app)
