"""Compute the vectors of ads with a trained two-tower run, and index them for pre-ranking."""

import contextlib
import time
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import print_summary, print_warning, progress_bar
from featurestore.spec import IndexKind
from featurestore.storage.storage import Storage
from trainer.cli import StoreVersion, WhichCheckpoint
from trainer.prerank import INDEX, MAX_GONE, MIN_RECALL

if TYPE_CHECKING:
    from trainer.prerank.artifact import AdChanges, AdIndex, Vectors
    from trainer.prerank.vectors import Ads
    from trainer.runs.saved import TrainedRun

EXAMPLES = """Examples:

\b
crossmedia index build
crossmedia index build --run data/runs/towers
crossmedia index build --run data/runs/towers --ads ads.parquet --index hnsw --out s3://shop/ad-index
crossmedia index build --run data/runs/towers --ads new-ads.parquet --add
crossmedia index build --run data/runs/towers --sync live-ads.parquet
"""

app = CommandApp(report=True, rich_markup_mode="rich")


Run = Annotated[
    str | None,
    typer.Option(help="Folder or address of a run with model.base=two_tower.", show_default="the newest in data/runs"),
]
AdTable = Annotated[
    str | None, typer.Option(help="A .parquet file, or a folder of them, with the ad's columns, one row an ad.")
]
AdSamples = Annotated[
    str | None, typer.Option(help="Instead: the distinct ads of these samples.", show_default="those of the run")
]
Out = Annotated[str, typer.Option(help="Folder or address of the index; an index there is replaced.")]
Kind = Annotated[IndexKind, typer.Option("--index", help="flat is exact; hnsw is faster.")]
Add = Annotated[bool, typer.Option("--add", help="Add to the existing index, without rebuilding it.")]
LiveAds = Annotated[
    str | None,
    typer.Option(metavar="TABLE", help="A table of all live ads, as --ads: add the new, remove those not in it."),
]
MaxGone = Annotated[float, typer.Option(min=0, max=1, help="Share of the index's ads that --sync may remove.")]
MinRecall = Annotated[float, typer.Option(min=0, max=1, help="Recall@10 that hnsw should reach; less is a warning.")]
_BATCH_SIZE = 8192  # ads whose vectors are computed at once


@app.command(epilog=EXAMPLES)
def main(
    context: typer.Context,
    run: Run = None,
    ads: AdTable = None,
    samples: AdSamples = None,
    out: Out = INDEX,
    kind: Kind = "flat",
    add: Add = False,
    sync: LiveAds = None,
    max_gone: MaxGone = MAX_GONE,
    min_recall: MinRecall = MIN_RECALL,
    checkpoint: WhichCheckpoint = None,
    store_version: StoreVersion = None,
) -> None:
    """Compute the vectors of ads with a trained two-tower run, and index them for pre-ranking.

    The key of an ad is its value of the schema's new_ad_field. Columns with context: true are not needed. OUT gets the
    vectors as Parquet, the index, and a JSON file about both; --add and --sync write its next version. Recall
    is measured with users of the run's samples; the search effort is raised until --min-recall is reached.
    """
    from trainer.comm import SoloComm
    from trainer.prerank.artifact import AdIndex
    from trainer.prerank.vectors import origin_of
    from trainer.runs.folder import run_or_newest
    from trainer.runs.saved import open_trained

    _check_options(context)
    start = time.monotonic()
    Storage(out).check_bucket()  # before the work
    opened = open_trained(run_or_newest(run), SoloComm(), which=checkpoint, store_version=store_version)
    with contextlib.closing(opened) as trained:
        origin, known = origin_of(trained), AdIndex.open(out) if add or sync else None
        if known:
            known.check_origin(origin)  # before the work
        chosen, vectors_NW = _vectors(trained, sync or ads, samples)
        lines = describe_run(trained)  # before lookups of users' images are counted too
        if known:
            index, changes = known.update(chosen.keys_N, vectors_NW, origin, max_gone if sync else None)
        else:
            index, changes = _built(trained, out, kind, chosen, vectors_NW, min_recall)
    print_summary("\n".join([*lines[:2], *summary_text(index, changes, out, time.monotonic() - start), *lines[2:]]))
    if index.warning:
        print_warning(index.warning)


def describe_run(trained: "TrainedRun") -> list[str]:
    """Write what the job prints of the run: two lines that come first, then notes that come last."""
    store = f"snapshot {trained.store_version}" if trained.store_version else "none: a run without images"
    num_missing = trained.missing_lookups()
    if num_missing:
        store += f"; {num_missing:,} lookups of images that have none"
    return [
        f"run          {trained.saved.folder}, {trained.saved.checkpoint.name}",
        f"features     {store}",
        *(f"note         {note}" for note in trained.saved.notes_on_missing(num_missing)),
    ]


def summary_text(index: "AdIndex", changes: "AdChanges", out: str, seconds: float) -> list[str]:
    """Write what the job prints of the index."""
    state, ads = index.state, f"{changes.num_new:,} new, {changes.num_replaced:,} changed"
    ads += f", {changes.num_unchanged:,} unchanged, {changes.num_removed:,} removed"
    structure = f"{state.kind}, {state.num_ads:,} ads, {state.dim} numbers each, inner product"
    if changes.is_rebuilt:
        structure += "; rebuilt, as many unused vectors lower its recall"
    elif state.num_unused:
        structure += f"; {state.num_unused:,} unused vectors, removed by the next build"
    recall = "exact"
    if state.queries:
        recall = f"{state.recall:.4f} for vectors of {state.queries}, effort {index.index.effort}"
    return [
        f"ads          {ads}",
        f"index        {structure}",
        f"recall@10    {recall}",
        f"time         {seconds:.1f} s",
        f"written to   {out}, version {index.version}",
    ]


def _check_options(context: typer.Context) -> None:
    """Raise BadParameter for options that do not go together."""
    sources = {each.opts[0]: context.get_parameter_source(str(each.name)) for each in context.command.params}
    given = {option for option, source in sources.items() if source and source.name == "COMMANDLINE"}
    if {"--ads", "--samples"} <= given:
        raise typer.BadParameter("give one of --ads and --samples", param_hint="--samples")
    change = {"--out", "--max-gone", "--html", "--run", "--checkpoint", "--store-version"}
    for way, goes_with in {"--sync": change, "--add": change | {"--ads", "--samples"}}.items():
        if way in given and (wrong := sorted(given - {way} - goes_with)):
            kept = wrong[0] in ("--index", "--min-recall")
            why = f"{way} keeps the kind and the limit of the index" if kept else f"{way} does not go with {wrong[0]}"
            raise typer.BadParameter(f"{why}; leave {wrong[0]} out", param_hint=wrong[0])


def _vectors(trained: "TrainedRun", table: str | None, samples: str | None) -> "tuple[Ads, Vectors]":
    """Read the ads of a table, else of samples, and compute their vectors."""
    from trainer.prerank.vectors import ad_vectors, ads_of_samples, ads_of_table, towers

    fields = towers(trained).ad_fields
    if table:
        chosen = ads_of_table(table, trained.schema, fields)
    else:
        chosen = ads_of_samples(samples or trained.config.data.samples, trained.schema, fields)
    with progress_bar("ads") as progress:
        return chosen, ad_vectors(trained, chosen, _BATCH_SIZE, progress)


def _built(
    trained: "TrainedRun", out: str, kind: IndexKind, chosen: "Ads", vectors_NW: "Vectors", min_recall: float
) -> "tuple[AdIndex, AdChanges]":
    """Write an index of these ads alone."""
    from trainer.prerank.artifact import AdChanges, AdIndex
    from trainer.prerank.vectors import origin_of, user_queries

    queries = user_queries(trained) if kind == "hnsw" else None
    index = AdIndex.build(out, kind, chosen.keys_N, vectors_NW, origin_of(trained), queries, min_recall)
    return index, AdChanges(num_new=len(chosen.keys_N))


if __name__ == "__main__":
    run_app(app)
