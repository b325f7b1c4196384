"""Export embeddings of a run: what its E makes of all images of a feature store."""

import time
from typing import Annotated

import typer

from featurestore.console import commandline, files, output
from trainer.cli import StoreVersion, WhichCheckpoint, WhichRun

EXAMPLES = """Examples:
  crossmedia export
  crossmedia export --run data/runs/both --out visual.parquet
  crossmedia export --run data/runs/titles --network titles --checkpoint 1000 --out titles.parquet

Exit codes: 0 done, 1 failed, 2 wrong options.
"""

app = commandline.CommandApp(report=True, rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
def main(
    run: WhichRun = None,
    checkpoint: WhichCheckpoint = None,
    network: Annotated[
        str | None,
        typer.Option(help="Feature store whose E to use, by its name in the schema; required if there are several."),
    ] = None,
    store_version: StoreVersion = None,
    out: Annotated[str, typer.Option(help="File to write, or replace: NAME.parquet.")] = "data/visual.parquet",
) -> None:
    """Export embeddings of a run: what its E makes of all images of a feature store.

    The Parquet file has the columns key, uri and vector (a list of float32), and says in its metadata (visual_vectors)
    of which run, checkpoint, store and snapshot they are.
    """
    from trainer.runs.folder import run_or_newest
    from trainer.runs.saved import export_vectors, open_network

    start = time.monotonic()
    files.check_ending(out, "--out", ".parquet")
    opened = open_network(run_or_newest(run), which=checkpoint, network=network, store_version=store_version)
    with output.progress_bar("images") as progress:
        export_vectors(opened, out, progress)
    about = opened.describe()
    output.print_summary(
        f"run          {about['run']}, {about['checkpoint']}, network {about['network']}\n"
        f"features     snapshot {about['snapshot']} of {about['store']}\n"
        f"images       {opened.snapshot.num_rows:,}, {about['dim']} numbers each\n"
        f"time         {time.monotonic() - start:.1f} s\n"
        f"written to   {out}"
    )


if __name__ == "__main__":
    commandline.run_app(app)
