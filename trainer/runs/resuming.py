"""Which checkpoint a run continues from: the one that is named, or the newest one that is whole, the same on all ranks.

That a checkpoint is damaged shows when it is loaded, as each of its files is read then and compared with its digest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from featurestore.published.paths import FarPath, RunPath
from trainer.comm import Comm
from trainer.config.config import Config
from trainer.errors import DamagedCheckpointError, RemoteRankError
from trainer.files import checkpoints_of
from trainer.runs import checkpoint
from trainer.runs.checkpoint import CheckpointState
from trainer.runs.folder import find_checkpoint, finished, pinned

Resumed = tuple[RunPath, CheckpointState]
Opened = TypeVar("Opened")


@dataclass(frozen=True)
class PassedOver:
    """A damaged checkpoint that a run does not continue from, and what is wrong with it."""

    path: RunPath
    why: str


def continued(
    comm: Comm,
    config: Config,
    folder: RunPath,
    open_at: Callable[[Resumed | None, list[PassedOver]], Opened],
    *,
    reading: bool = False,
) -> Opened:
    """Return what `open_at` opens at the checkpoint that `run.resume` says, or at None for a run that begins.

    Where that is the newest one, and it is damaged, `open_at` gets the one before it and what was passed over, newest
    first; unless `run.skip_damaged` is off or the run is just read (`reading`). Raises what `open_at` does, and of
    checkpoints that are all damaged the error of the newest. Every rank calls it.
    """
    may_skip = config.run.skip_damaged and not reading and config.run.resume in ("latest", "auto")
    passed_over: list[PassedOver] = []
    newest: Exception | None = None
    while (path := _chosen(comm, config, folder, passed_over)) is not None:
        try:
            state = comm.on_all(partial(checkpoint.read_state, path))
            return open_at((path, state), passed_over)
        except (DamagedCheckpointError, RemoteRankError) as failure:
            is_other = isinstance(failure, RemoteRankError) and failure.kind != DamagedCheckpointError.__name__
            if is_other or not may_skip:
                raise
            newest = newest or failure
            passed_over = [*passed_over, PassedOver(path, _what(comm, failure))]
        if not comm.on_rank_0(partial(_left, folder, passed_over)):
            raise newest
    return open_at(None, [])


def _chosen(comm: Comm, config: Config, folder: RunPath, passed_over: list[PassedOver]) -> RunPath | None:
    """Return the checkpoint to try, the same on all ranks: while they look, another one may become the newest."""

    def find() -> RunPath | None:
        if passed_over:
            return _left(folder, passed_over)[-1]
        resume = config.run.resume
        if resume == "auto":
            resume = "latest" if finished(checkpoints_of(folder)) else None
        return None if resume is None else find_checkpoint(folder, resume, "run.resume=")

    if config.run.resume is None:
        return None
    if isinstance(folder, FarPath):
        return comm.on_rank_0(find)
    return comm.broadcast_object(comm.on_all(find))  # a host without the disk says so


def _left(folder: RunPath, passed_over: list[PassedOver]) -> list[RunPath]:
    """List the checkpoints, oldest first, without those that were passed over."""
    gone = {each.path.name for each in passed_over}
    return [path for path in finished(pinned(checkpoints_of(folder))) if path.name not in gone]


def _what(comm: Comm, failure: DamagedCheckpointError | RemoteRankError) -> str:
    """Return what is damaged, as the first rank says that found it. Every rank calls it."""
    own = failure.what if isinstance(failure, DamagedCheckpointError) else ""
    return next(filter(None, comm.allgather_object(own, name="damage")))
