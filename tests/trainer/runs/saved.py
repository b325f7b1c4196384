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
from trainer.runs.checkpoint import CheckpointState, Origin
from trainer.runs.saving import Checkpointer, CheckpointPlace

SHARDS = 8


class Meeting:
    """Where the ranks of a `ThreadComm` put what they say."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.said: list[Any] = [None] * size


class ThreadComm(SoloComm):
    """Ranks as threads of one process; only what checkpoints ask for."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__()
        self.rank, self.size, self._meeting = rank, len(meeting.said), meeting

    def allgather_object(self, value: Any, name: str = "objects") -> list[Any]:
        self._meeting.said[self.rank] = copy.deepcopy(value)  # as other ranks get it: what becomes of it is not seen
        self._meeting.barrier.wait()
        said = list(self._meeting.said)
        self._meeting.barrier.wait()
        return said

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        return self.allgather_object(value)[root]


def on_ranks(size: int, work: Callable[[Comm], Any]) -> list[Any]:
    """What `work` returns or raises on each of `size` ranks."""

    def caught(comm: Comm) -> Any:
        try:
            return work(comm)
        except Exception as failure:
            return failure

    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(caught, [ThreadComm(rank, meeting) for rank in range(size)]))


class Trained:
    """A dense part and one table with a number in each shard; shard s is on rank s mod P."""

    def __init__(self, rank: int = 0, size: int = 1, value: float = 0.0, fail: bool = False) -> None:
        self.dense = {"layer.weight": torch.full((3, 2), value)}
        self.rows = {f"item/{s:04}/weight": torch.full((2,), value + s) for s in range(rank, SHARDS, size)}
        self._fail = fail

    def dense_state(self) -> dict[str, Tensor]:
        return self.dense

    def load_dense_state(self, state: Mapping[str, Tensor]) -> None:
        self.dense = dict(state)

    def shard_state(self) -> dict[str, Tensor]:
        if self._fail:
            raise OSError(28, "No space left on device")
        return self.rows

    def shard_names(self) -> list[str]:
        return list(self.rows)

    def load_shard_state(self, state: Mapping[str, Tensor]) -> None:
        self.rows = {name: state[name] for name in self.rows}


def save(
    comm: Comm,
    into: CheckpointPlace | RunPath,
    trained: Trained,
    state: CheckpointState,
    keep: int,
    best: int | None = None,
) -> str:
    """Write a checkpoint of a run on all ranks, wait for it, and return its address."""
    place = into if isinstance(into, CheckpointPlace) else CheckpointPlace(into)
    return Checkpointer(comm, place, None, lambda: None).save(trained, state, keep, best)


def origin_of(**changes: Any) -> Origin:
    """The origin of a run, with these values changed."""
    values: dict[str, Any] = {
        "data": {"global_batch_size": 16},
        "train": {"seed": 0},
        "optim": {},
        "model": {"mlp": [200, 80], "fields": {"user": {"kind": "id"}}},
        "stores": {"images": {"dim": 8, "extractor": {"backbone": "vgg16", "weights_digest": "abc"}}},
    }
    return Origin(**{name: {**value, **changes.get(name, {})} for name, value in values.items()})


def state_at(step: int) -> CheckpointState:
    """What a checkpoint of a step says about itself."""
    return CheckpointState(
        step=step,
        epoch=1,
        step_in_epoch=step - 40,
        num_ranks=1,
        origin=origin_of(),
        stores={},
        history=[{"step": 4, "auc": None, "logloss": 0.25}],
        files={},
    )
