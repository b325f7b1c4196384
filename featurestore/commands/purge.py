"""Command purge: remove rows of some images from a store with all of its history, and prove it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.commands.common import DryRun, Url
from featurestore.console.commandline import CommandApp
from featurestore.console.output import print_problem, print_summary, progress_bar
from featurestore.errors import FAILED
from featurestore.text import count_text, printable, ranges_text

if TYPE_CHECKING:
    from featurestore.upkeep.purge import AbsenceReport, Images, PurgeReport

_MOST_NAMED = 10

app = CommandApp(stopped="stopped by Ctrl-C; run the same command again: what is done stays done")


@app.command(
    epilog="Examples:\n\n"
    "- `python -m featurestore purge data/features --uris takedown.txt --dry-run`\n\n"
    "- `python -m featurestore purge s3://bucket/features --keys takedown.npy --move-channels --unpin`\n\n"
    "- `python -m featurestore verify data/features --absent takedown.txt`"
)
def purge(
    url: Url,
    keys: Annotated[
        Path | None, typer.Option("--keys", help="Keys: a number on each line, an int64 .npy, or `key` of a .parquet.")
    ] = None,
    uris: Annotated[Path | None, typer.Option("--uris", help="Uris: one on each line, or `uri` of a .parquet.")] = None,
    move_channels: Annotated[
        bool,
        typer.Option("--move-channels", help="Channels of older snapshots that go follow to the new snapshot."),
    ] = False,
    drop_pins: Annotated[bool, typer.Option("--unpin", help="Remove pins of snapshots that go.")] = False,
    writer_hours: Annotated[
        float,
        typer.Option("--writer-hours", min=0, help="Younger files of no snapshot may be a writer's, and stay."),
    ] = 1.0,
    dry_run: DryRun = False,
) -> None:
    """Remove rows of images from a store with ALL of its history, for takedowns, and prove that they are gone.

    Snapshots whose files have such rows go; the newest is committed again without them. The quarantine and staged parts
    are cleaned too. Let no writer be at work. Exit code 1 where a trace is left: run it again. Caches of readers and
    what was made of the rows are elsewhere: docs/OPERATE.md.
    """
    from featurestore.store import FeatureStore
    from featurestore.upkeep.purge import purge as purge_store
    from featurestore.upkeep.purge import read_images

    if keys is not None and uris is None:
        images = read_images(keys, "key")
    elif uris is not None and keys is None:
        images = read_images(uris, "uri")
    else:
        raise typer.BadParameter("give one of them", param_hint="--keys, --uris")
    with progress_bar("files") as progress:
        report = purge_store(
            FeatureStore.open(url),
            images,
            move_channels=move_channels,
            drop_pins=drop_pins,
            writer_hours=writer_hours,
            dry_run=dry_run,
            progress=progress,
        )
    print_summary("\n".join(_lines(report, images, dry_run)))
    for path in report.young:
        print_problem(f"left: {path} belongs to no snapshot, and a writer may be at work on it: run it again later")
    if report.proof is not None:
        show_absence(report.proof, images, url)


def show_absence(report: "AbsenceReport", images: "Images", url: str) -> None:
    """Print a proof, or what speaks against it. Raises typer.Exit with 1 then."""
    for trace in report.traces:
        print_problem(f"error: {trace.text}")
    looked_at = f"{count_text(report.num_files, 'file')}, {report.num_bytes:,} bytes"
    if report.is_absent:
        print_summary(f"proof        no row of {images.described} is in {looked_at}: all that lies in {url}")
        return
    where = count_text(len(report.traces), "file")
    print_summary(f"not absent: {where} with a trace of {images.described}, or that cannot be read, of {looked_at}")
    raise typer.Exit(FAILED)


def _lines(report: "PurgeReport", images: "Images", dry_run: bool) -> list[str]:
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
    lines += [f"pin          {name} removed" for name in report.unpinned]
    if report.num_quarantined:
        lines.append(f"quarantine   {count_text(report.num_quarantined, 'row')} {would}removed")
    lines += [f"staging      parts of run {run} {would}removed" for run in report.runs]
    lines.append(f"files        {report.num_files:,} {would}deleted")
    return lines
