"""Export embeddings of a run: what its E makes of all images of a feature store, or the rows of an exact ID table."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.console import commandline, files, output
from trainer.cli import StoreVersion, WhichCheckpoint, WhichRun

if TYPE_CHECKING:
    from featurestore.published.paths import RunPath
    from featurestore.published.versions import VersionName

EXAMPLES = """Examples:

\b
crossmedia export
crossmedia export --run data/runs/both --out visual.parquet
crossmedia export --run data/runs/titles --network titles --checkpoint 1000 --out titles.parquet
crossmedia export --run data/runs/exact --table item --out items.parquet

Exit codes: 0 done, 1 failed, 2 wrong options.
"""

app = commandline.CommandApp(report=True, rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
def main(
    run: WhichRun = None,
    checkpoint: WhichCheckpoint = None,
    network: Annotated[
        str | None, typer.Option(help="Which E, by its store's name in the schema; required if the run has several.")
    ] = None,
    store_version: StoreVersion = None,
    table: Annotated[str | None, typer.Option(help="An exact ID table, whose rows are exported instead.")] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="File to write, or replace: NAME.parquet.", show_default="data/visual.parquet or data/TABLE.parquet"
        ),
    ] = None,
) -> None:
    """Export embeddings of a run: what its E makes of all images of a feature store, or the rows of an exact ID table.

    Parquet of images has the columns key, uri and vector (a list of float32), and says in its metadata (visual_vectors)
    of which run, checkpoint, store and snapshot they are.

    Parquet of a table has the columns id, shard, last_use (a day) and vector (a list of float32). A row without an id
    is the cold row of its shard, which is used for all ids of the shard that are not in the file.
    """
    from trainer.runs.folder import run_or_newest

    start = time.monotonic()
    if table is None:
        out = out or "data/visual.parquet"
        files.check_ending(out, "--out", ".parquet")
        done = export_images(run_or_newest(run), checkpoint, network, store_version, out)
    elif network is not None or store_version is not None:
        raise typer.BadParameter("a table has no network and no snapshot: leave these out", param_hint="--table")
    else:
        out = out or f"data/{table}.parquet"
        files.check_ending(out, "--out", ".parquet")
        done = export_ids(run_or_newest(run), checkpoint, table, out)
    output.print_summary(f"{done}\ntime         {time.monotonic() - start:.1f} s\nwritten to   {out}")


def export_images(
    run: "RunPath", checkpoint: str | None, network: str | None, store_version: "VersionName | None", out: str
) -> str:
    """Write the visual vectors of all images; return what is printed of that."""
    from trainer.runs.export import export_vectors, open_network

    opened = open_network(run, which=checkpoint, network=network, store_version=store_version)
    with output.progress_bar("images") as progress:
        export_vectors(opened, out, progress)
    about = opened.describe()
    return (
        f"run          {about['run']}, {about['checkpoint']}, network {about['network']}\n"
        f"features     snapshot {about['snapshot']} of {about['store']}\n"
        f"images       {opened.num_images:,}, {about['dim']} numbers each"
    )


def export_ids(run: "RunPath", checkpoint: str | None, table: str, out: str) -> str:
    """Write the rows of an exact table; return what is printed of that."""
    from trainer.runs.export import export_table, open_table

    opened = open_table(run, table, checkpoint)
    with output.progress_bar("shards") as progress:
        count = export_table(opened, out, progress)
    about = opened.describe()
    return (
        f"run          {about['run']}, {about['checkpoint']}, table {about['table']}\n"
        f"ids          {count:,}, in {about['num_shards']} shards with a cold row each"
    )


if __name__ == "__main__":
    commandline.run_app(app)
