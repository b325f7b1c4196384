"""Measure training on one GPU: samples per second, the share of time that it computes, and the bytes carried to it.

    python -m benchmarks.gpu --json data/bench/gpu.json
    python -m benchmarks.gpu --device cpu

One process trains on the paper-shaped workload, with full features and with compact ones, which the device
holds, or which the host sends in each step.
"""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report import JsonPath, this_run, write_sections
from benchmarks.workload import Knobs, make
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars

app = CommandApp(report=True, failures=(OSError,))


class On(Enum):
    """The device that is measured."""

    CUDA = "cuda"
    CPU = "cpu"


@app.command()
def main(
    json_path: JsonPath = None,
    folder: Annotated[Path, typer.Option("--dir", help="Of the workload, which is kept.")] = Path("data/bench/gpu"),
    device: Annotated[On, typer.Option(help="What to train on.")] = On.CUDA,
    steps: Annotated[int, typer.Option(help="Timed ones of each kind of features.", min=2)] = 30,
    dims: Annotated[int, typer.Option(min=1, help="Numbers of a compact row.")] = 256,
    images: Annotated[int, typer.Option(help="Of the store.", min=100)] = Knobs.images,
    dim: Annotated[int, typer.Option(help="Width of a full row.", min=2)] = Knobs.dim,
    samples_per_rank: Annotated[int, typer.Option(help="Of a step.", min=1)] = Knobs.samples_per_rank,
) -> None:
    """Measure training on one GPU, or in the same way on the CPU."""
    from benchmarks.gpu.measure import check_device, measure

    check_device(device.value)
    knobs = Knobs(images=images, dim=dim, samples_per_rank=samples_per_rank)
    with progress_bars() as progress:
        workload = make(folder, knobs, progress)
        section = measure(workload, dims, device.value, steps, progress)
    run = this_run(images=images, dim=dim, dims=dims, samples_per_rank=samples_per_rank, steps=steps)
    write_sections([section, run], json_path)


if __name__ == "__main__":
    run_app(app)
