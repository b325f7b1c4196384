"""Command expire: remove old versions of a model."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal as bytes_text

from featurestore.console.commandline import CommandApp
from featurestore.console.output import print_summary
from featurestore.text import count_text, ranges_text
from serving.bundle.upkeep import GRACE_DAYS, KEEP_DAYS, KEEP_LAST
from serving.commands.bundle import Url

if TYPE_CHECKING:
    from serving.bundle.upkeep.expiry import BundleExpireReport

app = CommandApp()


@app.command(
    epilog="Examples:\n\n"
    "- `python -m serving expire data/models/ctr --dry-run`\n\n"
    "- `python -m serving expire s3://shop/models/ctr --keep-last 3 --keep-days 7`"
)
def expire(
    url: Url,
    keep_last: Annotated[
        int, typer.Option("--keep-last", min=0, help="How many of the last versions to keep.")
    ] = KEEP_LAST,
    keep_days: Annotated[
        float, typer.Option("--keep-days", min=0, help="Keep versions that were published or in use in the last days.")
    ] = KEEP_DAYS,
    grace_days: Annotated[
        float,
        typer.Option("--grace-days", min=0, help="Always keep versions that were in use in the last days."),
    ] = GRACE_DAYS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and change nothing.")] = False,
) -> None:
    """Remove versions that none of these options keeps, with all of their files.

    The version in use and the newest one always stay. Leftovers of killed exports are removed after a day. The grace
    time must be longer than a scorer takes to switch. To remove snapshots of vectors, use `python -m featurestore
    expire`."""
    from featurestore.storage.storage import Storage
    from serving.bundle.upkeep.expiry import expire as expire_versions

    report = expire_versions(
        Storage(url), keep_last=keep_last, keep_days=keep_days, grace_days=grace_days, dry_run=dry_run
    )
    print_summary(_text(report, dry_run))


def _text(report: "BundleExpireReport", dry_run: bool) -> str:
    keep, remove, delete = ("would keep", "would remove", "would delete") if dry_run else ("kept", "removed", "deleted")
    expired = f": {ranges_text(report.expired)}" if report.expired else ""
    left = f", leftovers of {count_text(report.num_leftovers, 'killed export')}" if report.num_leftovers else ""
    return (
        f"{keep} {count_text(len(report.kept), 'version')}: {ranges_text(report.kept)}\n"
        f"{remove} {count_text(len(report.expired), 'version')}{expired}\n"
        f"{delete} {count_text(report.num_files, 'file')}, {bytes_text(report.num_bytes)}{left}"
        + "".join(f"\n  {path}" for path in report.paths)
    )
