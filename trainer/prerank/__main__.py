"""crossmedia index: make an index of ads of a run with two towers, and search it."""

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.console import commandline, output
from featurestore.published.paths import run_path
from featurestore.spec import IndexKind
from featurestore.storage.storage import Storage
from trainer.cli import StoreVersion, WhichCheckpoint
from trainer.prerank import MIN_RECALL
from trainer.problems import Problem

if TYPE_CHECKING:
    from trainer.prerank.adindex import Ads, Vectors
    from trainer.runs.saved import TrainedRun

INDEX = "data/ad-index"
_BATCH_SIZE = 8192  # ads whose vectors are computed at once
MOST_FOUND = 1_000_000  # ads of one search: a search keeps them all in memory

app = commandline.CommandApp(report=True, rich_markup_mode="markdown", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Make an index of ads of a run with two towers, and search it."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of an index and its ads."""

    run: Annotated[
        str | None,
        typer.Option(
            help="Folder or address of a run with model.base=two_tower.", show_default="the newest in data/runs"
        ),
    ] = None
    ads: Annotated[
        str | None, typer.Option(help="A .parquet file, or a folder of them, with the ad's columns, one row an ad.")
    ] = None
    samples: Annotated[
        str | None,
        typer.Option(help="Samples whose distinct ads to index, instead of --ads.", show_default="those of the run"),
    ] = None
    out: Annotated[str, typer.Option(help="Folder or address of the index; an index there is replaced.")] = INDEX
    kind: Annotated[
        IndexKind | None, typer.Option("--index", help="flat is exact; hnsw is faster.", show_default="flat")
    ] = None
    add: Annotated[bool, typer.Option("--add", help="Keep the ads of the existing index.")] = False
    sync: Annotated[
        str | None,
        typer.Option(metavar="TABLE", help="A table of all live ads, as --ads: add the new, remove those not in it."),
    ] = None
    max_gone: Annotated[float, typer.Option(min=0, max=1, help="Share of the index's ads that --sync may remove.")] = (
        0.5
    )
    min_recall: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Recall@10 that hnsw should reach; less is a warning.", show_default=f"{MIN_RECALL:g}"
        ),
    ] = None
    checkpoint: WhichCheckpoint = None
    store_version: StoreVersion = None


@app.command(
    epilog="Examples:\n\n"
    "    crossmedia index build\n\n"
    "    crossmedia index build --run data/runs/towers --ads ads.parquet --index hnsw --out s3://shop/ad-index\n\n"
    "    crossmedia index build --run data/runs/towers --ads new-ads.parquet --add\n\n"
    "    crossmedia index build --run data/runs/towers --sync live-ads.parquet"
)
@commandline.takes(BuildOptions)
def build(options: BuildOptions) -> None:
    """Compute the vectors of ads with a trained two-tower run, and index them for pre-ranking.

    The key of an ad is its value of the schema's new_ad_field. Columns with context: true are not needed. OUT gets the
    vectors as Parquet, the index, and a JSON file about both; --add and --sync write its next version. Recall
    is measured with users of the run's samples; the search effort is raised until --min-recall is reached.
    """
    from trainer.comm import SoloComm
    from trainer.prerank.adindex import AdIndex, origin_of, user_queries
    from trainer.runs.folder import run_or_newest
    from trainer.runs.saved import open_trained

    _check_options(options)
    start = time.monotonic()
    Storage(options.out).check_bucket()  # before the work
    opened = open_trained(
        run_or_newest(options.run), SoloComm(), which=options.checkpoint, store_version=options.store_version
    )
    with contextlib.closing(opened) as trained:
        origin, known = origin_of(trained), AdIndex.open(options.out) if options.add or options.sync else None
        if known:
            known.check_origin(origin)  # before the work
        chosen, vectors_NW = _vectors(trained, options)
        num_missing = trained.missing_lookups()  # before lookups of users' images are counted too
        kind = known.state.kind if known else options.kind or "flat"
        queries = user_queries(trained) if kind == "hnsw" else None
        if known:
            max_gone = options.max_gone if options.sync else None
            index, changes = known.update(chosen.keys_N, vectors_NW, origin, queries, max_gone)
        else:
            min_recall = MIN_RECALL if options.min_recall is None else options.min_recall
            index = AdIndex.build(options.out, kind, chosen.keys_N, vectors_NW, origin, queries, min_recall)
            changes = {"new": len(chosen.keys_N)}
    features = f"snapshot {trained.store_version}" if trained.store_version else "none: a run without images"
    if num_missing:
        features += f"; {num_missing:,} lookups of images that have none"
    state, ads = index.state, ", ".join(f"{count:,} {what}" for what, count in changes.items())
    measured = f"{state.recall:.4f} for vectors of {state.queries}, effort {index.index.effort}"
    lines = [
        f"run          {trained.saved.folder}, {trained.saved.checkpoint.name}",
        f"features     {features}",
        f"ads          {ads}",
        f"index        {state.kind}, {state.num_ads:,} ads, {state.dim} numbers each, inner product",
        f"recall@10    {measured if state.queries else 'exact'}",
        f"time         {time.monotonic() - start:.1f} s",
        f"written to   {options.out}, version {index.version}",
        *(f"note         {note}" for note in trained.saved.notes_on_missing(num_missing)),
    ]
    output.print_summary("\n".join(lines))
    if index.warning:
        output.print_warning(index.warning)


def _check_options(options: BuildOptions) -> None:
    """Raise BadParameter for options that do not go together."""
    if options.ads and options.samples:
        raise typer.BadParameter(Problem.ADS_AND_SAMPLES.of(), param_hint="--samples")
    kept = {"--index": options.kind, "--min-recall": options.min_recall}
    sources = {"--add": options.add or None, "--ads": options.ads, "--samples": options.samples}
    for way, others, problem in (
        ("--sync", sources, Problem.DOES_NOT_GO_WITH),
        ("--sync", kept, Problem.KIND_IS_KEPT),
        ("--add", kept, Problem.KIND_IS_KEPT),
    ):
        wrong = next((name for name, value in others.items() if value is not None), None)
        if wrong and (options.sync if way == "--sync" else options.add):
            raise typer.BadParameter(problem.of(way, wrong), param_hint=wrong)


def _vectors(trained: "TrainedRun", options: BuildOptions) -> "tuple[Ads, Vectors]":
    """Read the ads of a table, else of samples, and compute their vectors."""
    from trainer.prerank.adindex import ad_vectors, ads_of_samples, ads_of_table, towers

    fields = towers(trained).ad_fields
    if table := options.sync or options.ads:
        chosen = ads_of_table(table, trained.schema, fields)
    else:
        chosen = ads_of_samples(options.samples or trained.config.data.samples, trained.schema, fields)
    with output.progress_bar("ads") as progress:
        return chosen, ad_vectors(trained, chosen, _BATCH_SIZE, progress)


@app.command(epilog="Example: `crossmedia index search --run data/runs/towers --user 17 --k 5`")
def search(
    run: Annotated[str, typer.Option(help="Folder or address of a run with model.base=two_tower.")],
    user: Annotated[str, typer.Option(help="A user of the test samples, as the samples have it: a number or a text.")],
    index: Annotated[str, typer.Option(help="Folder or address of the index, from crossmedia index build.")] = INDEX,
    k: Annotated[int, typer.Option(min=1, max=MOST_FOUND, help="Ads to find.")] = 10,
    samples: Annotated[
        str | None,
        typer.Option(help="Other samples: their test/ is used.", show_default="those of the run, of its test days"),
    ] = None,
    checkpoint: WhichCheckpoint = None,
) -> None:
    """Find the ads that suit a user best, as the user was in their last test sample."""
    from trainer.comm import SoloComm
    from trainer.prerank.adindex import AdIndex, candidates, origin_of
    from trainer.runs.saved import open_trained
    from trainer.samples.survey import IdDictionary

    with contextlib.closing(open_trained(run_path(run), SoloComm(), which=checkpoint, samples=samples)) as trained:
        ads = AdIndex.open(index)
        ads.check_origin(origin_of(trained))
        found = candidates(trained, ads, samples, user, k)
        notes = trained.saved.notes_on_missing(trained.missing_lookups())
    names = [ads.state.origin.key_column]
    rows: list[tuple[str, ...]] = [(str(key), f"{value:.4f}") for key, value in found]
    if dictionary := IdDictionary.of_run(run_path(run)):
        texts = dictionary.texts(key for key, _ in found)
        names.append("text")
        rows = [(key, texts.get(int(key), ""), value) for key, value in rows]
    output.print_rows([*names, "inner product"], rows, numbers=["inner product"])
    for note in notes:
        output.print_summary(f"note: {note}")


if __name__ == "__main__":
    commandline.run_app(app)
