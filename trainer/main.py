"""The trainer's command line: parse, connect, open, train, report, always close.

`python -m trainer.main` is one rank; `horovodrun -np P python -m trainer.main` is P of them.
"""

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.cli import run_on_ranks
from trainer.config import Config, load_config
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.comm import Comm

EXAMPLES = """
Examples:

    python -m trainer.main

    horovodrun -np 8 python -m trainer.main --set data.global_batch_size=60000

    horovodrun -np 2 python -m trainer.main --set model.images=none --set run.name=ids-only

    horovodrun -np 2 python -m trainer.main --config own.yaml --set run.name=a --set run.resume=latest

Without settings it trains on data/samples and data/features, and writes to data/runs. All settings and their defaults:
trainer/presets/dicm.yaml. Exit codes: 0 done, 1 failed, 2 wrong settings, 130 stopped by a
signal after a checkpoint.
"""

MISSING_KEY_ADVICE = """\
Add the images' features with: python jobs/extract_features.py --store {store}
(images that it could not read are in the store's quarantine, with the reason of each),
or train without them: data.missing=zeros, or data.missing=learned for a trained "no image" vector.\
"""

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(epilog=EXAMPLES)
def main(
    file: Annotated[Path | None, typer.Option("--config", help="YAML file over the default preset.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="One setting; may be repeated.")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="SECTION.FIELD=VALUE", help="More settings.")] = None,
) -> None:
    """Train DICM on sample groups and stored image features, and evaluate it on the test samples."""
    try:
        loaded: Config | ConfigError = load_config(file, [*(settings or []), *(more or [])])
    except ConfigError as failure:
        loaded = failure

    def work(comm: "Comm") -> None:
        if isinstance(loaded, ConfigError):
            raise loaded
        train(loaded, comm)

    advice = "" if isinstance(loaded, ConfigError) else MISSING_KEY_ADVICE.format(store=loaded.data.store)
    raise typer.Exit(run_on_ranks(work, advice))


def train(config: Config, comm: "Comm") -> None:
    """One run from opening to report; every rank calls it. Raises TrainerError, FeatureStoreError."""
    from trainer import summary
    from trainer.config import config_digest
    from trainer.progress import Progression
    from trainer.run import claim_folder, open_run
    from trainer.signals import StopSignals
    from trainer.train import Training, total_steps

    started = time.time()
    with contextlib.closing(open_run(config, comm)) as run, StopSignals() as signals:
        claim_folder(run)
        root = comm.rank == 0
        with Progression(run.folder if root else None, run.engine.num_steps, total_steps(run)) as progress:
            readers = f"{run.train_reader.num_samples:,} training and {run.test_reader.num_samples:,} test samples"
            progress.say(
                f"{run.folder}: {readers}, {comm.size} ranks, step {run.engine.num_steps} of {total_steps(run)}"
            )
            training = Training(run, progress, signals)
            training.fit()
            training.totals.missing_lookups = run.partition.missing_count if run.partition else 0
            figures = summary.gather(comm, training.totals)
            report = {
                "name": run.folder.name,
                "folder": str(run.folder),
                "metrics": training.metrics,
                **figures,
                "global_step": run.engine.num_steps,
                "history": run.history,
                "store_version": run.partition.snapshot_version if run.partition else None,
                "config_digest": config_digest(config.model_dump(mode="json")),
                "wall_s": time.time() - started,
            }
            if root:
                summary.write_report(run.folder / "report.json", report)
                summary.show(progress.console, report)


if __name__ == "__main__":
    app()
