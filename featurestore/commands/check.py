"""verify and repair: is every file what was written, and what to do where one is not."""

import sys
from typing import Annotated

import typer

from featurestore.commands.common import DryRun, Url, progress_bar, user_errors
from featurestore.upkeep.repair import repair as repair_store
from featurestore.upkeep.verify import verify as verify_store

app = typer.Typer()


@app.command(epilog="Example: `python -m featurestore verify s3://bucket/features`")
def verify(
    url: Url,
    version: Annotated[int | None, typer.Option(help="Snapshot whose data to check; all kept ones by default.")] = None,
) -> None:
    """Check every file of a store: manifests, pins, quarantine, and the data of all kept snapshots, or of one.

    Exit code 1 when one is broken: the line says which, what is wrong, and what mends it.
    """
    with user_errors(), progress_bar("files") as progress:
        report = verify_store(url, version, progress)
    for problem in report.problems:
        sys.stderr.write(f"broken: {problem}\n")
    for problem in report.known:
        sys.stdout.write(f"known, in older snapshots alone: {problem.message}\n")
    looked_at = f"{report.num_manifests:,} manifests, {report.num_files:,} files, {report.num_bytes:,} bytes"
    sys.stdout.write(f"{len(report.problems)} problems in {looked_at}\n")
    raise typer.Exit(1 if report.problems else 0)


@app.command(epilog="Example: `python -m featurestore repair data/features --dry-run`")
def repair(url: Url, dry_run: DryRun = False) -> None:
    """Mend what verify finds, in one commit. What is lost of a broken file, the next refresh computes again.

    Exit code 1 when something is left that only a backup or a person can mend.
    """
    with user_errors(), progress_bar("files") as progress:
        report = repair_store(url, dry_run, progress)
    for action in report.actions:
        sys.stdout.write(f"{'would ' if dry_run else ''}{action}\n")
    for problem in report.left:
        sys.stderr.write(f"left: {problem}\n")
    if not report.actions and not report.left:
        sys.stdout.write("nothing to repair\n")
    elif report.version is not None:
        sys.stdout.write(f"committed snapshot {report.version}; {report.num_quarantined:,} images put in quarantine\n")
    raise typer.Exit(1 if report.left else 0)
