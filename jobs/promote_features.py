"""Move a channel of a feature store to a new snapshot if its gates hold, a canary evaluation of a run among them."""

from typing import Annotated

import typer

from featurestore.commands.channels import (
    Force,
    GatesFile,
    JsonFile,
    Keys,
    MaxDrift,
    MaxQuarantine,
    MinCoverage,
    MinNeighbours,
    PromoteDryRun,
    Source,
    Target,
    decide,
    limits_of,
)
from featurestore.console.commandline import CommandApp, run_app
from trainer.cli import WhichCheckpoint

EXAMPLES = """Examples:

\b
python jobs/promote_features.py --store data/features --run data/runs/both
python jobs/promote_features.py --store s3://shop/features --run s3://shop/runs/day --samples s3://shop/samples
python jobs/promote_features.py --gates gates.yaml --max-gauc-loss 0.002 --dry-run
python jobs/promote_features.py --force "new camera, looked at by hand"

Exit codes: 0 the channel points to the new snapshot, 1 it stays, as a gate or something else failed, 2 wrong options.
"""

app = CommandApp(report=True, rich_markup_mode="rich")


@app.command(epilog=EXAMPLES)
def main(
    run: Annotated[
        str | None,
        typer.Option(help="Folder or address of the run to evaluate.", show_default="the newest in data/runs"),
    ] = None,
    store: Annotated[str, typer.Option(help="Folder or address of the feature store.")] = "data/features",
    source: Source = "candidate",
    target: Target = "stable",
    checkpoint: WhichCheckpoint = None,
    samples: Annotated[
        str | None, typer.Option(help="Samples whose test/ is evaluated.", show_default="those of the run")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Which store of the run, by its name in the schema.", show_default="the first")
    ] = None,
    gates_file: GatesFile = None,
    keys: Keys = None,
    min_coverage: MinCoverage = None,
    max_quarantine: MaxQuarantine = None,
    max_drift: MaxDrift = None,
    min_neighbours: MinNeighbours = None,
    max_gauc_loss: Annotated[
        float | None,
        typer.Option(min=0, help="By how much GAUC may fall, at the lower end of its interval.", show_default="0.001"),
    ] = None,
    bootstrap: Annotated[int, typer.Option(min=1, max=1_000_000, help="Resamples of users.")] = 1000,
    dry_run: PromoteDryRun = False,
    force: Force = None,
    json_file: JsonFile = None,
) -> None:
    """Move a channel of a feature store to a new snapshot if its gates hold.

    The gates of python -m featurestore promote, and one more: a trained run scores its test impressions with the
    features of both snapshots, and its GAUC must not fall. The images that have to have a row are those of these
    impressions, unless --keys names others. If a gate fails, the channel stays, and a line says which one and why. Each
    decision is kept beside the channel, unless it is a dry run.
    """
    from featurestore.upkeep.keyfiles import read_names
    from trainer.compat.canary import Canary
    from trainer.runs.folder import run_or_newest

    limits = limits_of(
        gates_file,
        min_coverage=min_coverage,
        max_quarantine=max_quarantine,
        max_drift=max_drift,
        min_neighbours=min_neighbours,
        max_gauc_loss=max_gauc_loss,
    )
    canary = Canary(
        run_or_newest(run),
        store,
        checkpoint=checkpoint,
        samples=samples,
        name=name,
        resamples=bootstrap,
        seed=limits.seed,
    )
    decide(
        store,
        source,
        target,
        limits,
        keys=canary.keys() if keys is None else read_names(keys)[0],
        more=(canary.gate(limits),),
        dry_run=dry_run,
        force=force,
        json_file=json_file,
    )


if __name__ == "__main__":
    run_app(app)
