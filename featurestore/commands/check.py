"""verify and repair: is every file what was written, and what to do where one is not."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from featurestore.commands.common import DryRun, Url, progress_bar
from featurestore.console.commandline import CommandApp
from featurestore.lookup.cache import default_cache_dir
from featurestore.upkeep.cachecheck import verify_cache
from featurestore.upkeep.repair import repair as repair_store
from featurestore.upkeep.verify import verify as verify_store

app = CommandApp()


@app.command(
    epilog="Examples:\n\n"
    "- `python -m featurestore verify s3://bucket/features`\n\n"
    "- `python -m featurestore verify --cache`\n\n"
    "- `python -m featurestore verify --cache /mnt/fast/cache`"
)
def verify(
    place: Annotated[
        str | None,
        typer.Argument(metavar="URL|DIR", help="Folder or s3:// address of the store; with --cache of the cache."),
    ] = None,
    version: Annotated[int | None, typer.Option(help="Snapshot whose data to check; all kept ones by default.")] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Check a cache folder of this machine instead, by default the usual one.")
    ] = False,
) -> None:
    """Check every file of a store: manifests, pins, quarantine, and the data of all kept snapshots, or of one.

    With --cache every file of a cache folder instead. Exit code 1 when one is broken: the line says which, what is
    wrong, and what mends it.
    """
    if cache and version is not None:
        raise typer.BadParameter("--version is for a store: a cache is checked whole")
    if cache:
        _verify_cache(Path(place) if place else default_cache_dir())
    if not place:
        raise typer.BadParameter("name the store's URL, or --cache")
    with progress_bar("files") as progress:
        report = verify_store(place, version, progress)
    for problem in report.problems:
        sys.stderr.write(f"broken: {problem}\n")
    for problem in report.known:
        sys.stdout.write(f"known, in older snapshots alone: {problem.message}\n")
    looked_at = f"{report.num_manifests:,} manifests, {report.num_files:,} files, {report.num_bytes:,} bytes"
    sys.stdout.write(f"{len(report.problems)} problems in {looked_at}\n")
    raise typer.Exit(1 if report.problems else 0)


def _verify_cache(folder: Path) -> NoReturn:
    with progress_bar() as progress:
        report = verify_cache(folder, progress)
    for problem in report.problems:
        sys.stderr.write(f"broken: {problem}\n")
    if report.num_shards or report.num_other:
        looked_at = f"{report.num_shards:,} cached shards, {report.num_bytes:,} bytes of {folder}"
        sys.stdout.write(f"{len(report.problems)} problems in {looked_at}\n")
    else:
        sys.stdout.write(f"nothing to check: {folder} has no cached shards\n")
    if report.num_other:
        sys.stdout.write(f"{report.num_other:,} more are of another version, and go when 30 days old\n")
    raise typer.Exit(1 if report.problems else 0)


@app.command(epilog="Example: `python -m featurestore repair data/features --dry-run`")
def repair(url: Url, dry_run: DryRun = False) -> None:
    """Mend what verify finds, in one commit. What is lost of a broken file, the next refresh computes again.

    Exit code 1 when something is left that only a backup or a person can mend.
    """
    with progress_bar("files") as progress:
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
