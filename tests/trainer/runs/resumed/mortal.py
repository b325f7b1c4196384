"""`trainer.main` on ranks that note what they do in each step, before and after it, and of which the last one may die.

Arguments: the folder of the notes, the step in which the last rank gets SIGKILL (0: none), then settings.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

from trainer.engine.engine import Engine, PreparedBatch, StepResult


def note_steps(folder: Path, die_at: int = 0, pause_s: float = 0) -> None:
    """Let every step of this process write its number, its samples and, where it came to its end, the loss.

    They go to FOLDER/<rank>-of-<size>.jsonl. In step `die_at` the last rank gets SIGKILL. `pause_s`: before each step.
    """
    launcher = ("HOROVOD_RANK", "HOROVOD_SIZE") if "HOROVOD_RANK" in os.environ else ("RANK", "WORLD_SIZE")
    rank, size = (int(os.environ.get(name, alone)) for name, alone in zip(launcher, "01", strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / f"{rank}-of-{size}.jsonl").open("a", buffering=1)  # a line is with the system before the next step
    train_step = Engine.train_step

    def noted(engine: Engine, prepared: PreparedBatch) -> StepResult:
        step, serials = engine.num_steps + 1, prepared.batch.fields["ad_serial"].values_N.tolist()
        log.write(json.dumps({"step": step, "samples": serials, "labels": prepared.batch.label_B.tolist()}) + "\n")
        if step == die_at and rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause_s)
        result = train_step(engine, prepared)
        log.write(json.dumps({"step": step, "loss": result.loss}) + "\n")
        return result

    Engine.train_step = noted  # type: ignore[method-assign]


def main() -> None:
    from trainer.config import load_config  # here, as others take notes of `python -m trainer.main`
    from trainer.main import on_ranks, train

    notes, die_at, *settings = sys.argv[1:]
    with mock.patch.object(Engine, "train_step", Engine.train_step):  # the process may outlive the run
        note_steps(Path(notes), int(die_at))
        code = on_ranks(lambda: load_config(settings=settings), train)
    sys.exit(code)


if __name__ == "__main__":
    main()
