"""Measure the scorer over HTTP against eager torch behind FastAPI, and against itself without images.

python -m benchmarks.serve --json data/bench/serve.json

A model of the paper-shaped workload is trained for a few steps, with images and without, and published for this
machine. The server has the first core, the client the others; a user has 33 behaviours. Goals: http_p50_ms_200 2,
http_p99_ms_200 6, images_vs_none 1.05, vs_fastapi_eager_rps 2.
"""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report import JsonPath, this_run, write_sections
from benchmarks.workload import Knobs, make
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars

app = CommandApp(report=True, failures=(OSError,))


@app.command()
def main(
    json_path: JsonPath = None,
    folder: Annotated[Path, typer.Option("--dir", help="Of the workload and the models, kept.")] = Path(
        "data/bench/serve"
    ),
    images: Annotated[int, typer.Option(help="Of the store.", min=100)] = Knobs.images,
    dim: Annotated[int, typer.Option(help="Width of a feature.", min=2)] = Knobs.dim,
    steps: Annotated[int, typer.Option(help="That each model is trained for.", min=2)] = 6,
    samples: Annotated[int, typer.Option(help="Of a training step.", min=20)] = 1000,
    requests: Annotated[int, typer.Option(help="Of each number of candidates and round.", min=10)] = 1000,
    rounds: Annotated[int, typer.Option(help="Of all servers.", min=1)] = 3,
) -> None:
    """Measure the scorer over HTTP against FastAPI, and against itself without images."""
    from benchmarks.serve.sections import World, measure_speed

    knobs = Knobs(images=images, dim=dim, samples_per_rank=samples, steps=steps, test_samples=samples)
    with progress_bars() as progress:
        world = World(make(folder / "workload", knobs, progress), folder.absolute(), steps)
        task = progress.add_task("models", total=3)
        for name, *own in (("both",), ("none", "model.images=none")):
            world.train(name, *own)
            world.publish(name)
            progress.advance(task)
        progress.update(task, description="requests")
        sections = measure_speed(world, requests, rounds)
        progress.advance(task)
    write_sections([*sections, this_run(images=images, dim=dim, requests=requests, rounds=rounds)], json_path)


if __name__ == "__main__":
    run_app(app)
