"""The trainer's command line: parse, connect, open, train, report, always close.

`crossmedia train` is one rank; `horovodrun -np P crossmedia train` is P of them, and so is
`torchrun --nproc-per-node P -m trainer.main`.
"""

import contextlib
import functools
import shlex
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from featurestore.console.commandline import CommandApp, run_app
from featurestore.errors import UserError
from trainer.cli import MoreSettings, Settings, SettingsFile, run_on_ranks
from trainer.config import Config, differences, load_config, load_saved

if TYPE_CHECKING:
    from featurestore.published.paths import RunPath
    from trainer.comm import Comm
    from trainer.loop.summary import ProgressLog
    from trainer.loop.training import Training
    from trainer.runs.folder import Checkpoint
    from trainer.runs.open import Run

EXAMPLES = """Examples:
  crossmedia train
  horovodrun -np 8 crossmedia train --set data.global_batch_size=60000
  horovodrun -np 2 crossmedia train --set model.images=none --set run.name=ids-only
  torchrun --standalone --nproc-per-node 2 -m crossmedia train --set run.name=without-horovod
  horovodrun -np 2 crossmedia train --config own.yaml --set run.name=a --set run.resume=latest
  horovodrun -np 2 crossmedia train run.warm_start=data/runs/yesterday

Without settings it trains on data/samples and data/features, and writes to data/runs. All settings:
docs/SETTINGS.md. Exit codes: 0 done, 1 failed, 2 wrong settings, 130 stopped by a
signal, after a checkpoint once training has begun. horovodrun and torchrun exit with 1 where a rank does not exit
with 0.
"""

app = CommandApp(rich_markup_mode="markdown")
_OF_A_START = ("run.dir", "run.name", "run.resume", "run.overwrite")
"""Settings that each start of a run has its own of."""


@app.command(epilog=EXAMPLES)
def main(file: SettingsFile = None, settings: Settings = None, more: MoreSettings = None) -> None:
    """Train DICM on sample groups and stored image features, and evaluate it on the test samples."""
    raise typer.Exit(on_ranks(partial(load_config, file, [*(settings or []), *(more or [])]), train))


def on_ranks(load: Callable[[], Config], work: Callable[[Config, "Comm"], object]) -> int:
    """Do `work` with the loaded settings on every rank, see `run_on_ranks`; return the exit code."""
    load = functools.cache(load)
    deadline_s = None
    with contextlib.suppress(UserError):  # rank 0 says it below
        deadline_s = load().run.deadline_s

    return run_on_ranks(lambda comm: work(load(), comm), deadline_s)


def train(config: Config, comm: "Comm", *, advises: bool = True) -> "RunPath":
    """Train one run from opening to report, and return its folder; every rank calls it.

    Of a run that is continued and finished already, nothing is written again. `advises`: whether a run that holds days
    out prints the command that trains on them too.
    Raises TrainerError, FeatureStoreError.
    """
    from featurestore.console.output import text_console
    from trainer.loop import summary
    from trainer.loop.summary import tracker_of
    from trainer.loop.training import StopSignals, Training, total_steps
    from trainer.runs.folder import TENSORBOARD
    from trainer.runs.open import claim_folder, open_run

    started = time.time()
    comm.deadline_s = config.run.deadline_s
    with contextlib.closing(open_run(config, comm)) as run, StopSignals() as signals:
        root = comm.rank == 0
        if comm.on_rank_0(lambda: _is_finished(run)):
            if root:
                text_console().print(_finished_text(run))
            return run.folder
        removed = claim_folder(run)
        hardware = summary.hardware_of(comm, run.device, run.config.model.compute_dtype)
        tracker = tracker_of(run) if root else None
        place = run.folder / TENSORBOARD if root else None
        with summary.ProgressLog(place, run.engine.num_steps, total_steps(run), tracker) as progress:
            readers = f"{run.train_reader.num_samples:,} training and {run.test_reader.num_samples:,} test samples"
            if run.validation_reader is not None:
                readers = f"{run.validation_reader.num_samples:,} validation, {readers}"
            progress.say(
                f"{run.folder}: {readers}, {summary.hardware_text(hardware, comm.size)}, "
                f"step {run.engine.num_steps} of {total_steps(run)}"
            )
            _say_beginning(run, removed, progress)
            held = run.config.data.validation_days if config.data.validation_days is None else 0
            if isinstance(held, list):
                days = f"{held[0]} to {held[-1]}" if held[1:] else held[0]
                progress.say(
                    f"held out, to choose the best of {config.train.epochs} epochs: {days}; data.validation_days=0 "
                    "trains on all days"
                )
            training = Training(run, progress, signals)
            training.fit()
            figures = summary.gather(comm, training.totals, run.engine.stages)
            report = _report(run, training, {**hardware, **figures, "wall_s": time.time() - started})
            if root:
                progress.flush()
                summary.write_report(run.folder / "report.json", report)
                summary.show(progress.console, report)
                if isinstance(held, list) and advises:
                    progress.say(f"to train on the days held out as well: {_next_command(run, held)}")
        return run.folder


_LAST_RATES = 0.3
"""Times the rates, for days that are trained on after the others: see docs/RESULTS.md, real logs."""


def _next_command(run: "Run", days: list[str]) -> str:
    """Write the command that trains on the days held out, as often as the best epoch says, at lower rates."""
    optim, train = run.config.optim, run.train_reader
    epochs = -(-(run.engine.num_steps - run.engine.first_step) // train.steps_per_epoch)
    given = {
        "run.name": f"{run.folder.name}-all",
        "run.resume": "null",
        "run.overwrite": "false",
        "run.warm_start": run.folder,
        "run.warm_parts": "all",
        "data.train_days": f"[{','.join(days)}]",
        "data.validation_days": 0,
        "train.epochs": epochs,
        "optim.lr": f"{_LAST_RATES * optim.lr:g}",
        "optim.ids_lr": f"{_LAST_RATES * optim.alpha:g}",
    }
    words = [f"{name}={value}" for name, value in given.items()]
    ranks = ["horovodrun", "-np", str(run.comm.size)] if run.comm.size > 1 else []
    return shlex.join([*ranks, "crossmedia", "train", "--config", str(run.folder / "config.yaml"), *words])


def _say_beginning(run: "Run", removed: "list[Checkpoint]", progress: "ProgressLog") -> None:
    """Report unused settings, missing images, checkpoints skipped or removed, and a warm start."""
    from featurestore.published.paths import run_path
    from trainer.runs.folder import checkpoints_of
    from trainer.runs.saving import DAMAGED
    from trainer.schema.fields import SCHEMA_FILE, SETTINGS_FILE

    samples, root = run_path(run.config.data.samples), run.comm.rank == 0
    if root and run.config.data.schema_file is None and (samples / SCHEMA_FILE).is_file():
        progress.say(
            f"warning: the fields are the preset's, not those of {samples / SCHEMA_FILE}: "
            f"crossmedia train --config {samples / SETTINGS_FILE} takes these"
        )
    for line in run.lacked:
        progress.say(line)
    for each in run.skipped:
        progress.say(
            f"warning: {each.checkpoint.name} is skipped, and kept as {DAMAGED}{each.checkpoint.name} in "
            f"{checkpoints_of(run.folder)}: {each.why}; continuing from step {run.engine.num_steps}"
        )
    if removed:
        progress.say(f"removed by run.overwrite=true: {', '.join(each.name for each in removed)}")
    if run.warm_start:
        progress.say(f"warm start from {run.warm_start.checkpoint}: {run.warm_start.parts}")


def _is_finished(run: "Run") -> bool:
    """Return whether an earlier start has finished the run and written its report, which is then kept."""
    from trainer.loop.training import has_finished, total_steps
    from trainer.runs.folder import report_of
    from trainer.runs.open import resumed_folder

    if run.resumed is None or resumed_folder(run) != run.folder:
        return False
    report, patience = report_of(run.folder), run.config.train.early_stopping
    tested = run.test_reader.num_samples > 0
    return report is not None and has_finished(report, run.engine.num_steps, total_steps(run), patience, tested)


def _finished_text(run: "Run") -> str:
    """Say that nothing is left to do, which settings are not used, and how to continue the run."""
    from trainer.loop.training import total_steps

    saved = load_saved(run.folder / "config.yaml")
    changed = differences(run.config.model_dump(mode="json"), saved.model_dump(mode="json"))
    unused = [f"{each.name}={each.here}" for each in changed if each.setting not in _OF_A_START]
    step, total = run.engine.num_steps, total_steps(run)
    text = f"{run.folder} is finished already: step {step} of {total}; nothing to do"
    text += f", not used: {', '.join(unused)}" if unused else ""
    more = "train.max_steps" if run.config.train.max_steps else "train.epochs"
    return text + (f"; a larger {more} continues it" if step == total else "")


def _report(run: "Run", training: "Training", measured: dict[str, Any]) -> dict[str, Any]:
    """Assemble report.json of a run; every rank calls it.

    `missing_lookups`: of images without a feature, those of evaluations included; `new_ad_pictures_count`: None where
    that is not decided (model.image_dropout); `logs`: versions of the tables of Delta, Iceberg or Lance that the
    samples were made of.
    """
    from trainer.schema.lakes import versions_of

    missing, new_ads = run.missing_by_store(), run.engine.model.new_ads
    return {
        "name": run.folder.name,
        "folder": str(run.folder),
        "metrics": training.metrics,
        "new_ad_pictures_count": None if new_ads is None else new_ads.pictures_count,
        **measured,
        "missing_lookups": sum(missing.values()),
        "missing_by_store": missing,
        "tables": training.tables,
        "global_step": run.engine.num_steps,
        "checkpoints": training.checkpoints,
        "history": run.history,
        "warm_start": str(run.warm_start.checkpoint) if run.warm_start else None,
        "logs": run.comm.on_rank_0(lambda: versions_of(run.train_reader.index.storage)),
        "store_version": run.store_version,
        "stores": {name: store.model_dump() for name, store in run.stores.items()},
    }


if __name__ == "__main__":
    run_app(app)
