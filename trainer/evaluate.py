"""crossmedia evaluate RUN: measure a trained run on test samples, with intervals, or compare it with another.

`horovodrun -np P crossmedia evaluate RUN` does it on P ranks, whatever number the run was trained on.
"""

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.console import commandline
from trainer.cli import StoreVersion, WhichCheckpoint, run_on_ranks
from trainer.problems import Problem

if TYPE_CHECKING:
    from trainer.comm import Comm

EXAMPLES = """Examples:
  crossmedia evaluate data/runs/both
  horovodrun -np 4 crossmedia evaluate data/runs/both --html evaluation.html
  crossmedia evaluate data/runs/both --samples data/tomorrow --store data/features --out /tmp/tomorrow
  crossmedia evaluate data/runs/both --checkpoint 1000 --bootstrap 0
  crossmedia evaluate data/runs/both --by category --by user_city
  crossmedia evaluate data/runs/both --against data/runs/ids-only

Relative places in the run's config.yaml are looked for where this is started. Exit codes: 0 done, 1 failed, 2 wrong
settings.
"""

app = commandline.CommandApp(report=True, on_ranks=True, rich_markup_mode="markdown")


@app.command(epilog=EXAMPLES)
def main(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or address, as data/runs/NAME.")],
    checkpoint: WhichCheckpoint = None,
    samples: Annotated[
        str | None, typer.Option(help="Other samples: their test/ is evaluated. By default those of the run.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="New address of the run's store; its newest snapshot is used. By default the snapshot trained on."
        ),
    ] = None,
    store_version: StoreVersion = None,
    bootstrap: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Resamples of users for the intervals; 0: none.")
    ] = 1000,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="RUN2", help="Only compare with RUN2: difference in AUC and GAUC, with interval and p-value."
        ),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN", help="Slices by a column of one id a row too, as category; may be given several times."
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder or address of the report; by default RUN/evaluation.")] = None,
) -> None:
    """Evaluate a run: log loss, AUC, GAUC and calibration with intervals, whole and by slices, plotted."""

    if store_version is not None and store is None:
        raise typer.BadParameter(Problem.VERSION_WITHOUT_STORE.of(), param_hint="--store-version")
    if by and against is not None:
        raise typer.BadParameter(Problem.SLICES_OF_COMPARISON.of(), param_hint="--by")

    def work(comm: "Comm") -> None:
        # Torch and matplotlib take seconds to load: not for --help.
        from featurestore.published.paths import check_bucket, run_path
        from trainer.evaluation.report import compare_runs, evaluate_run
        from trainer.runs.saved import RunSource

        source = RunSource(run_path(folder), checkpoint, samples, store, store_version)
        to = None if out is None else run_path(out)
        if to is not None:
            comm.on_rank_0(partial(check_bucket, to))
        if against is not None:
            other = run_path(against)
            compare_runs(source, other, comm, resamples=bootstrap, out=to)
            return
        evaluate_run(source, comm, resamples=bootstrap, by=by or (), out=to)

    raise typer.Exit(run_on_ranks(work))


if __name__ == "__main__":
    commandline.run_app(app)
