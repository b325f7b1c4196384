"""One rank of a run that is killed on the way, or begins with a tiny difference from the others.

python -m benchmarks.resume.worker --die-at 7 --config WORKLOAD/config.yaml run.name=a
"""

import contextlib
import os
import signal
from pathlib import Path
from typing import Annotated

import torch
import typer

from featurestore.console.commandline import CommandApp, run_app
from trainer.cli import run_on_ranks
from trainer.comm import Comm
from trainer.config.config import Config, load_config
from trainer.engine.engine import Engine, PreparedBatch, StepResult
from trainer.loop.summary import ProgressLog
from trainer.loop.training import StopSignals, Training, total_steps
from trainer.runs.open import claim_folder, open_run

DIES = "this rank dies now"

app = CommandApp()


@app.command()
def main(
    file: Annotated[Path, typer.Option("--config")],
    settings: Annotated[list[str], typer.Argument(metavar="SECTION.FIELD=VALUE")],
    die_at: Annotated[int, typer.Option(help="The step in which the last rank gets SIGKILL.")],
) -> None:
    """Train until the last rank dies."""
    config = load_config(file, settings)
    raise typer.Exit(run_on_ranks(lambda comm: train(config, comm, die_at=die_at)))


def train(config: Config, comm: Comm, *, die_at: int | None = None, nudged: bool = False) -> None:
    """Train one run, without a report. `nudged`: one weight of E has another last bit of the type of E's products."""
    with contextlib.closing(open_run(config, comm)) as run, StopSignals() as signals:
        claim_folder(run)
        if nudged:
            nudge_(run.engine, run.config.model.compute_dtype)
        if die_at is not None and comm.rank == comm.size - 1:
            _kill_at(run.engine, die_at)
        with ProgressLog(None, run.engine.num_steps, total_steps(run)) as progress:
            Training(run, progress, signals).fit()


@torch.no_grad()
def nudge_(engine: Engine, dtype: str) -> None:
    """Multiply the first weight of E that is not zero by 1 + the machine epsilon of `dtype`."""
    weights = next(next(iter(engine.services.values())).parameters())
    weights.view(-1)[0] *= 1 + torch.finfo(getattr(torch, dtype)).eps


def _kill_at(engine: Engine, step: int) -> None:
    """Lets this process die when step number `step` (from 1) has been prepared and is to be taken."""
    train_step = engine.train_step

    def dying(prepared: PreparedBatch) -> StepResult:
        if engine.num_steps == step - 1:
            print(DIES, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(prepared)

    engine.train_step = dying  # type: ignore[method-assign]


if __name__ == "__main__":
    run_app(app)
