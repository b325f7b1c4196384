"""Measure the explorer: the first page of a store of a million images, and small pictures at 200 requests a second.

python -m benchmarks.explorer --json data/bench/explorer.json

The server has the first core, the client the others. Each page of the navigation is asked for first by a server that
has just begun, and then again. Goals: first_page_s .3, pictures_failed 0, pictures_rps 200, rss_growth_mb 20. Memory is
compared with that after each picture was asked for once: then those in memory are all there.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report import JsonPath, Section, write_sections
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars

app = CommandApp(report=True, failures=(OSError,))


@app.command()
def main(
    json_path: JsonPath = None,
    folder: Annotated[Path, typer.Option("--dir", help="Of the store and the pictures, kept.")] = Path(
        "data/bench/explorer"
    ),
    images: Annotated[int, typer.Option(help="Of the store.", min=1000)] = 1_000_000,
    dim: Annotated[int, typer.Option(help="Width of a feature.", min=2)] = 16,
    pictures: Annotated[int, typer.Option(help="That are on the disk.", min=10)] = 500,
    rate: Annotated[int, typer.Option(help="Pictures asked for in a second.", min=1)] = 200,
    seconds: Annotated[int, typer.Option(help="Of the load.", min=1)] = 60,
) -> None:
    """Measure the pages of a large store, and small pictures under load."""
    from benchmarks.explorer import load, pages
    from benchmarks.explorer.shop import make

    with progress_bars() as progress:
        shop = make(folder, images, dim, pictures, progress)
        task = progress.add_task("pages", total=2)
        sections = [pages.measure(shop)]
        progress.update(task, advance=1, description="pictures")
        sections.append(load.measure(shop, rate, seconds))
        progress.advance(task)
    run = {"images": images, "dim": dim, "pictures": pictures, "rate": rate, "seconds": seconds}
    write_sections([*sections, Section("this run", {**run, "cores": len(os.sched_getaffinity(0))})], json_path)


if __name__ == "__main__":
    run_app(app)
