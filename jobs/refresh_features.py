"""Bring a feature store up to date with its images: new, changed and vanished ones, in one commit."""

from typing import Annotated, Literal

import typer

from featurestore.console.commandline import CONTINUES, CommandApp, run_app

EXAMPLES = """Examples:

\b
dask-submit jobs/refresh_features.py --images s3://shop/photos --store s3://shop/features
python jobs/refresh_features.py --images photos --store data/features --dry-run
python jobs/refresh_features.py --images half-of-them --store data/features --keep-missing
"""

app = CommandApp(rich_markup_mode="rich", stopped=CONTINUES)


@app.command(epilog=EXAMPLES)
def main(
    images: Annotated[
        str, typer.Option(help="Folder or fsspec address of images, or a .parquet or .csv with key or id, and uri.")
    ] = "data/images",
    store: Annotated[str, typer.Option(help="Folder or address of a feature store that is there.")] = "data/features",
    backbone: Annotated[
        str | None, typer.Option(metavar="MODEL:LAYER", help="The store's network.", show_default="as in extraction")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="The store's weights: imagenet, random:SEED or a file.", show_default="as in extraction"),
    ] = None,
    compute_dtype: Annotated[
        Literal["bfloat16", "float32"] | None,
        typer.Option(help="In which the network computes; it must be the store's.", show_default="the store's"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Images per pass of the network.")] = 16,
    part_size: Annotated[
        int, typer.Option(min=1, max=65536, help="Images per task; what is in flight is repeated after a kill.")
    ] = 256,
    keep_missing: Annotated[
        bool, typer.Option("--keep-missing", help="Keep the features of images that are not listed any more.")
    ] = False,
    max_gone: Annotated[
        float, typer.Option(min=0, max=1, help="Refuse when more than this share of the store would vanish.")
    ] = 0.5,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and decode what is new, print the counts, write nothing.")
    ] = False,
) -> None:
    """Bring a feature store up to date with its images, in one commit.

    Images are compared by etag, or size and date, then by the digest of their bytes; only new and changed ones go
    through the network. Features of images that are not listed any more are removed. Images that cannot be read or
    decoded are kept in quarantine and tried again by the next run. A killed run continues when the same command
    runs again.
    """
    from pipeline.cluster.connect import connect
    from pipeline.features.refresh import RefreshOptions, refresh

    options = RefreshOptions(
        images=images,
        store=store,
        backbone=backbone,
        weights=weights,
        compute_dtype=compute_dtype,
        batch_size=batch_size,
        part_size=part_size,
        keep_missing=keep_missing,
        max_gone=max_gone,
        dry_run=dry_run,
    )
    # One process with all cores for the network: copies of the network would share the same cores.
    with connect(workers=1, threads_per_worker=1) as client:
        summary = refresh(options, client)
    typer.echo(summary)


if __name__ == "__main__":
    run_app(app)
