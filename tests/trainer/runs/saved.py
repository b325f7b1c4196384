"""Ranks as threads of one process, and something small that they save: a state, its origin."""

import copy
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from featurestore.published.paths import RunPath
from trainer.comm import Comm, SoloComm
from trainer.runs.checkpoint import CheckpointState, RunFingerprint
from trainer.runs.folder import Checkpoint
from trainer.runs.saving import Checkpointer, CheckpointPlace

SHARDS = 8


class ThreadComm(SoloComm):
    """Ranks as threads of one process; only what checkpoints and samples ask for."""

    def __init__(self, rank: int, said: list[Any], barrier: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.size, self._said, self._barrier = rank, len(said), said, barrier

    def allgather_object(self, value: Any, name: str = "objects") -> list[Any]:
        self._said[self.rank] = copy.deepcopy(value)  # as other ranks get it: what becomes of it is not seen
        self._barrier.wait()
        said = list(self._said)
        self._barrier.wait()
        return said

    def allgather(self, rows_N: Tensor, name: str) -> Tensor:
        return torch.cat(self.allgather_object(rows_N))


def on_ranks(size: int, work: Callable[[Comm], Any]) -> list[Any]:
    """What `work` returns or raises on each of `size` ranks."""
    said, barrier = [None] * size, threading.Barrier(size, timeout=60)

    def caught(rank: int) -> Any:
        try:
            return work(ThreadComm(rank, said, barrier))
        except Exception as failure:
            return failure

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(caught, range(size)))


class Trained:
    """A dense part and one table with a number in each shard; shard s is on rank s mod P."""

    def __init__(self, rank: int = 0, size: int = 1, value: float = 0.0) -> None:
        self.dense = {"layer.weight": torch.full((3, 2), value)}
        self.rows = {f"item/{s:04}/weight": torch.full((2,), value + s) for s in range(rank, SHARDS, size)}

    def dense_state(self) -> dict[str, Tensor]:
        return self.dense

    def load_dense_state(self, state: Mapping[str, Tensor]) -> None:
        self.dense = dict(state)

    def shard_state(self) -> dict[str, Tensor]:
        return self.rows

    def shard_names(self) -> list[str]:
        return list(self.rows)

    def load_shard_state(self, state: Mapping[str, Tensor]) -> None:
        self.rows = {name: state[name] for name in self.rows}


def save(
    into: CheckpointPlace | RunPath,
    step: int = 50,
    value: float = 1.0,
    size: int = 1,
    keep: int = 3,
    best: int | None = None,
) -> Checkpoint:
    """Write a checkpoint whose numbers are `value` on so many ranks, and wait for it; raises what a rank raises."""
    run = into.run if isinstance(into, CheckpointPlace) else into

    def work(comm: Comm) -> str:
        place = into if isinstance(into, CheckpointPlace) else CheckpointPlace(into)
        saves = Checkpointer(comm, place, None, lambda: None)
        return saves.save(Trained(comm.rank, size, value), state_at(step), keep, best)

    done = on_ranks(size, work)
    for each in done:
        if isinstance(each, Exception):
            raise each
    assert {*done} == {f"{run}/checkpoints/step-{step:08}"}
    return CheckpointPlace(run).at(step)


def state_at(step: int) -> CheckpointState:
    """What a checkpoint of a step says about itself."""
    place = {"step": step, "epoch": 1, "step_in_epoch": step - 40, "num_ranks": 1}
    history = [{"step": 4, "auc": None, "logloss": 0.25}]
    origin = RunFingerprint(data={}, train={}, optim={}, model={}, stores={})
    return CheckpointState(**place, origin=origin, stores={}, history=history, files={})
