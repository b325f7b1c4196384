"""One job of ranks that makes several runs, one after the other; rank 0 writes what each rank saw as JSON.

Arguments: the folder of the places, the output file, then settings that all runs share.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest import mock

from trainer.comm import Comm, connect
from trainer.config import load_config
from trainer.engine.engine import Engine, PreparedBatch, StepResult
from trainer.main import train


def main() -> None:
    folder, out, *shared = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    comm = connect()

    def outcome(*settings: str) -> list[str]:
        return ending_of(comm, lambda: train(load_config(settings=[*shared, *settings]), comm))

    seen = {"full": outcome("run.name=full", "train.max_steps=16")}
    stopped = ("run.name=stopped", "train.max_steps=16")
    with signalling(comm, at=13):
        seen["stopped"] = outcome(*stopped)
    seen["after stopped"] = outcome(*stopped, "run.resume=latest")
    branched = ("run.name=branched", "train.max_steps=3", "train.checkpoint_every=2")
    seen["branched"] = outcome(*branched)
    earlier = f"run.resume={folder / 'runs' / 'branched' / 'checkpoints' / 'step-00000002'}"
    seen["branched, refused"] = outcome(*branched, "optim.lr=1e-4", earlier)
    seen["branched, overwritten"] = outcome(*branched, "optim.lr=1e-4", earlier, "run.overwrite=true")
    broken = f"data.samples={folder / 'broken'}"
    seen["broken"] = outcome("run.name=broken", "train.max_steps=2", broken)
    seen["empty"] = outcome("run.name=empty", f"data.samples={folder / 'nothing'}")
    if comm.rank == 0:
        out.write_text(json.dumps(seen))
    comm.close()


def ending_of(comm: Comm, work: Callable[[], object]) -> list[str]:
    """How it ends on every rank: "done", or its error."""
    try:
        work()
    except Exception as failure:
        return comm.allgather_object(f"{type(failure).__name__}: {failure}")
    return comm.allgather_object("done")


def signalling(comm: Comm, at: int) -> AbstractContextManager[None]:
    """In the block rank 1 gets a SIGTERM during step number `at` of a run, whose first one is its own."""

    def act(engine: Engine, _: PreparedBatch) -> None:
        if comm.rank == 1 and engine.num_steps - engine.first_step == at - 1:
            signal.raise_signal(signal.SIGTERM)

    return before_steps(act)


@contextmanager
def before_steps(act: Callable[[Engine, PreparedBatch], object]) -> Iterator[None]:
    """Call `act` before each training step of this process in the block."""
    step = Engine.train_step

    def acted(engine: Engine, prepared: PreparedBatch) -> StepResult:
        act(engine, prepared)
        return step(engine, prepared)

    with mock.patch.object(Engine, "train_step", acted):
        yield


if __name__ == "__main__":
    main()
