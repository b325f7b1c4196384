"""Commands verify, repair, check-backend, remake and purge: the files of a store as a whole."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from featurestore import upkeep
from featurestore.commands import WHICH, DryRun, Url, Version, open_store, read_version_name
from featurestore.console.commandline import CommandApp
from featurestore.console.output import print_problem, print_summary, print_table, progress_bar, text_console
from featurestore.errors import FAILED, UnsafeBackendError
from featurestore.problems import Problem
from featurestore.storage.storage import Storage
from featurestore.text import DType, count_text, printable, ranges_text

NOT_TRIED = 3  # exit code of a check that found nothing out
_MOST_NAMED = 10

app = CommandApp()


@app.command(
    findings=True,
    epilog="Examples:\n\n"
    "- `crossmedia store verify s3://bucket/features`\n\n"
    "- `crossmedia store verify s3://bucket/features --absent takedown.txt`",
)
def verify(
    url: Url,
    version: Annotated[
        Any,
        typer.Option(
            parser=read_version_name, metavar=WHICH, help="Snapshot whose data to check; by default all kept ones."
        ),
    ] = None,
    absent: Annotated[
        Path | None,
        typer.Option("--absent", help="Prove instead that no file of the store has a row of these keys or uris."),
    ] = None,
) -> None:
    """Check every file of a store: manifests, pins, channels, quarantine, the data of all kept snapshots, or of one.

    Exit code 1 when one is broken: the line names it, what is wrong, and what repairs it. With --absent FILE it reads
    every file that lies in the store, whether a snapshot names it or not, and exits with 1 where one has a row of these
    images: a number on each line, or uris.
    """
    if absent is not None:
        if version is not None:
            raise typer.BadParameter(Problem.ABSENT_READS_ALL.of(), param_hint="--absent")
        images, store = upkeep.purge.read_images(absent), open_store(url)
        with progress_bar("files") as progress:
            traces = upkeep.purge.find_traces(store.storage, images, progress)
        show_absence(traces, images, store.url)
        return
    from featurestore.published.versions import find_channel

    if isinstance(version, str):
        version = find_channel(Storage(url, keep_inside=True), version).version
    with progress_bar("files") as progress:
        report = upkeep.verify.verify(url, version, progress)
    for problem in report.problems:
        print_problem(f"broken: {problem}")
    for problem in report.known:
        print_summary(f"known, in older snapshots alone: {problem.error}")
    looked_at = f"{count_text(report.num_manifests, 'manifest')}, {count_text(report.num_files, 'file')}"
    print_summary(f"{count_text(len(report.problems), 'problem')} in {looked_at}, {report.num_bytes:,} bytes")
    raise typer.Exit(1 if report.problems else 0)


@app.command(epilog="Example: `crossmedia store repair data/features --dry-run`")
def repair(url: Url, dry_run: DryRun = False) -> None:
    """Repair problems that verify finds, in one commit. The next refresh computes the rows lost with a broken file.

    Exit code 1 when something is left that only a backup or you can repair.
    """
    with progress_bar("files") as progress:
        report = upkeep.verify.repair(url, dry_run, progress)
    for action in report.actions:
        print_summary(f"{'would ' if dry_run else ''}{action}")
    for problem in report.left:
        print_problem(f"left: {problem}")
    if not report.actions and not report.left:
        print_summary("nothing to repair")
    elif report.version is not None:
        print_summary(
            f"committed snapshot {report.version}; {count_text(report.num_quarantined, 'image')} put in quarantine"
        )
    raise typer.Exit(1 if report.left else 0)


@app.command(epilog="Example: `crossmedia store check-backend s3://bucket/features --writers 16`")
def check_backend(
    url: Annotated[str, typer.Argument(metavar="URL", help="Folder or s3:// address planned for a store.")],
    writers: Annotated[int, typer.Option("--writers", min=2, max=256, help="Threads that race.")] = 4,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Races, each for a new file.")] = 50,
) -> None:
    """Test whether a place is fit for a store: an exclusive create has one winner, and reads see every write.

    Tests the operations that commits rely on, then lets threads race to create one file, many times. Exit code 1 when
    the place is unsafe: commits would be lost there. Exit code 3 when no race overlapped, so that nothing was found
    out. No race can prove that a place is safe: read what its maker promises about conditional puts too.
    """
    from featurestore.storage.safety import check_backend as race

    storage = Storage(url)
    with progress_bar("races") as progress:
        report = race(storage, num_writers=writers, num_rounds=rounds, progress=progress)
    for problem in report.problems:
        sys.stderr.write(f"unsafe: {problem}\n")
    if report.problems:
        raise UnsafeBackendError(Problem.UNSAFE_PLACE, storage.url)
    races = f"{report.num_overlapping:,} of {report.num_rounds:,} races of {report.num_writers} writers overlapped"
    if not report.num_overlapping:
        print_problem(f"not disproved, and not tried: {races}; try more --rounds and --writers")
        raise typer.Exit(NOT_TRIED)
    print_summary(f"not disproved: {races}, each had one winner; a create takes {report.create_s * 1000:.1f} ms")


@app.command(
    epilog="Examples:\n\n"
    "- `crossmedia store remake data/features data/features-256 --dims 256`\n\n"
    "- `crossmedia store remake s3://bucket/features s3://bucket/features-half --dtype float16`"
)
def remake(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder or s3:// address of the store.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or s3:// address of the new store.")],
    dtype: Annotated[
        DType | None, typer.Option("--dtype", help="Float type of the new store.", show_default="the store's")
    ] = None,
    dims: Annotated[
        int | None,
        typer.Option("--dims", min=1, help="Principal components of a row to keep.", show_default="all its numbers"),
    ] = None,
    version: Version = None,
) -> None:
    """Make a new store of another: in another dtype, or of principal components, and measure the loss of its rows.

    Says how large the relative error is, and how many nearest neighbours stay. With `--dims` the new store is
    compact: each row becomes its coordinates along the principal components of all rows. The basis is a file of the new
    store, by which crossmedia extract and refresh make further rows. OUT is made at the end: after an
    interruption the same command starts again.
    """
    store = open_store(source)
    with progress_bar("shards" if dims is None else "shards, each twice") as progress:
        report = upkeep.remake.remake(store, out, dims=dims, dtype=dtype, version=version, progress=progress)
    show_remade(report)
    if dims is not None:
        print_summary(f"next: crossmedia train --set data.store={out}")


def show_remade(report: "upkeep.remake.RemakeReport") -> None:
    """Print the sizes of the two stores, and the loss of the rows."""
    table = Table("")
    for dtype_name in (report.source_dtype, report.dtype):
        table.add_column(dtype_name, justify="right")
    table.add_row("numbers of a row", f"{report.source_dim:,}", f"{report.dim:,}")
    table.add_row("bytes of a row, as a share", "1", f"{report.row_bytes_share:.4f}")
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
        typer.Option("--writer-hours", min=0, help="Keep unreferenced files that are younger: a writer may need them."),
    ] = 1.0,
    dry_run: DryRun = False,
) -> None:
    """Remove rows of images from a store with ALL of its history, for takedowns, and prove that they are gone.

    Snapshots whose files have such rows go; the newest is committed again without them. The quarantine and staged parts
    are cleaned too. Let no writer be at work. Exit code 1 where a trace is left: run it again. Caches of readers, and
    files made from the rows, are elsewhere: docs/OPERATE.md.
    """
    if keys is not None and uris is None:
        images = upkeep.purge.read_images(keys, "key")
    elif uris is not None and keys is None:
        images = upkeep.purge.read_images(uris, "uri")
    else:
        raise typer.BadParameter(Problem.NOT_ONE_OF_BOTH.of(), param_hint="--keys, --uris")
    with progress_bar("files") as progress:
        report = upkeep.purge.purge(
            open_store(url), images, writer_hours=writer_hours, dry_run=dry_run, progress=progress
        )
    print_summary("\n".join(_purge_lines(report, images, dry_run)))
    for path in report.young:
        print_problem(f"left: {path} belongs to no snapshot, and a writer may be at work on it: run it again later")
    if report.proof is not None:
        show_absence(report.proof, images, url)


def show_absence(report: "upkeep.purge.AbsenceReport", images: "upkeep.purge.Images", url: str) -> None:
    """Print a proof, or the reasons against it. Raises typer.Exit with 1 then."""
    for trace in report.traces:
        print_problem(f"error: {trace.text}")
    looked_at = f"{count_text(report.num_files, 'file')}, {report.num_bytes:,} bytes"
    if report.is_absent:
        print_summary(f"proof        no row of {images.described} is in {looked_at}: all that lies in {url}")
        return
    where = count_text(len(report.traces), "file")
    print_summary(f"not absent: {where} with a trace of {images.described}, or that cannot be read, of {looked_at}")
    raise typer.Exit(FAILED)


def _purge_lines(report: "upkeep.purge.PurgeReport", images: "upkeep.purge.Images", dry_run: bool) -> list[str]:
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
