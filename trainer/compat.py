"""crossmedia compat RUN STORE: check whether a run may use a store that it was not trained on."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.commands import Version
from featurestore.console import commandline, files, output
from featurestore.errors import FAILED
from trainer.cli import GateLimits, WhichCheckpoint

if TYPE_CHECKING:
    from trainer.gates import Check, Comparison

EXAMPLES = """Examples:
  crossmedia compat data/runs/both data/features
  crossmedia compat data/runs/both s3://bucket/features --checkpoint 1000 --version 7 --json compat.json
  crossmedia compat data/runs/both data/features --accept
  crossmedia compat data/runs/both data/features --version candidate

Exit codes: 0 all gates hold, or --force was given; 1 a gate fails; 2 wrong options.
"""


@dataclass(frozen=True, kw_only=True)
class CompatOptions(GateLimits):
    """Options of the check of a snapshot for a run."""

    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or address, as data/runs/NAME.")]
    store: Annotated[str, typer.Argument(metavar="STORE", help="Folder or address of a feature store.")]
    checkpoint: WhichCheckpoint = None
    version: Version = None
    name: Annotated[
        str | None, typer.Option(help="Store of the run, by its name in the schema.", show_default="the first")
    ] = None
    samples: Annotated[
        str | None, typer.Option(help="Samples whose test/ is scored.", show_default="those of the run")
    ] = None
    accept: Annotated[
        bool, typer.Option("--accept", help="Let RUN's commands use STORE instead of the store that it was trained on.")
    ] = False
    force: Annotated[
        str | None, typer.Option(metavar="REASON", help="Reason to ignore failed gates; it is recorded.")
    ] = None
    json_file: files.JsonOption = None


app = commandline.CommandApp(report=True, rich_markup_mode="markdown")


@app.command(epilog=EXAMPLES)
@commandline.takes(CompatOptions)
def main(options: CompatOptions) -> None:
    """Compare a snapshot with that of a run's training: network, coverage, and the run's scores.

    A store that was deleted and computed again may be as good as before, but runs that were trained on the old one
    refuse it: with --accept, RUN may use the new one, if all gates hold.
    """
    from featurestore.published.paths import run_path
    from featurestore.store import FeatureStore
    from trainer.gates import Check
    from trainer.runs.saved import read_run

    saved = read_run(run_path(options.run), options.checkpoint, options.samples)
    candidate = FeatureStore.open(options.store).snapshot(options.version)
    check = Check(saved, candidate, options, options.name, options.samples)
    found = check.compare()
    _print(check, found)
    outcome = "not compatible" if found.failures else "compatible"
    if options.accept:
        outcome = f"accepted: {check.accept(found, options.force)}"
    output.print_summary(outcome)
    files.write_json_option(options.json_file, check.report(found) | {"outcome": outcome})
    if found.failures and options.force is None:
        raise typer.Exit(FAILED)


def _print(check: "Check", found: "Comparison") -> None:
    """Print the compared snapshots, the gates, and a line for each gate that fails."""
    from featurestore.store import SnapshotId

    output.print_summary(
        f"run          {check.saved.folder}, {check.saved.checkpoint.name}\n"
        f"trained on   {check.recorded.described()}\n"
        f"found        {SnapshotId.of(check.candidate).described()}"
    )
    rows = [
        [each.gate, output.figure(each.value), f"{each.limit:g}", "holds" if each.holds else "FAILS", each.text]
        for each in found.gates
    ]
    if rows:
        output.print_rows(("gate", "value", "limit", "", "of"), rows, numbers=("value", "limit"))
    for line in found.failures:
        output.print_problem(f"error: {line}")


if __name__ == "__main__":
    commandline.run_app(app)
