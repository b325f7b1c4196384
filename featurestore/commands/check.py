"""Commands verify, repair and check-backend: find broken files, repair them, and test an address for a store."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from featurestore.commands.common import WHICH, DryRun, Url, read_version_name
from featurestore.console.commandline import CommandApp
from featurestore.console.output import print_problem, print_summary, progress_bar
from featurestore.errors import UnsafeBackendError
from featurestore.text import count_text

NOT_TRIED = 3  # exit code of a check that found nothing out

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
            raise typer.BadParameter("it reads every file of a store: give no --version", param_hint="--absent")
        _prove_absent(url, absent)
        return
    from featurestore.published.channels import find_channel
    from featurestore.storage.storage import Storage
    from featurestore.upkeep.verify import verify as verify_store

    if isinstance(version, str):
        version = find_channel(Storage(url, keep_inside=True), version).version
    with progress_bar("files") as progress:
        report = verify_store(url, version, progress)
    for problem in report.problems:
        print_problem(f"broken: {problem}")
    for problem in report.known:
        print_summary(f"known, in older snapshots alone: {problem.message}")
    looked_at = f"{count_text(report.num_manifests, 'manifest')}, {count_text(report.num_files, 'file')}"
    print_summary(f"{count_text(len(report.problems), 'problem')} in {looked_at}, {report.num_bytes:,} bytes")
    raise typer.Exit(1 if report.problems else 0)


def _prove_absent(url: str, file: Path) -> None:
    from featurestore.commands.rewrite import show_absence
    from featurestore.store import FeatureStore
    from featurestore.upkeep.purge import find_traces, read_images

    images, store = read_images(file), FeatureStore.open(url)
    with progress_bar("files") as progress:
        report = find_traces(store.storage, images, progress)
    show_absence(report, images, store.url)


@app.command(epilog="Example: `crossmedia store repair data/features --dry-run`")
def repair(url: Url, dry_run: DryRun = False) -> None:
    """Repair what verify finds, in one commit. Rows that are lost with a broken file are computed by the next refresh.

    Exit code 1 when something is left that only a backup or you can repair.
    """
    from featurestore.upkeep.repair import repair as repair_store

    with progress_bar("files") as progress:
        report = repair_store(url, dry_run, progress)
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
    url: Annotated[str, typer.Argument(metavar="URL", help="Folder or s3:// address where a store is to be.")],
    writers: Annotated[int, typer.Option("--writers", min=2, max=256, help="Threads that race.")] = 4,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Races, each for a new file.")] = 50,
) -> None:
    """Test whether a place is fit for a store: an exclusive create has one winner, and reads see every write.

    Tries what commits rely on, then lets threads race to create one file, many times. Exit code 1 when the place is
    unsafe: commits would be lost there. Exit code 3 when no race overlapped, so that nothing was found out. No race can
    prove that a place is safe: read what its maker promises about conditional puts too.
    """
    from featurestore.storage.safety import check_backend as race
    from featurestore.storage.storage import Storage

    storage = Storage(url)
    with progress_bar("races") as progress:
        report = race(storage, num_writers=writers, num_rounds=rounds, progress=progress)
    for problem in report.problems:
        sys.stderr.write(f"unsafe: {problem}\n")
    if report.problems:
        raise UnsafeBackendError(f"{storage.url} cannot hold a store, as commits could be lost there")
    races = f"{report.num_overlapping:,} of {report.num_rounds:,} races of {report.num_writers} writers overlapped"
    if not report.num_overlapping:
        print_problem(f"not disproved, and not tried: {races}; try more --rounds and --writers")
        raise typer.Exit(NOT_TRIED)
    print_summary(f"not disproved: {races}, each had one winner; a create takes {report.create_s * 1000:.1f} ms")
