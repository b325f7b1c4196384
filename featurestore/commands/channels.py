"""Command channel: names of snapshots that trainings and servers follow; trainer.compat moves them by gates."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurestore.commands.common import WHICH, Url, read_version_name
from featurestore.console.commandline import CommandApp
from featurestore.console.output import print_rows, print_summary

if TYPE_CHECKING:
    from featurestore.published.channels import ChannelMove
    from featurestore.store import FeatureStore

app = CommandApp()


@app.command(
    epilog="Examples:\n\n"
    "- `python -m featurestore channel data/features`\n\n"
    "- `python -m featurestore channel data/features stable 19`\n\n"
    "- `python -m featurestore channel data/features stable`\n\n"
    "- `python -m featurestore channel data/features candidate --remove`"
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

    What takes a snapshot's number takes a channel too: data.store_version=stable of a training, --version stable here.
    The snapshot of a channel is kept by `expire`.
    """
    from featurestore.published.channels import find_channel, read_channels, read_moves
    from featurestore.store import FeatureStore
    from featurestore.upkeep.history import move_channel, remove_channel

    store = FeatureStore.open(url)
    if remove:
        if name is None or version is not None:
            raise typer.BadParameter("it takes a NAME and no snapshot", param_hint="--remove")
        removed = remove_channel(store, name)
        print_summary(f"{removed.channel} is no channel any more")
    elif name is None:
        moves = read_channels(store.storage)
        if moves:
            _print_moves(store, moves, ("channel", "snapshot", "moved", "commit", "rows in files", "why", "writer"))
        else:
            print_summary("no channel yet: set one with python -m featurestore channel URL NAME N")
    elif version is None:
        find_channel(store.storage, name)
        moves = read_moves(store.storage, name)[::-1]
        _print_moves(store, moves, ("move", "snapshot", "moved", "commit", "rows in files", "why", "writer"))
    else:
        made = move_channel(store, name, version)
        print_summary(f"{made.channel} points to snapshot {made.version}")


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

    print_rows(names, map(row, moves), numbers=("move", "snapshot", "rows in files"))
