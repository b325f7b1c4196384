"""Options that several commands of a store share."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from featurestore.snapshot import Snapshot
    from featurestore.store import FeatureStore

Url = Annotated[str, typer.Argument(metavar="URL", help="Folder or s3:// address of the store.")]
Version = Annotated[int | None, typer.Option("--version", help="Snapshot; the newest by default.")]
At = Annotated[
    datetime | None,
    typer.Option(
        "--at",
        formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"],
        help="Snapshot that was the newest at this time, UTC unless it says otherwise.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and change nothing.")]


def chosen_snapshot(store: "FeatureStore", version: int | None, at: datetime | None) -> "Snapshot":
    """Return the snapshot that --version or --at names. Raises SnapshotNotFoundError, typer.BadParameter for both."""
    if version is not None and at is not None:
        raise typer.BadParameter("--version and --at name a snapshot each: give one of them")
    return store.snapshot(version, at)
