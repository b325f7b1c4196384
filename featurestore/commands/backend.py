"""check-backend: can a place hold a store?"""

import sys
from typing import Annotated

import typer

from featurestore.commands.common import progress_bar
from featurestore.console.commandline import CommandApp
from featurestore.storage.safety import check_backend as check
from featurestore.storage.storage import Storage

app = CommandApp()


@app.command(epilog="Example: `python -m featurestore check-backend s3://bucket/features --processes 16`")
def check_backend(
    url: Annotated[str, typer.Argument(metavar="URL", help="Folder or s3:// address where a store is to be.")],
    processes: Annotated[int, typer.Option("--processes", min=2, max=256, help="Writers that race.")] = 4,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Races, each for a new file.")] = 50,
) -> None:
    """Check that a place can hold a store: one of many writers wins, and what is written is seen.

    Tries what commits rely on, then lets processes race to create one file, many times. Exit code 1 when the place is
    unsafe: commits would be lost there.
    """
    storage = Storage(url)
    with progress_bar("races") as progress:
        report = check(storage, num_processes=processes, num_rounds=rounds, progress=progress)
    for problem in report.problems:
        sys.stderr.write(f"unsafe: {problem}\n")
    if report.problems:
        sys.stderr.write(f"error: {storage.url} cannot hold a store, as commits could be lost there\n")
        raise typer.Exit(1)
    races = f"{report.num_rounds:,} races of {report.num_writers} processes had one winner each"
    sys.stdout.write(f"safe: {races}; a create takes {report.create_s * 1000:.1f} ms\n")
