"""Compute the vectors of ads with a trained two-tower run, and put them under an index for the pre-rank."""

import contextlib
import time
from pathlib import Path
from typing import Annotated

import typer

from featurestore.commandline import run_app, say_error
from featurestore.commands.common import progress_bar
from featurestore.errors import FeatureStoreError
from featurestore.index import IndexKind
from trainer.comm import SoloComm
from trainer.errors import TrainerError
from trainer.prerank.ads import Ads, ads_of_samples, ads_of_table
from trainer.prerank.artifact import Added, AdIndex
from trainer.prerank.vectors import ad_vectors, origin_of, towers
from trainer.trained import TrainedRun, missing_lookups, newest_run, open_trained

EXAMPLES = """Examples:

\b
python jobs/build_ad_index.py
python jobs/build_ad_index.py --run data/runs/towers
python jobs/build_ad_index.py --run data/runs/towers --ads ads.parquet --index hnsw --out s3://shop/ad-index
python jobs/build_ad_index.py --run data/runs/towers --ads new-ads.parquet --add
"""

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
def main(
    run: Annotated[
        Path | None,
        typer.Option(help="Folder of a run with model.base=two_tower.", show_default="the newest in data/runs"),
    ] = None,
    ads: Annotated[
        str | None, typer.Option(help="A .parquet file, or a folder of them, with the ad's columns, one row an ad.")
    ] = None,
    samples: Annotated[
        str | None, typer.Option(help="Instead: the distinct ads of these samples.", show_default="those of the run")
    ] = None,
    out: Annotated[str, typer.Option(help="Folder or address of the index; what is there is replaced.")] = (
        "data/ad-index"
    ),
    kind: Annotated[
        IndexKind | None, typer.Option("--index", help="flat is exact; ivf and hnsw are faster.", show_default="flat")
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Add to the index that is there, without building it anew.")
    ] = False,
    checkpoint: Annotated[
        str | None, typer.Option(help="A step, or the path of a checkpoint.", show_default="the newest")
    ] = None,
    store_version: Annotated[
        int | None, typer.Option(min=1, help="Snapshot of the features.", show_default="the newest")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Ads whose vectors are computed at once.")] = 8192,
) -> None:
    """Compute the vectors of ads with a trained two-tower run, and put them under an index for the pre-rank.

    An ad is told by its value of the schema's new_ad_field. Columns with context: true are not needed. Ads that are
    gone stay in an index until it is built anew. OUT gets the vectors as Parquet, faiss's file, and a JSON about both.
    """
    if ads and samples:
        raise typer.BadParameter("give one of --ads and --samples", param_hint="--samples")
    if add and kind:
        raise typer.BadParameter("--add keeps the kind of the index; leave --index out", param_hint="--index")
    start = time.monotonic()
    try:
        with contextlib.closing(
            open_trained(run or newest_run(), SoloComm(), which=checkpoint, store_version=store_version)
        ) as trained:
            known = AdIndex.open(out) if add else None
            origin = origin_of(trained)
            if known:
                known.check_origin(origin)
            chosen = _chosen(trained, ads, samples)
            with progress_bar("ads") as progress:
                vectors_NW = ad_vectors(trained, chosen, batch_size, progress)
            if known:
                index, added = known.add(chosen.keys_N, vectors_NW, origin)
            else:
                index = AdIndex.build(out, kind or "flat", chosen.keys_N, vectors_NW, origin)
                added = Added(len(chosen.keys_N), 0, 0)
    except (TrainerError, FeatureStoreError) as error:
        say_error(error)
        raise typer.Exit(1) from error
    typer.echo(describe(trained, index, added, out, time.monotonic() - start))


def describe(trained: TrainedRun, index: AdIndex, added: Added, out: str, seconds: float) -> str:
    """The lines that the job prints."""
    state = index.state
    store = f"snapshot {trained.store_version}" if trained.store_version else "none: a run without images"
    num_missing = missing_lookups(trained.comm, trained.partitions)
    if num_missing:
        store += f"; {num_missing:,} lookups of images that have none"
    return "\n".join(
        [
            f"run          {trained.folder}, {trained.path.name}",
            f"features     {store}",
            f"ads          {added.num_new:,} new, {added.num_replaced:,} changed, {added.num_unchanged:,} unchanged",
            f"index        {state.kind}, {state.num_ads:,} ads, {state.dim} numbers each, inner product"
            + (f"; {state.num_replaced:,} replaced vectors go with the next build" if state.num_replaced else ""),
            f"time         {seconds:.1f} s",
            f"written to   {out}, version {state.version}",
            *(f"note         {note}" for note in trained.notes_on_missing(num_missing)),
        ]
    )


def _chosen(trained: TrainedRun, ads: str | None, samples: str | None) -> Ads:
    fields = towers(trained).ad_fields
    if ads:
        return ads_of_table(ads, trained.schema, fields)
    return ads_of_samples(samples or trained.config.data.samples, trained.schema, fields)


if __name__ == "__main__":
    run_app(app)
