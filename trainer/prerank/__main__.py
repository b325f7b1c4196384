"""crossmedia index: measure an index of ads, and ask it; the towers are trained by trainer.main."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.files import JsonOption, write_json_option
from featurestore.console.output import figure, print_rows, print_summary
from featurestore.published.paths import run_path
from trainer.cli import WhichCheckpoint, counts_of
from trainer.prerank import INDEX

if TYPE_CHECKING:
    from trainer.prerank.artifact import AdIndex
    from trainer.runs.saved import TrainedRun

Run = Annotated[str, typer.Option(help="Folder or address of a run with model.base=two_tower.")]
Index = Annotated[str, typer.Option(help="Folder or address of the index, from crossmedia index build.")]
MOST_FOUND = 1_000_000  # ads of one search: a search keeps them all in memory

Samples = Annotated[
    str | None,
    typer.Option(help="Other samples: their test/ is taken.", show_default="those of the run, of its test days"),
]

app = CommandApp(rich_markup_mode="markdown", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Measure and ask an index of ads that a two-tower run made."""


@app.command(
    "eval",
    epilog="Examples:\n\n"
    "    crossmedia index eval --run data/runs/towers --k 10,100,1000 --json figures.json\n\n"
    "    crossmedia index eval --run data/runs/towers --effort 16",
)
def evaluate_index(
    run: Run,
    index: Index = INDEX,
    k: Annotated[Any, typer.Option(parser=counts_of, metavar="K,K", help="Candidates of a search.")] = "10,100",
    queries: Annotated[int, typer.Option(min=1, help="Users to search for, at most.")] = 1000,
    effort: Annotated[
        int | None, typer.Option(min=1, help="Candidates that hnsw keeps.", show_default="the index's")
    ] = None,
    samples: Samples = None,
    checkpoint: WhichCheckpoint = None,
    out: JsonOption = None,
) -> None:
    """Measure the recall of the index against exact search, and the time of a search.

    The GAUC of the run itself is in its report, and of other samples in that of `crossmedia evaluate`.
    """
    if k[-1] > MOST_FOUND:
        raise typer.BadParameter(f"{k[-1]} is more than {MOST_FOUND:,}, the most of a search", param_hint="--k")
    from trainer.prerank.artifact import search_figures
    from trainer.prerank.vectors import users_of_tests

    with _opened(run, index, checkpoint, samples) as (trained, ads):
        users_KW = users_of_tests(trained, samples, queries).vectors_KW
        notes = trained.saved.notes_on_missing(trained.missing_lookups())
        report = {
            "run": str(trained.saved.folder),
            "checkpoint": trained.saved.checkpoint.name,
            "store_version": trained.store_version,
            "index": {"version": ads.version, **ads.state.model_dump(include={"kind", "dim", "num_ads", "num_unused"})},
            "search": asdict(search_figures(ads, users_KW, k, effort)),
            "notes": [*notes, *([ads.warning] if ads.warning else [])],
        }
    _show(report)
    write_json_option(out, report)


@app.command(epilog="Example: `crossmedia index search --run data/runs/towers --user 17 --k 5`")
def search(
    run: Run,
    user: Annotated[str, typer.Option(help="A user of the test samples, as the samples have it: a number or a text.")],
    index: Index = INDEX,
    k: Annotated[int, typer.Option(min=1, max=MOST_FOUND, help="Ads to find.")] = 10,
    samples: Samples = None,
    checkpoint: WhichCheckpoint = None,
) -> None:
    """Find the ads that suit a user best, as the user was in their last test sample."""
    from trainer.prerank.vectors import candidates
    from trainer.samples.dictionary import IdDictionary

    with _opened(run, index, checkpoint, samples) as (trained, ads):
        found = candidates(trained, ads, samples, user, k)
        notes = trained.saved.notes_on_missing(trained.missing_lookups())
    names = [ads.state.origin.key_column]
    rows: list[tuple[str, ...]] = [(str(key), f"{value:.4f}") for key, value in found]
    if dictionary := IdDictionary.of_run(run_path(run)):
        texts = dictionary.texts(key for key, _ in found)
        names.append("text")
        rows = [(key, texts.get(int(key), ""), value) for key, value in rows]
    print_rows([*names, "inner product"], rows, numbers=["inner product"])
    _print_notes(notes)


@contextlib.contextmanager
def _opened(
    run: str, index: str, checkpoint: str | None, samples: str | None
) -> "Iterator[tuple[TrainedRun, AdIndex]]":
    """Open a run, and an index of its ads. Raises TrainerError, FeatureStoreError."""
    from trainer.comm import SoloComm
    from trainer.prerank.artifact import AdIndex
    from trainer.prerank.vectors import origin_of
    from trainer.runs.saved import open_trained

    with contextlib.closing(open_trained(run_path(run), SoloComm(), which=checkpoint, samples=samples)) as trained:
        ads = AdIndex.open(index)
        ads.check_origin(origin_of(trained))
        yield trained, ads


def _show(report: Mapping[str, Any]) -> None:
    index, figures = report["index"], report["search"]
    print_summary(
        f"{report['run']}, {report['checkpoint']}: {index['num_ads']:,} ads under {index['kind']}, "
        f"{figures['queries']:,} searches on one thread"
    )
    rows = [(f"recall@{count}", f"{recall:.4f}") for count, recall in figures["recall"].items()]
    print_rows(["measure", "value"], rows, numbers=["value"])
    names = ("queries_per_s", "p50_ms", "p95_ms", "p99_ms", "batched_queries_per_s")
    exact, mine = figures["exact"], figures["index"]
    kinds = (index["kind"], "exact")
    print_rows(
        [f"search for {max(figures['recall'])}", *kinds],
        [(name.replace("_", " "), figure(mine[name]), figure(exact[name])) for name in names],
        numbers=kinds,
    )
    _print_notes(report["notes"])


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print_summary(f"note: {note}")


if __name__ == "__main__":
    run_app(app)
