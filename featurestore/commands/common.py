"""What the commands share: options, a progress bar, one line instead of a traceback."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from featurestore.errors import FeatureStoreError

Url = Annotated[str, typer.Argument(metavar="URL", help="Folder or s3:// address of the store.")]
Version = Annotated[int | None, typer.Option("--version", help="Snapshot; the newest by default.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]


@contextmanager
def progress_bar(things: str = "shards") -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal: call what comes out with the `things` done, and all of them."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(things)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def user_errors() -> Iterator[None]:
    """One line on stderr instead of a traceback, and exit code 1."""
    try:
        yield
    except FeatureStoreError as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from None
