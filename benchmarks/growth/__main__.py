"""Measure how time, memory and bytes of each stage grow with the number of impressions.

python -m benchmarks.growth --json data/bench/growth.json
python -m benchmarks.growth --impressions 10000 --impressions 40000 --samples-alone 80000 --dir /tmp/growth

A stage is a command, its start included. Its exponent of growth between two sizes is log(cost) over log(size): 1 grows
as the data do, 0 not at all.
"""

import math
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.report import Figure, JsonPath, Section, write_sections
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars

if TYPE_CHECKING:
    from benchmarks.growth.stages import Stage

app = CommandApp(report=True, failures=(OSError,))
_COSTS = ("seconds", "memory_mb", "written_mb")


@app.command()
def main(
    json_path: JsonPath = None,
    folder: Annotated[Path, typer.Option("--dir", help="For all that is drawn and made; it is kept.")] = Path(
        "data/bench/growth"
    ),
    impressions: Annotated[
        list[int] | None, typer.Option(min=1000, help="A size, for all stages. Default: 100,000 and 1,000,000.")
    ] = None,
    samples_alone: Annotated[int, typer.Option(min=0, help="A size at which only samples are built; 0: none.")] = (
        10_000_000
    ),
    dims: Annotated[int, typer.Option(min=1, help="Numbers of a vector.")] = 256,
) -> None:
    """Measure how time, memory and bytes of each stage grow with the data."""
    from benchmarks.growth.stages import Place, Shop

    sizes = dict.fromkeys(sorted(impressions or [100_000, 1_000_000]), False)
    if samples_alone:
        sizes.setdefault(samples_alone, True)
    found: dict[str, dict[int, Stage]] = {}
    with progress_bars() as progress:
        task = progress.add_task("draw", total=None)
        for size, alone in sizes.items():
            place = Place(Shop(size, dims), folder / str(size))
            progress.update(task, description=f"draw {size:,} impressions")
            place.draw()
            progress.update(task, description=f"{size:,} impressions")
            for name, stage in place.stages(alone):
                found.setdefault(name, {})[size] = stage
                progress.update(task, description=f"{size:,} impressions: {name} took {stage.seconds:.0f} s")
    sections = [_costs(found, cost) for cost in _COSTS]
    write_sections([*sections, _growth(found, dims)], json_path)


def _costs(found: Mapping[str, Mapping[int, "Stage"]], cost: str) -> Section:
    grid = {name: {str(size): getattr(stage, cost) for size, stage in of.items()} for name, of in found.items()}
    return Section(f"{cost} of each stage, by impressions", grid=grid, prefix=f"{cost}_")


def _growth(found: Mapping[str, Mapping[int, "Stage"]], dims: int) -> Section:
    """Compute the exponents between the two largest sizes of each stage, and the largest of all."""
    figures: dict[str, Figure] = {}
    for name, of in found.items():
        for (small, one), (large, other) in list(pairwise(sorted(of.items())))[-1:]:
            for cost in _COSTS:
                before, after = getattr(one, cost), getattr(other, cost)
                figures[f"{cost}_exponent_{name}"] = math.log(after / before) / math.log(large / small)
    for cost in _COSTS:
        of_cost = [value for name, value in figures.items() if name.startswith(cost) and isinstance(value, float)]
        figures[f"{cost}_exponent"] = max(of_cost, default=None)
    return Section("exponents of growth", {**figures, "dims": dims, "cores": len(os.sched_getaffinity(0))})


if __name__ == "__main__":
    run_app(app)
