"""Command export: the pages as a folder of files that opens without a server."""

from pathlib import Path
from typing import Annotated

import typer

from explorer.commands.installed import check_installed
from explorer.commands.options import Images, Model, Nets, Runs, Samples, Store
from featurestore.console.commandline import CommandApp
from featurestore.console.output import print_problem, print_summary, progress_bar
from featurestore.errors import FAILED
from featurestore.published.paths import run_path

app = CommandApp()


@app.command(epilog="Example: `python -m explorer export pages --store data/features --runs data/runs --images photos`")
def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; open OUT/index.html.")],
    store: Store = None,
    runs: Runs = None,
    samples: Samples = None,
    images: Images = None,
    model: Model = None,
    nets: Nets = None,
    most_files: Annotated[
        int, typer.Option(min=10, help="Pages and pictures at most; links beyond lead to a page that says so.")
    ] = 2000,
    map_minutes: Annotated[
        float,
        typer.Option(min=0, help="For so long UMAP may lay out maps, all together, that it did not lay out before."),
    ] = 5,
) -> None:
    """Write the same pages into a folder: from the first page along all links. Forms and live parts are left out."""
    check_installed()
    if not isinstance(run_path(out), Path):
        raise typer.BadParameter(
            f"{out} is an address: pages are written into a folder of this machine", param_hint="OUT"
        )
    from explorer.html.filters import size
    from explorer.places import Places
    from explorer.server.export import export as write

    places = Places(store=store, runs=runs, samples=samples, images=images, model=model, nets=nets)
    places.check()
    with progress_bar("pages and pictures") as bar:
        exported = write(places, out, most_files, bar, umap_s=60 * map_minutes, doing=bar.doing)
    print_summary(f"{exported.num_files:,} files, {size(exported.num_bytes)}: open {out / 'index.html'}")
    if exported.num_left_out:
        print_summary(
            f"{exported.num_left_out:,} addresses or more are left out: --most-files takes more than {most_files:,}"
        )
    if exported.quick_maps:
        print_summary(
            f"maps by principal components alone: {', '.join(exported.quick_maps)}; UMAP needs more than --map-minutes "
            f"{map_minutes:g}, or python -m explorer map beforehand"
        )
    for problem in exported.errors:
        print_problem(f"an error page: {problem}")
    if exported.errors:
        raise typer.Exit(FAILED)
