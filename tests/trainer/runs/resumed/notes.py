"""Notes of what a rank does in each step, written before and after it; and a death in the midst of one."""

import json
import os
import signal
import time
from pathlib import Path

from trainer.engine.engine import Engine, PreparedBatch, StepResult


def note_steps(folder: Path, rank: int, size: int, die_at: int = 0, pause_s: float = 0) -> None:
    """Let every step of this process write its number, its samples and, where it came to its end, the loss.

    They go to FOLDER/<rank>-of-<size>.jsonl. In step `die_at` the last rank gets SIGKILL. `pause_s`: before each step.
    """
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
