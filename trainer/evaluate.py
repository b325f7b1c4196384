"""python -m trainer.evaluate RUN: what a trained run is worth, on what, and how sure that is.

`horovodrun -np P python -m trainer.evaluate RUN` does it on P ranks, whatever number the run was trained on.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.cli import run_on_ranks
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.comm import Comm
    from trainer.evaluation.opening import Source

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
EXAMPLES = """
Examples:

    python -m trainer.evaluate data/runs/both

    horovodrun -np 4 python -m trainer.evaluate data/runs/both --missing-curve

    python -m trainer.evaluate data/runs/both --samples data/tomorrow --store data/features --out /tmp/tomorrow

    python -m trainer.evaluate data/runs/both --checkpoint 1000 --bootstrap 0 --json figures.json

Relative places in the run's config.yaml are looked for where this is started. Exit codes: 0 done, 1 failed, 2 wrong
settings.
"""

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@dataclass(frozen=True)
class Options:
    """How to measure, and where the report goes."""

    resamples: int = 1000
    seed: int = 0
    missing_curve: bool = False
    out: Path | None = None
    json_file: Path | None = None


@app.command(epilog=EXAMPLES)
def main(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, as data/runs/NAME.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="A step, or the path of a checkpoint; by default the newest.")
    ] = None,
    samples: Annotated[
        str | None, typer.Option(help="Other samples: their test/ is evaluated. By default those of the run.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="A feature store, at its newest snapshot. By default the run's, at the snapshot trained on."),
    ] = None,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples of users for the intervals; 0: none.")] = 1000,
    missing_curve: Annotated[
        bool, typer.Option("--missing-curve", help="Also hide 10 to 50 % of the images at random.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples, and of the images that are hidden.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; by default RUN/evaluation.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as well.")] = None,
) -> None:
    """Evaluate a run: log loss, AUC, GAUC and calibration with intervals, whole and by slices, plotted."""
    options = Options(bootstrap, seed, missing_curve, out, json_file)

    def work(comm: "Comm") -> None:
        from trainer.evaluation.opening import Source

        evaluate_run(Source(folder, checkpoint, samples, store), options, comm)

    raise typer.Exit(run_on_ranks(work))


def evaluate_run(source: "Source", options: Options, comm: "Comm") -> None:
    """From opening to report; every rank calls it, rank 0 measures and writes.

    Raises TrainerError or FeatureStoreError.
    """
    from rich.console import Console

    from trainer.evaluation import report
    from trainer.evaluation.impressions import ad_image_field, read_impressions, seen_in_training
    from trainer.evaluation.measure import measure_all
    from trainer.evaluation.opening import open_source
    from trainer.evaluation.predict import has_feature, predict, predict_without
    from trainer.evaluation.slices import slicings

    console = Console(quiet=comm.rank != 0, highlight=False)
    with contextlib.closing(open_source(source, comm)) as opened:
        schema = opened.run.schema
        if options.missing_curve and not opened.run.engine.services:
            raise ConfigError("--missing-curve: the run's model.images=none reads no image, so none can be hidden")
        console.print(
            f"{opened.checkpoint}: {opened.test.num_samples:,} impressions, {comm.size} ranks", soft_wrap=True
        )
        impressions = read_impressions(comm, opened.test, schema)
        seen = seen_in_training(comm, opened.train, schema, impressions)
        image = ad_image_field(schema)
        cuts = slicings(impressions, seen, has_feature(opened, image.store_name, seen.image_I) if image else None)
        logit_N = predict(opened)
        hidden = {share: predict_without(opened, share, options.seed) for share in SHARES if options.missing_curve}
        about = report.about(opened, options.resamples, options.seed)
    if comm.rank == 0:
        curve = {0.0: logit_N, **hidden} if hidden else {}
        figures = measure_all(logit_N, impressions, cuts, curve, resamples=options.resamples, seed=options.seed)
        out = options.out or source.folder / "evaluation"
        report.write_report(out, about, figures, options.json_file)
        report.show(console, about, figures, out)


if __name__ == "__main__":
    app()
