"""Command map: the points of a map as Parquet."""

from pathlib import Path
from typing import Annotated

import typer

from explorer.commands.installed import check_installed
from explorer.commands.options import Samples, Store
from featurestore.console.commandline import CommandApp
from featurestore.console.output import print_problem, print_summary, progress_bars
from featurestore.text import refusal

app = CommandApp()


@app.command(epilog="Example: `python -m explorer map map.parquet --run data/runs/both --samples data/samples`")
def map(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write, or replace: NAME.parquet.")],
    run: Annotated[
        str | None,
        typer.Option(help="Folder or address of a run.", show_default="features of the store are laid out"),
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="Which E of the run, STORE:NAME.", show_default="the first of several")
    ] = None,
    store: Store = None,
    samples: Samples = None,
) -> None:
    """Lay images out in a plane by UMAP: by the visual vectors of a run, or the features of a store.

    Columns: key, uri, x, y, ctr, category, error, impressions. `embedding-atlas OUT --x x --y y` opens it, and the page
    Map of the same run, store and samples has it at once.
    """
    check_installed()
    from explorer.data.background import Task
    from explorer.data.map.make import make_map
    from explorer.data.map.points import MapPoints
    from explorer.errors import ExplorerError
    from explorer.places import Places
    from featurestore.console.files import check_ending, replace_file
    from featurestore.published.paths import run_path

    if run is None and store is None:
        raise ExplorerError("nothing to lay out: name a --run or a --store")
    check_ending(out, "OUT", ".parquet")
    folder = None if run is None else run_path(run)
    places = Places(store=store, samples=samples, runs=None if folder is None else str(folder.parent))
    with progress_bars() as bars:
        bar = bars.add_task("map", total=None)

        class ShownTask(Task[MapPoints]):
            """Shows what is done."""

            def tell(self, doing: str, done: int = 0, total: int = 0) -> None:
                super().tell(doing, done, total)
                bars.update(bar, description=doing, completed=done, total=total or None)

        found = make_map(places, None if folder is None else folder.name, ShownTask(), network=network)
    try:
        replace_file(out, found.file.read_bytes())
    except OSError as error:
        raise ExplorerError(f"cannot write {out}: {refusal(error)}") from error
    for note in found.about["notes"]:
        print_problem(f"note: {note}")
    print_summary(f"{len(found.keys_N):,} images, laid out by {found.method}: {out}")
