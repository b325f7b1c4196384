"""Collectives between ranks: the one door to Horovod, and a stand-in for a run of one rank.

A collective has a fixed name per kind, so that collectives of several kinds may be under way at once, from several
threads; every rank calls those of one kind in the same order, from one thread at a time, also with zero rows.
"""

import contextlib
import math
import os
import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from trainer.errors import LateRankError, LostRankError, RemoteRankError

Object = TypeVar("Object")

DEADLINE_S = 600.0
_GRACE_S = 2.0
"""Between the ends of two ranks' patience: how long a rank waits for the others to say that they wait too."""
_SETTINGS = {"HOROVOD_CYCLE_TIME": "2"}
"""Milliseconds between two looks at what is to be done; each talks to the other ranks, and takes the processor from the
step: two ranks of one core are a fifth faster with this than with 0.3, a small collective takes one or two ms more. The
environment's own value wins."""


@dataclass
class Traffic:
    """Bytes that went to, and came from, other ranks."""

    sent: int = 0
    received: int = 0


class Comm(ABC):
    """What the trainer asks of its ranks. `traffic` counts the bytes of each collective by its name."""

    rank: int
    size: int
    moves_cuda_tensors: bool
    """Whether the collectives take tensors of a GPU."""

    def __init__(self) -> None:
        self.traffic: dict[str, Traffic] = {}
        self.deadline_s = DEADLINE_S
        """A collective that takes longer raises LateRankError."""
        self.is_stuck = False
        """Whether a collective was given up: the ranks cannot be left in order any more, only by the process's end."""

    @abstractmethod
    def alltoall(self, rows_N: Tensor, splits_P: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Send the first `splits_P[0]` rows to rank 0, and so on.

        Returns the rows received, in the order of the ranks that sent them, and their counts (P,) int32.
        """

    @abstractmethod
    def start_allreduce_sum_(self, values: Tensor, name: str) -> Callable[[], None]:
        """Begin to sum `values` over all ranks, in place; the result has the same bits on every rank.

        They must be left alone until the returned function has been called: it waits for the end.
        """

    def allreduce_sum_(self, values: Tensor, name: str) -> Tensor:
        """Sum `values` over all ranks, in place; return them."""
        self.start_allreduce_sum_(values, name=name)()
        return values

    @abstractmethod
    def allgather(self, rows_N: Tensor, name: str) -> Tensor:
        """Return the rows of all ranks, in the order of ranks; their numbers may differ."""

    @abstractmethod
    def allgather_object(self, value: Object, name: str = "objects") -> list[Object]:
        """Return one value from each rank, in the order of ranks."""

    @abstractmethod
    def broadcast_object(self, value: Object, root: int = 0) -> Object:
        """Return the value of rank `root`."""

    @abstractmethod
    def carrier(self, device: torch.device) -> str | None:
        """Name what carries the tensors of `device` between ranks, e.g. "Gloo" or "NCCL"; None for a rank alone."""

    @abstractmethod
    def close(self) -> None:
        """Leave the ranks. Safe to call twice."""

    def agree(self, error: Exception | None, name: str = "agree") -> None:
        """Raise on all ranks where one has an error; every rank calls it with its error or None.

        A rank with an error raises it, the others RemoteRankError with the first failed rank and its error.
        """
        errors = self.allgather_object(None if error is None else (type(error).__name__, str(error)), name=name)
        if error is not None:
            raise error
        for rank, found in enumerate(errors):
            if found is not None:
                raise RemoteRankError(rank, *found)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Let every rank come to the end of the block, then raise on all of them where one failed."""
        error: Exception | None = None
        try:
            yield
        except Exception as failure:  # whatever it is, the other ranks wait for this one's answer
            error = failure
        self.agree(error)

    def on_all(self, work: Callable[[], Object]) -> Object:
        """Return the result of `work` on this rank, once it is known that no rank failed."""
        with self.agreed():
            return work()

    def on_rank_0(self, work: Callable[[], Object]) -> Object:
        """Return the result of `work` on rank 0, on every rank; the others do nothing."""
        result: Object | None = self.on_all(work if self.rank == 0 else lambda: None)
        return cast("Object", self.broadcast_object(result))


class SoloComm(Comm):
    """One rank alone: every collective returns what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size, self.moves_cuda_tensors = 0, 1, True

    def alltoall(self, rows_N: Tensor, splits_P: Tensor, name: str) -> tuple[Tensor, Tensor]:
        return rows_N, splits_P

    def start_allreduce_sum_(self, values: Tensor, name: str) -> Callable[[], None]:
        return _nothing

    def allgather(self, rows_N: Tensor, name: str) -> Tensor:
        return rows_N

    def allgather_object(self, value: Object, name: str = "objects") -> list[Object]:
        return [value]

    def broadcast_object(self, value: Object, root: int = 0) -> Object:
        return value

    def carrier(self, device: torch.device) -> str | None:
        return None

    def close(self) -> None:
        pass


class HorovodComm(Comm):
    """The ranks that `horovodrun` started."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        import horovod.torch as hvd
        from horovod.common.exceptions import HorovodInternalError

        self._hvd: Any = hvd
        self._internal_error: type[Exception] = HorovodInternalError
        hvd.init()
        self.rank, self.size = hvd.rank(), hvd.size()
        self.moves_cuda_tensors = bool(hvd.nccl_built())

    def alltoall(self, rows_N: Tensor, splits_P: Tensor, name: str) -> tuple[Tensor, Tensor]:
        if splits_P.dtype != torch.int32 or int(splits_P.sum()) != len(rows_N):
            raise ValueError(f"{name}: splits {splits_P.tolist()} ({splits_P.dtype}) do not cut {len(rows_N)} rows")
        received, counts_P = self._wait(
            self._hvd.alltoall_async(rows_N.contiguous(), splits_P, name=f"alltoall.{name}"), name
        )
        row_bytes = rows_N.element_size() * math.prod(rows_N.shape[1:])
        self._count(
            name,
            sent=row_bytes * (len(rows_N) - int(splits_P[self.rank])),
            received=row_bytes * (len(received) - int(counts_P[self.rank])),
        )
        return received, counts_P

    def start_allreduce_sum_(self, values: Tensor, name: str) -> Callable[[], None]:
        handle = self._hvd.allreduce_async_(values, op=self._hvd.Sum, name=f"allreduce.{name}")

        def finish() -> None:
            self._wait(handle, name)
            # A ring sends and receives every element twice, but for the part that a rank reduces itself.
            ring_bytes = 2 * values.nbytes * (self.size - 1) // self.size
            self._count(name, ring_bytes, ring_bytes)

        return finish

    def allgather(self, rows_N: Tensor, name: str) -> Tensor:
        gathered: Tensor = self._wait(self._hvd.allgather_async(rows_N.contiguous(), name=f"allgather.{name}"), name)
        self._count(name, rows_N.nbytes * (self.size - 1), gathered.nbytes - rows_N.nbytes)
        return gathered

    def allgather_object(self, value: Object, name: str = "objects") -> list[Object]:
        data = torch.from_numpy(np.frombuffer(pickle.dumps(value), np.uint8).copy())
        sizes_P = self.allgather(torch.tensor([len(data)]), name=f"{name}.sizes").tolist()
        pieces = torch.split(self.allgather(data, name=name), sizes_P)
        # Written by the same program on the other ranks a moment ago, never read from a file.
        return [cast("Object", pickle.loads(piece.numpy().tobytes())) for piece in pieces]

    def broadcast_object(self, value: Object, root: int = 0) -> Object:
        return cast("Object", self.allgather_object(value if self.rank == root else None, name="broadcast")[root])

    def carrier(self, device: torch.device) -> str | None:
        if device.type == "cuda" and self.moves_cuda_tensors:
            return "NCCL"
        return "Gloo" if self._hvd.gloo_enabled() else "MPI"

    def close(self) -> None:
        # Horovod's end waits for all ranks: for ever, if one is stuck. The process ends without it then.
        if not self.is_stuck:
            self._hvd.shutdown()

    def _count(self, name: str, sent: int, received: int) -> None:
        traffic = self.traffic.setdefault(name, Traffic())
        traffic.sent += sent
        traffic.received += received

    def _wait(self, handle: int, name: str) -> Any:
        """Return the result of the collective. Raises LostRankError, LateRankError."""
        start_s, pause_s = time.monotonic(), 1e-4
        try:
            while not self._hvd.poll(handle):
                time.sleep(pause_s)
                pause_s = min(1.2 * pause_s, 1e-3)
                if time.monotonic() - start_s > self.deadline_s:
                    self.is_stuck = True
                    raise LateRankError(self._lateness(name))
            return self._hvd.synchronize(handle)
        except self._internal_error as error:
            raise LostRankError(
                f"rank {self.rank} lost another rank in the middle of collective {name}; "
                "start again, with run.resume=latest and the run's name where it has a checkpoint"
            ) from error

    def _lateness(self, name: str) -> str:
        """Say which ranks have not come to collective `name` before its deadline."""
        bulletin = _Bulletin(self.rank)
        bulletin.post(name)
        time.sleep(_GRACE_S)
        late = [rank for rank in range(self.size) if not bulletin.waits(rank, name)]
        where = {rank: bulletin.last(rank) for rank in late}
        ranks = ", ".join(f"rank {rank}" + (f" (in {at})" if at else "") for rank, at in where.items())
        return (
            f"collective {name} has taken more than run.deadline_s={self.deadline_s:g} on rank {self.rank}; "
            f"not there: {ranks or 'nobody is missing, so look at the network'}. See what that rank is doing "
            "(py-spy dump), or raise run.deadline_s; start again with run.resume=latest"
        )


class _Bulletin:
    """A board where ranks past their deadline say in which collectives they are: horovodrun's own key-value store.

    A rank may wait in two at once: that of its step, and that of the thread ahead.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._place = (os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR"), os.environ.get("HOROVOD_GLOO_RENDEZVOUS_PORT"))

    def post(self, name: str) -> None:
        """Note that this rank has waited for `name` in vain."""
        from horovod.runner.http.http_client import put_data_into_kvstore

        with contextlib.suppress(RuntimeError, OSError):
            put_data_into_kvstore(*self._place, "late", f"{self._rank}.{name}", name)
            put_data_into_kvstore(*self._place, "late", str(self._rank), name)

    def waits(self, rank: int, name: str) -> bool:
        """Return whether `rank` has waited for `name` in vain."""
        return self._read(f"{rank}.{name}") is not None

    def last(self, rank: int) -> str | None:
        """Return what `rank` posted last; None where it posted nothing."""
        return self._read(str(rank))

    def _read(self, key: str) -> str | None:
        from horovod.runner.http.http_client import read_data_from_kvstore

        with contextlib.suppress(RuntimeError, OSError):
            return str(read_data_from_kvstore(*self._place, "late", key))
        return None


def _nothing() -> None:
    """End a collective of one rank."""


def connect() -> Comm:
    """Return Horovod's ranks where `horovodrun` started this process, else one rank alone."""
    if "HOROVOD_RANK" in os.environ or "HOROVOD_SIZE" in os.environ:
        return HorovodComm()
    return SoloComm()
