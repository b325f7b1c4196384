"""Measure how time, memory and bytes of each stage grow with the number of impressions.

python -m benchmarks.growth --json data/bench/growth.json
python -m benchmarks.growth --impressions 10000 --impressions 40000 --samples-alone 80000 --dir /tmp/growth

A stage is a command, its start included. Its exponent of growth between two sizes is log(cost) over log(size): 1 grows
as the data do, 0 not at all. IDs of a larger shop need more bits, log2 of their number: `above_keys` is what samples
grow by beyond that. Goal: exponents of 1.05 at most. In the end the exported model is served, for each size.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict
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
    requests: Annotated[int, typer.Option(min=10, help="Sent to the scorer of each exported model.")] = 1000,
) -> None:
    """Measure how time, memory and bytes of each stage grow with the data."""
    from benchmarks.growth.stages import Place, Shop

    sizes = dict.fromkeys(sorted(impressions or [100_000, 1_000_000]), False)
    if samples_alone:
        sizes.setdefault(samples_alone, True)
    found: dict[str, dict[int, Stage]] = {}
    served: dict[str, dict[str, Figure]] = {}
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
            if not alone:
                served[str(size)] = asdict(place.serve(requests))
    sections = [_costs(found, cost) for cost in _COSTS]
    sections.append(Section("the exported model, served, by impressions", grid=served, prefix="served_"))
    write_sections([*sections, _growth(found, dims)], json_path)


def _costs(found: Mapping[str, Mapping[int, "Stage"]], cost: str) -> Section:
    grid = {name: {str(size): getattr(stage, cost) for size, stage in of.items()} for name, of in found.items()}
    return Section(f"{cost} of each stage, by impressions", grid=grid, prefix=f"{cost}_")


def _growth(found: Mapping[str, Mapping[int, "Stage"]], dims: int) -> Section:
    """Compute the exponents between the two largest sizes of each stage, and the largest of all."""
    from benchmarks.growth.stages import SAMPLES_ALONE, Shop

    figures: dict[str, Figure] = {}
    for name, of in found.items():
        for (small, one), (large, other) in list(pairwise(sorted(of.items())))[-1:]:
            grown = {cost: math.log(getattr(other, cost) / getattr(one, cost)) for cost in _COSTS}
            figures |= {f"{cost}_exponent_{name}": value / math.log(large / small) for cost, value in grown.items()}
            if name == SAMPLES_ALONE:
                bits = math.log(math.log2(Shop(large, dims).users) / math.log2(Shop(small, dims).users))
                above_keys = (grown["written_mb"] - bits) / math.log(large / small)
                figures["written_mb_of_samples_above_keys"] = above_keys
    for cost in _COSTS:
        of_cost = [value for name, value in figures.items() if name.startswith(cost) and isinstance(value, float)]
        figures[f"{cost}_exponent"] = max(of_cost, default=None)
    return Section("exponents of growth", {**figures, "dims": dims, "cores": len(os.sched_getaffinity(0))})


if __name__ == "__main__":
    run_app(app)
