"""The commands of crossmedia store, one file for each kind, and the options that several share."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from featurestore.published.versions import VersionName
    from featurestore.store import FeatureStore

Url = Annotated[str, typer.Argument(metavar="URL", help="Folder or s3:// address of the store.")]


def open_store(url: str) -> "FeatureStore":
    """Open a store; only the commands that call this wait for what it imports."""
    from featurestore.store import FeatureStore

    return FeatureStore.open(url)


def read_version_name(text: str) -> "VersionName":
    """Read the number of a snapshot, or the name of a channel. Raises typer.BadParameter."""
    from featurestore.published.versions import version_name

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
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and change nothing.")]
