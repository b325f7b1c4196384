"""python -m trainer.compat.promote RUN STORE: move a channel to a new snapshot if gates and a canary run allow it."""

from typing import Annotated

import typer

from featurestore.commands.channels import (
    Force,
    GatesFile,
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
from featurestore.console.files import JsonOption
from featurestore.upkeep import MAX_GAUC_LOSS
from trainer.cli import WhichCheckpoint

EXAMPLES = """
Examples:

    python -m trainer.compat.promote data/runs/both data/features

    python -m trainer.compat.promote s3://shop/runs/day s3://shop/features --samples s3://shop/samples

    python -m trainer.compat.promote data/runs/both data/features --gates gates.yaml --max-gauc-loss 0.002 --dry-run

    python -m trainer.compat.promote data/runs/both data/features --force "new camera, looked at by hand"

Exit codes: 0 the channel points to the new snapshot, 1 it stays, as a gate or something else failed, 2 wrong options.
"""

CanarySamples = Annotated[
    str | None, typer.Option(help="Samples whose test/ is evaluated.", show_default="those of the run")
]
StoreName = Annotated[
    str | None, typer.Option(help="Which store of the run, by its name in the schema.", show_default="the first")
]
MaxGaucLoss = Annotated[
    float | None,
    typer.Option(
        min=0, help="By how much GAUC may fall, at the lower end of its interval.", show_default=f"{MAX_GAUC_LOSS}"
    ),
]

app = CommandApp(report=True, rich_markup_mode="markdown")


@app.command(epilog=EXAMPLES)
def main(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or address, as data/runs/NAME.")],
    store: Annotated[str, typer.Argument(metavar="STORE", help="Folder or address of a feature store.")],
    source: Source = "candidate",
    target: Target = "stable",
    checkpoint: WhichCheckpoint = None,
    samples: CanarySamples = None,
    name: StoreName = None,
    gates_file: GatesFile = None,
    keys: Keys = None,
    min_coverage: MinCoverage = None,
    max_quarantine: MaxQuarantine = None,
    max_drift: MaxDrift = None,
    min_neighbours: MinNeighbours = None,
    max_gauc_loss: MaxGaucLoss = None,
    bootstrap: Annotated[int, typer.Option(min=1, max=1_000_000, help="Resamples of users.")] = 1000,
    dry_run: PromoteDryRun = False,
    force: Force = None,
    json_file: JsonOption = None,
) -> None:
    """Move a channel of a feature store to a new snapshot if its gates hold.

    The gates of python -m featurestore promote, and one more: a trained run scores its test impressions with the
    features of both snapshots, and its GAUC must not fall. The images that have to have a row are those of these
    impressions, unless --keys names others. If a gate fails, the channel stays, and a line says which one and why. Each
    decision is kept with the channel, unless it is a dry run.
    """
    from featurestore.published.paths import run_path
    from featurestore.upkeep.purge import read_names
    from trainer.compat.canary import Canary

    limits = limits_of(
        gates_file,
        min_coverage=min_coverage,
        max_quarantine=max_quarantine,
        max_drift=max_drift,
        min_neighbours=min_neighbours,
        max_gauc_loss=max_gauc_loss,
    )
    canary = Canary(
        run_path(run),
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
