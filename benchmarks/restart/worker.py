"""One rank of a supervised run, which writes the time of each step: STEPS_FILE=FILE python worker.py --set ..."""

import os
import time
from pathlib import Path

from featurestore.console.commandline import run_app
from trainer.engine.engine import Engine, PreparedBatch, StepResult
from trainer.main import app

STEPS_FILE = "STEPS_FILE"


def main() -> None:
    """Train; rank 0 adds a line `seconds step` to the file after each step, and one when it begins."""
    if os.environ.get("HOROVOD_RANK", "0") == "0":
        note_steps(Path(os.environ[STEPS_FILE]))
    run_app(app)


def note_steps(path: Path) -> None:
    """Let every step of this process end with a line; the first one says that it begins: `seconds 0`."""
    file, train_step = path.open("a", buffering=1), Engine.train_step

    file.write(f"{time.time()} 0\n")

    def noted(engine: Engine, prepared: PreparedBatch) -> StepResult:
        result = train_step(engine, prepared)
        file.write(f"{time.time()} {engine.num_steps}\n")
        return result

    Engine.train_step = noted  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    main()
