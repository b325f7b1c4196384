"""Commands log, diff, restore, pin, unpin, compact, expire and channel: the snapshots of a store over time."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal as bytes_text

from featurestore import upkeep
from featurestore.commands import WHICH, DryRun, Url, open_store, read_version_name
from featurestore.console import commandline, output
from featurestore.problems import Problem
from featurestore.text import count_text, ranges_text
from featurestore.upkeep import GRACE_DAYS, KEEP_DAYS, KEEP_LAST

if TYPE_CHECKING:
    from featurestore.published.versions import ChannelMove
    from featurestore.store import FeatureStore
app = commandline.CommandApp()


def _pin_name(name: str) -> str:
    if not upkeep.history.is_pin_name(name):
        raise typer.BadParameter(Problem.NOT_A_PIN_NAME.of(name))
    return name


def _snapshot(help_text: str) -> Any:
    """Return an argument that names a snapshot."""
    return typer.Argument(metavar=WHICH, parser=read_version_name, help=help_text)


PinName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the pin.", callback=_pin_name)]


@app.command(epilog="Example: `crossmedia store log data/features --last 20`")
def log(
    url: Url,
    last: Annotated[int | None, typer.Option("--last", "-n", min=1, help="How many to list; all by default.")] = None,
) -> None:
    """List the snapshots that can be opened, newest first. Files, rows and bytes are those that each one needs."""
    entries = upkeep.history.log(open_store(url), last)
    if not entries:
        output.print_summary("no snapshot yet: nothing was committed")
        return
    names = ("version", "committed", "operation", "files", "rows", "bytes", "writer", "pinned", "channels")
    output.print_rows(names, map(_log_row, entries), numbers=("version", "files", "rows", "bytes"))


@app.command(
    epilog="Examples:\n\n"
    "- `crossmedia store diff data/features 12 19`\n\n"
    "- `crossmedia store diff data/features stable candidate --keys`"
)
def diff(
    url: Url,
    before: Annotated[Any, _snapshot("A snapshot.")],
    after: Annotated[Any, _snapshot("Another one, newer or older.")],
    keys: Annotated[bool, typer.Option("--keys", help="Print key and uri of each: + came, ~ changed, - went.")] = False,
) -> None:
    """Count the images that were added, changed and removed from one snapshot to another."""
    with output.progress_bar("shards") as progress:
        found = upkeep.history.diff(open_store(url), before, after, progress)
    if keys:
        for sign, rows in (("+", found.added), ("~", found.changed), ("-", found.removed)):
            for key, uri in zip(rows.keys_N.tolist(), rows.uris, strict=True):
                sys.stdout.write(f"{sign} {key} {uri}\n")
    counts = f"{len(found.added):,} added, {len(found.changed):,} changed, {len(found.removed):,} removed"
    output.print_summary(f"snapshot {before} to {after}: {counts}")


@app.command(epilog="Example: `crossmedia store restore data/features 12`")
def restore(url: Url, version: Annotated[Any, _snapshot("A kept snapshot.")]) -> None:
    """Commit a new snapshot with the rows of snapshot N. Later commits stay in the log."""
    store = open_store(url)
    old = store.snapshot(version).version
    snapshot = upkeep.history.restore(store, old)
    output.print_summary(f"snapshot {snapshot.version} holds what snapshot {old} holds")


@app.command(
    epilog="Examples:\n\n"
    "- `crossmedia store pin data/features before-migration`\n\n"
    "- `crossmedia store pin data/features quarterly-model 19`"
)
def pin(
    url: Url,
    name: PinName,
    version: Annotated[
        Any, typer.Argument(metavar=f"[{WHICH}]", parser=read_version_name, help="Snapshot; the newest by default.")
    ] = None,
) -> None:
    """Keep a snapshot, whatever the options of `expire`, until it is unpinned."""
    made = upkeep.history.pin(open_store(url), name, version)
    output.print_summary(f"{name} keeps snapshot {made.version}")


@app.command(epilog="Example: `crossmedia store unpin data/features before-migration`")
def unpin(url: Url, name: PinName) -> None:
    """Remove a pin. The next `expire` decides about its snapshot."""
    upkeep.history.unpin(open_store(url), name)
    output.print_summary(f"{name} is not a pin any more")


@app.command(
    epilog="Examples:\n\n"
    "- `crossmedia store compact data/features --dry-run`\n\n"
    "- `crossmedia store compact data/features --force`"
)
def compact(
    url: Url,
    force: Annotated[bool, typer.Option("--force", help="Also shards with few and small deltas.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Merge the files of shards with more than 8 deltas, or more than a quarter of their bytes in deltas.

    The rows stay exactly the same. Readers and writers may continue meanwhile.
    """
    with output.progress_bar("shards") as progress:
        report = upkeep.compaction.compact(open_store(url), force=force, dry_run=dry_run, progress=progress)
    output.print_summary(_compact_text(report, dry_run))


@app.command(
    epilog="Examples:\n\n"
    "- `crossmedia store expire data/features --dry-run`\n\n"
    "- `crossmedia store expire s3://bucket/features --keep-last 5 --keep-days 90`"
)
def expire(
    url: Url,
    keep_last: Annotated[
        int, typer.Option("--keep-last", min=0, help="How many of the last snapshots to keep.")
    ] = KEEP_LAST,
    keep_days: Annotated[
        float, typer.Option("--keep-days", min=0, help="Keep all snapshots that are younger, in days.")
    ] = KEEP_DAYS,
    grace_days: Annotated[
        float, typer.Option("--grace-days", min=0, help="Days before files of expired snapshots are deleted.")
    ] = GRACE_DAYS,
    dry_run: DryRun = False,
) -> None:
    """Remove snapshots that neither these options nor a pin or channel keep, and delete the files that they alone need.

    Files of writers that died are deleted too. The grace time must be longer than your longest job. The newest snapshot
    stays. Exit code 1 when it had to stop before the end.
    """
    with output.progress_bar("files") as progress:
        report = upkeep.expiry.expire(
            open_store(url),
            keep_last=keep_last,
            keep_days=keep_days,
            grace_days=grace_days,
            dry_run=dry_run,
            progress=progress,
        )
    output.print_summary(_expire_text(report, dry_run))
    if not report.is_complete:
        output.print_problem("stopped after half the grace time, as much may have changed by then: run it again")
        raise typer.Exit(1)


def _log_row(entry: "upkeep.history.LogEntry") -> Sequence[str]:
    from featurestore.log import utc_text

    manifest, names = entry.manifest, (", ".join(entry.pins), ", ".join(entry.channels))
    if manifest is None:
        return f"{entry.version}", "", "damaged: run verify", "", "", "", "", *names
    return (
        f"{entry.version}",
        utc_text(manifest.time_s),
        manifest.operation,
        f"{manifest.num_files:,}",
        f"{manifest.file_rows:,}",
        bytes_text(manifest.file_bytes),
        manifest.writer,
        *names,
    )


def _compact_text(report: "upkeep.compaction.CompactReport", dry_run: bool) -> str:
    if not report.shards:
        return f"nothing to compact in snapshot {report.version}"
    shards = count_text(len(report.shards), "shard")
    before = f"{count_text(report.num_files_before, 'file')}, {bytes_text(report.num_bytes_before)}"
    if dry_run:
        return f"would compact {shards} of {before}"
    after = f"{count_text(report.num_files_after, 'file')}, {bytes_text(report.num_bytes_after)}"
    lost = f"; another writer replaced {count_text(len(report.lost), 'shard')} more meanwhile" if report.lost else ""
    return f"snapshot {report.version}: {shards} of {before} became {after}{lost}"


def _expire_text(report: "upkeep.expiry.ExpireReport", dry_run: bool) -> str:
    keep, expire, delete = ("would keep", "would expire", "would delete") if dry_run else ("kept", "expired", "deleted")
    expired = f": {ranges_text(report.expired)}" if report.expired else ""
    runs = f", among them the staged parts of dead runs: {', '.join(report.runs)}" if report.runs else ""
    lines = [
        f"{keep} {count_text(len(report.kept), 'snapshot')}: {ranges_text(report.kept) or 'none'}",
        f"{expire} {len(report.expired):,}{expired}",
        f"{delete} {count_text(report.num_files, 'file')}, {bytes_text(report.num_bytes)}{runs}",
    ]
    if report.num_waiting:
        waiting = f"{count_text(report.num_waiting, 'file')}, {bytes_text(report.num_waiting_bytes)}"
        lines.append(f"left {waiting}, of expired snapshots, for the grace time")
    if report.num_damaged:
        damaged = count_text(report.num_damaged, "manifest")
        lines.append(
            f"left all data, as it is not known what {damaged} named that a repair put aside, for the grace time"
        )
    lines += [f"  {path}" for path in report.paths] if dry_run else []
    return "".join(f"{line}\n" for line in lines)


@app.command(
    epilog="Examples:\n\n"
    "- `crossmedia store channel data/features`\n\n"
    "- `crossmedia store channel data/features stable 19`\n\n"
    "- `crossmedia store channel data/features stable`\n\n"
    "- `crossmedia store channel data/features candidate --remove`"
)
def channel(
    url: Url,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Channel, e.g. stable.")] = None,
    version: Annotated[
        Any,
        typer.Argument(metavar=f"[{WHICH}]", parser=read_version_name, help="Snapshot that it points to from now on."),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the channel; its history stays.")] = False,
) -> None:
    """Set a channel: a name that points to a snapshot. With NAME alone list its moves, with neither all channels.

    Options that take a snapshot's number take a channel too: data.store_version=stable of a training, --version stable
    here. The snapshot of a channel is kept by `expire`.
    """
    from featurestore.published.versions import find_channel, read_channels, read_moves

    store = open_store(url)
    if remove:
        if name is None or version is not None:
            raise typer.BadParameter(Problem.REMOVAL_WITH_SNAPSHOT.of(), param_hint="--remove")
        removed = upkeep.history.remove_channel(store, name)
        output.print_summary(f"{removed.channel} is not a channel any more")
    elif name is None:
        moves = read_channels(store.storage)
        if moves:
            _print_moves(store, moves, ("channel", "snapshot", "moved", "commit", "rows in files", "why", "writer"))
        else:
            output.print_summary("no channel yet: set one with crossmedia store channel URL NAME N")
    elif version is None:
        find_channel(store.storage, name)
        moves = read_moves(store.storage, name)[::-1]
        _print_moves(store, moves, ("move", "snapshot", "moved", "commit", "rows in files", "why", "writer"))
    else:
        made = upkeep.history.move_channel(store, name, version)
        output.print_summary(f"{made.channel} points to snapshot {made.version}")


def _print_moves(store: "FeatureStore", moves: "list[ChannelMove]", names: tuple[str, ...]) -> None:
    from featurestore import log

    def row(move: "ChannelMove") -> list[str]:
        manifest = None if move.version is None else log.find(store.storage, move.version, (log.LOG,))
        is_there = manifest is not None and manifest.commit_id == move.commit_id
        return [
            move.channel if names[0] == "channel" else f"{move.number}",
            "removed" if move.version is None else f"{move.version}",
            log.utc_text(move.time_s),
            move.commit_id[:8],
            f"{manifest.file_rows:,}" if manifest is not None and is_there else "",
            move.reason,
            move.writer,
        ]

    output.print_rows(names, map(row, moves), numbers=("move", "snapshot", "rows in files"))
