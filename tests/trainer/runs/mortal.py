"""`trainer.main` on ranks that write down the samples of every step, and of which the last one dies if it is told to.

Arguments: the folder of the notes, the step in which the last rank gets SIGKILL (0: none), then settings. Each rank
writes NOTES/<rank>-of-<ranks>.jsonl: of each step its number, its samples and, where it came to its end, the loss.
"""

import json
import os
import signal
import sys
from pathlib import Path

from trainer.config.config import load_config
from trainer.engine.engine import Engine, PreparedBatch, StepResult
from trainer.main import on_ranks, train


def main() -> None:
    notes, die_at, settings = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    rank, size = int(os.environ.get("HOROVOD_RANK", "0")), int(os.environ.get("HOROVOD_SIZE", "1"))
    notes.mkdir(parents=True, exist_ok=True)
    log = (notes / f"{rank}-of-{size}.jsonl").open("a", buffering=1)  # a line is with the system before the next step
    train_step = Engine.train_step

    def noted(engine: Engine, prepared: PreparedBatch) -> StepResult:
        step, serials = engine.num_steps + 1, prepared.batch.fields["ad_serial"].values_N.tolist()
        log.write(json.dumps({"step": step, "samples": serials, "labels": prepared.batch.label_B.tolist()}) + "\n")
        if step == die_at and rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        result = train_step(engine, prepared)
        log.write(json.dumps({"step": step, "loss": result.loss}) + "\n")
        return result

    Engine.train_step = noted  # type: ignore[method-assign]
    sys.exit(on_ranks(lambda: load_config(settings=settings), train))


if __name__ == "__main__":
    main()
