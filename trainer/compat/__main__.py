"""Check whether a run may use a store, and whether it was trained on it: python -m trainer.compat RUN STORE."""

from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.commands.common import Version
from featurestore.console.commandline import OK, CommandApp, run_app
from featurestore.console.files import JsonOption, write_json_option
from featurestore.console.output import print_rows, print_summary, progress_bar
from featurestore.errors import FAILED
from trainer.cli import WhichCheckpoint, run_on_ranks
from trainer.compat import MAX_LOGLOSS_CHANGE, SAMPLE
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.comm import Comm

EXAMPLES = """
Examples:

    python -m trainer.compat data/runs/both data/features

    python -m trainer.compat data/runs/both s3://bucket/features --checkpoint 1000 --version 7 --json compat.json

    python -m trainer.compat data/runs/both data/features --accept

Exit codes: 0 compatible (or accepted), 1 not, or not known; 2 wrong settings.
"""

app = CommandApp(rich_markup_mode="markdown")


@app.command(epilog=EXAMPLES)
def main(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or address, as data/runs/NAME.")],
    store: Annotated[str, typer.Argument(metavar="STORE", help="Folder or address of a feature store.")],
    checkpoint: WhichCheckpoint = None,
    version: Version = None,
    name: Annotated[
        str | None, typer.Option(help="Which store of the run, by its name in the schema; by default the first.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Features to compare, and test impressions to score.")] = SAMPLE,
    max_logloss_change: Annotated[
        float, typer.Option(min=0, help="So much may the log loss change, in parts of itself.")
    ] = MAX_LOGLOSS_CHANGE,
    json_file: JsonOption = None,
    accept: Annotated[
        bool,
        typer.Option("--accept", help="From now on let RUN's commands take STORE for the one that it was trained on."),
    ] = False,
) -> None:
    """Compare a store with the one that a run was trained on: network, identity, rows, features and scores.

    A store that was deleted and computed again may be as good as before, but runs that were trained on the old one
    refuse it. This compares the two. With --accept, RUN may use the new one, if nothing speaks against it. If the old
    snapshot cannot be read any more, all test impressions are scored, and compared with the run's own log loss.
    """
    codes: list[int] = []

    def work(comm: "Comm") -> None:
        # Torch takes seconds to load: not for --help.
        from featurestore.published.paths import run_path
        from trainer.compat import check

        if comm.size > 1:
            raise ConfigError("trainer.compat is for one rank; start it without horovodrun or torchrun")
        options = check.CompatOptions(checkpoint, name, version, sample, max_logloss_change)
        with progress_bar("shards") as progress:
            found = check.examine(run_path(run), store, options, comm, progress)
        print_summary("\n".join(check.lines(found)))
        if table := check.figures(found):
            print_rows(("measure", "value"), table, numbers=("value",))
        print_summary("\n".join(check.ending(found)))
        write_json_option(json_file, found.report())
        codes.append(OK if found.verdict == "compatible" else FAILED)
        if accept:
            print_summary(f"accepted     {check.accept(found)}")
            codes.append(OK)

    failed = run_on_ranks(work)
    raise typer.Exit(failed or codes[-1])


if __name__ == "__main__":
    run_app(app)
