"""Options that several commands of a store share."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from featurestore.published.channels import VersionName
    from featurestore.snapshot import Snapshot
    from featurestore.store import FeatureStore

Url = Annotated[str, typer.Argument(metavar="URL", help="Folder or s3:// address of the store.")]


def read_version_name(text: str) -> "VersionName":
    """Read the number of a snapshot, or the name of a channel. Raises typer.BadParameter."""
    from featurestore.published.channels import version_name

    try:
        return version_name(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


WHICH = "N|CHANNEL"
Version = Annotated[
    Any,  # a VersionName: typer knows no unions
    typer.Option(
        "--version", parser=read_version_name, metavar=WHICH, help="Snapshot, or a channel; the newest by default."
    ),
]
At = Annotated[
    datetime | None,
    typer.Option(
        "--at",
        formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"],
        help="Snapshot that was the newest at this time, UTC unless it says otherwise.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and change nothing.")]


def chosen_snapshot(store: "FeatureStore", version: "VersionName | None", at: datetime | None) -> "Snapshot":
    """Return the snapshot that --version or --at names.

    Raises SnapshotNotFoundError, ChannelError, typer.BadParameter for both.
    """
    if version is not None and at is not None:
        raise typer.BadParameter("--version and --at name a snapshot each: give one of them")
    return store.snapshot(version, at)
