"""Export the visual vectors that a run's trained E makes of all images of a feature store."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.progress import progress_bar
from trainer.cli import WhichCheckpoint, check_ending

if TYPE_CHECKING:
    from trainer.runs.export import ImageNetwork

EXAMPLES = """Examples:

\b
python jobs/export_embeddings.py
python jobs/export_embeddings.py --run data/runs/both --out visual.parquet
python jobs/export_embeddings.py --run data/runs/titles --network titles --checkpoint 1000 --out titles.npy

Exit codes: 0 done, 1 failed, 2 wrong options.
"""

app = CommandApp(rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
def main(
    run: Annotated[
        Path | None, typer.Option(help="Folder of a run with images.", show_default="the newest in data/runs")
    ] = None,
    checkpoint: WhichCheckpoint = None,
    network: Annotated[
        str | None, typer.Option(help="Which E, by STORE:NAME or a part of it; needed where a run has several.")
    ] = None,
    store_version: Annotated[
        int | None, typer.Option(min=1, help="Snapshot of the features.", show_default="the newest")
    ] = None,
    out: Annotated[
        str, typer.Option(help="File to write, or replace: NAME.parquet; or NAME.npy, with its keys in NAME.keys.npy.")
    ] = "data/visual.parquet",
) -> None:
    """Export the visual vectors that a run's trained E makes of all images of a feature store.

    Parquet has the columns key, uri and vector (a list of float32), and says in its metadata (visual_vectors) of which
    run, checkpoint, store and snapshot they are; a .npy gets that as NAME.npy.json. build_semantic_ids takes both.
    """
    from trainer.runs.export import export_vectors, open_network
    from trainer.runs.folder import newest_run

    check_ending(out, ".parquet", ".npy")
    start = time.monotonic()
    opened = open_network(run or newest_run(), which=checkpoint, network=network, store_version=store_version)
    with progress_bar("images") as progress:
        keys = export_vectors(opened, out, progress)
    typer.echo(describe(opened, out, keys, time.monotonic() - start))


def describe(network: "ImageNetwork", out: str, keys: str | None, seconds: float) -> str:
    """Write the lines that the job prints."""
    about = network.describe()
    return "\n".join(
        [
            f"run          {about['run']}, {about['checkpoint']}, network {about['network']}",
            f"features     snapshot {about['snapshot']} of {about['store']}",
            f"images       {network.num_images:,}, {about['dim']} numbers each",
            f"time         {seconds:.1f} s",
            f"written to   {out}" + (f", keys {keys}" if keys else ""),
            f"next         python jobs/build_semantic_ids.py --vectors {out}" + (f" --keys {keys}" if keys else ""),
        ]
    )


if __name__ == "__main__":
    run_app(app)
