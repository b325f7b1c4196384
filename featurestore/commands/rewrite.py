"""Commands remake and purge: convert a store, and remove images from its whole history."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from featurestore.commands.common import DryRun, Url, Version
from featurestore.console.commandline import CONTINUES, CommandApp
from featurestore.console.output import print_problem, print_summary, print_table, progress_bar, text_console
from featurestore.errors import FAILED
from featurestore.text import DType, count_text, printable, ranges_text

if TYPE_CHECKING:
    from featurestore.upkeep.purge import AbsenceReport, Images, PurgeReport
    from featurestore.upkeep.remake import RemakeReport

_MOST_NAMED = 10

app = CommandApp(stopped=CONTINUES)


@app.command(
    epilog="Examples:\n\n"
    "- `crossmedia store remake data/features data/features-256 --dims 256`\n\n"
    "- `crossmedia store remake s3://bucket/features s3://bucket/features-half --dtype float16`"
)
def remake(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder or s3:// address of the store.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where the new store goes.")],
    dtype: Annotated[
        DType | None, typer.Option("--dtype", help="What the new store keeps.", show_default="the store's")
    ] = None,
    dims: Annotated[
        int | None,
        typer.Option("--dims", min=1, help="Principal components of a row to keep.", show_default="all its numbers"),
    ] = None,
    version: Version = None,
) -> None:
    """Make a new store of another: in another dtype, or of principal components, and measure what its rows keep.

    Says how large the relative error is, and how many nearest neighbours stay. With `--dims` the new store is
    compact: each row becomes its coordinates along the principal components of all rows. The basis is a file of the new
    store; extract_features.py --reduce OUT makes rows by it, and refresh_features.py knows it. OUT is made at the end:
    after an interruption the same command starts again.
    """
    from featurestore.store import FeatureStore
    from featurestore.upkeep.remake import remake as remake_store

    store = FeatureStore.open(source)
    with progress_bar("shards" if dims is None else "shards, each twice") as progress:
        report = remake_store(store, out, dims=dims, dtype=dtype, version=version, progress=progress)
    show_remade(report)
    if dims is not None:
        print_summary(f"next: crossmedia plan --store {out} predicts bytes and time of a step with it")


def show_remade(report: "RemakeReport") -> None:
    """Print what the two stores have, and what the rows keep."""
    table = Table("")
    for dtype_name in (report.source_dtype, report.dtype):
        table.add_column(dtype_name, justify="right")
    table.add_row("numbers of a row", f"{report.source_dim:,}", f"{report.dim:,}")
    table.add_row("bytes of a row", "1", f"{report.row_bytes_share:.4f}")
    table.add_row("rows", f"{report.num_rows:,}", f"{report.num_rows:,}")
    table.add_row("bytes", f"{report.source_bytes:,}", f"{report.bytes:,}")
    if report.variance_kept is not None:
        table.add_row("variance kept", "", f"{report.variance_kept:.4%}")
    kept = report.accuracy
    for name, value in {
        "relative error, mean": kept.relative_error_mean,
        "relative error, 99 % of rows below": kept.relative_error_p99,
        "10 nearest neighbours found again": kept.recall_at_10,
    }.items():
        table.add_row(name, "", "too few rows" if value is None else f"{value:.6f}")
    console = text_console()
    print_table(console, table)
    console.print(
        f"snapshot {report.source_version} of {report.source}; compared {kept.num_compared:,} rows,"
        f" {kept.num_queries:,} of them as queries"
    )


@app.command(
    epilog="Examples:\n\n"
    "- `crossmedia store purge data/features --uris takedown.txt --dry-run`\n\n"
    "- `crossmedia store purge s3://bucket/features --keys takedown-keys.txt`\n\n"
    "- `crossmedia store verify data/features --absent takedown.txt`"
)
def purge(
    url: Url,
    keys: Annotated[Path | None, typer.Option("--keys", help="Text file of keys, one on each line.")] = None,
    uris: Annotated[Path | None, typer.Option("--uris", help="Text file of uris, one on each line.")] = None,
    writer_hours: Annotated[
        float,
        typer.Option("--writer-hours", min=0, help="Younger files of no snapshot may be a writer's, and stay."),
    ] = 1.0,
    dry_run: DryRun = False,
) -> None:
    """Remove rows of images from a store with ALL of its history, for takedowns, and prove that they are gone.

    Snapshots whose files have such rows go; the newest is committed again without them. The quarantine and staged parts
    are cleaned too. Let no writer be at work. Exit code 1 where a trace is left: run it again. Caches of readers and
    what was made of the rows are elsewhere: docs/OPERATE.md.
    """
    from featurestore.store import FeatureStore
    from featurestore.upkeep.purge import purge as purge_store
    from featurestore.upkeep.purge import read_images

    if keys is not None and uris is None:
        images = read_images(keys, "key")
    elif uris is not None and keys is None:
        images = read_images(uris, "uri")
    else:
        raise typer.BadParameter("give one of them", param_hint="--keys, --uris")
    with progress_bar("files") as progress:
        report = purge_store(
            FeatureStore.open(url),
            images,
            writer_hours=writer_hours,
            dry_run=dry_run,
            progress=progress,
        )
    print_summary("\n".join(_purge_lines(report, images, dry_run)))
    for path in report.young:
        print_problem(f"left: {path} belongs to no snapshot, and a writer may be at work on it: run it again later")
    if report.proof is not None:
        show_absence(report.proof, images, url)


def show_absence(report: "AbsenceReport", images: "Images", url: str) -> None:
    """Print a proof, or what speaks against it. Raises typer.Exit with 1 then."""
    for trace in report.traces:
        print_problem(f"error: {trace.text}")
    looked_at = f"{count_text(report.num_files, 'file')}, {report.num_bytes:,} bytes"
    if report.is_absent:
        print_summary(f"proof        no row of {images.described} is in {looked_at}: all that lies in {url}")
        return
    where = count_text(len(report.traces), "file")
    print_summary(f"not absent: {where} with a trace of {images.described}, or that cannot be read, of {looked_at}")
    raise typer.Exit(FAILED)


def _purge_lines(report: "PurgeReport", images: "Images", dry_run: bool) -> list[str]:
    would = "would be " if dry_run else ""
    lines = [f"images       {images.described}; {count_text(report.num_rows, 'row')} in all files, old ones too"]
    if report.without_rows:
        named = ", ".join(printable(name) for name in report.without_rows[:_MOST_NAMED])
        more = len(report.without_rows) - _MOST_NAMED
        lines.append(
            f"no row       {len(report.without_rows):,} of {images.described} had no row in any file: {named}"
            f"{f' and {more:,} more' if more > 0 else ''}; check the spelling, if no earlier purge removed them"
        )
    if report.version is not None:
        lines.append(f"snapshot     {report.version} has all other rows")
    if report.expired:
        lines.append(
            f"history      {count_text(len(report.expired), 'snapshot')} {would}gone: {ranges_text(report.expired)}"
        )
    lines += [f"channel      {name} points to snapshot {report.version or 'the newest'}" for name in report.moved]
    if report.num_quarantined:
        lines.append(f"quarantine   {count_text(report.num_quarantined, 'row')} {would}removed")
    lines += [f"staging      parts of run {run} {would}removed" for run in report.runs]
    lines.append(f"files        {report.num_files:,} {would}deleted")
    return lines
