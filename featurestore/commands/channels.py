"""Commands channel and promote: names of snapshots that trainings and servers follow, set by hand or by gates."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurestore.commands.common import WHICH, Url, read_version_name
from featurestore.console.commandline import CommandApp
from featurestore.console.files import JsonOption, write_json_option
from featurestore.console.output import print_problem, print_rows, print_summary
from featurestore.errors import FAILED
from featurestore.upkeep import MAX_DRIFT, MAX_QUARANTINE, MIN_COVERAGE, MIN_NEIGHBOURS

if TYPE_CHECKING:
    from featurestore.keys import Int64Array
    from featurestore.published.channels import ChannelMove
    from featurestore.store import FeatureStore
    from featurestore.upkeep.promotion import Decision, Gate, GateLimits

app = CommandApp()

Source = Annotated[str, typer.Option("--from", metavar="CHANNEL", help="The channel with the new snapshot.")]
Target = Annotated[str, typer.Option("--to", metavar="CHANNEL", help="The channel that moves there.")]
GatesFile = Annotated[
    Path | None, typer.Option("--gates", metavar="FILE", help="YAML file of limits, see docs/OPERATE.md.")
]
Keys = Annotated[
    Path | None,
    typer.Option(
        "--keys", help="File of keys or uris that have to have a row; by default those of the snapshot of --to."
    ),
]
MinCoverage = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of keys with a row.", show_default=f"{MIN_COVERAGE}")
]
MaxQuarantine = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of images in quarantine.", show_default=f"{MAX_QUARANTINE}")
]
MaxDrift = Annotated[
    float | None,
    typer.Option(
        min=0, help="Move of a dimension's mean or deviation, in standard deviations.", show_default=f"{MAX_DRIFT}"
    ),
]
MinNeighbours = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Share of an image's ten nearest that stay.", show_default=f"{MIN_NEIGHBOURS}"),
]
Force = Annotated[
    str | None, typer.Option("--force", metavar="REASON", help="Move the channel though gates fail; kept with it.")
]
PromoteDryRun = Annotated[bool, typer.Option("--dry-run", help="Measure and print, and move and keep nothing.")]


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


@app.command(
    epilog="Examples:\n\n"
    "- `python -m featurestore promote data/features`\n\n"
    "- `python -m featurestore promote data/features --from tested --to stable --gates gates.yaml --keys ads.txt`\n\n"
    "- `python -m featurestore promote data/features --dry-run --max-drift 0.1`"
)
def promote(
    url: Url,
    source: Source = "candidate",
    target: Target = "stable",
    gates_file: GatesFile = None,
    keys: Keys = None,
    min_coverage: MinCoverage = None,
    max_quarantine: MaxQuarantine = None,
    max_drift: MaxDrift = None,
    min_neighbours: MinNeighbours = None,
    dry_run: PromoteDryRun = False,
    force: Force = None,
    json_file: JsonOption = None,
) -> None:
    """Move a channel to the snapshot of another one, if the gates hold: coverage, quarantine, drift, neighbours.

    Else it stays, exit code 1, and a line for each gate that fails. `python -m trainer.compat.promote` evaluates a run
    as well. Each decision is kept with the channel, unless it is a dry run.
    """
    limits = limits_of(
        gates_file,
        min_coverage=min_coverage,
        max_quarantine=max_quarantine,
        max_drift=max_drift,
        min_neighbours=min_neighbours,
    )
    if keys is None:
        wanted = None
    else:
        from featurestore.upkeep.purge import read_names

        wanted = read_names(keys)[0]
    decide(url, source, target, limits, keys=wanted, more=(), dry_run=dry_run, force=force, json_file=json_file)


def limits_of(file: Path | None, **given: float | None) -> "GateLimits":
    """Return the limits of a file, or the default ones, with those options over them that were given."""
    from featurestore.upkeep.promotion import GateLimits, read_limits

    limits = GateLimits() if file is None else read_limits(file)
    return limits.model_copy(update={name: value for name, value in given.items() if value is not None})


def decide(
    url: str,
    source: str,
    target: str,
    limits: "GateLimits",
    *,
    keys: "Int64Array | None",
    more: "Sequence[Gate]",
    dry_run: bool,
    force: str | None,
    json_file: Path | None,
) -> None:
    """Promote, and print what the gates found. Raises typer.Exit with 1 where the channel stays because one fails."""
    from featurestore.store import FeatureStore
    from featurestore.upkeep.promotion import failures, lines
    from featurestore.upkeep.promotion import promote as promote_channel

    store = FeatureStore.open(url)
    decision = promote_channel(store, source, target, limits, keys=keys, more=more, dry_run=dry_run, force=force)
    print_decision(decision)
    for line in failures(decision):
        print_problem(f"error: {line}")
    print_summary("\n".join(lines(decision, dry_run)))
    write_json_option(json_file, {**decision.model_dump(mode="json"), "holds": decision.holds, "dry_run": dry_run})
    if not decision.moves:
        raise typer.Exit(FAILED)


def print_decision(decision: "Decision") -> None:
    """Print the table of gates."""
    was = "not there yet" if decision.before is None else f"snapshot {decision.before}"
    print_summary(f"{decision.source} is snapshot {decision.version}, {decision.target} is {was}")
    rows = [
        [
            each.gate,
            "" if each.value is None else f"{each.value:.4g}",
            f"{each.limit:g}",
            "holds" if each.holds else "FAILS",
            each.text,
        ]
        for each in decision.results
    ]
    if rows:
        print_rows(("gate", "value", "limit", "", "of"), rows, numbers=("value", "limit"))


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
