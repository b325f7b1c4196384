"""How ranks talk: the one door to Horovod, and a stand-in for a run of one rank.

A collective has a fixed name per kind, so that exchanges of two kinds may be under way at once; every rank calls the
same collectives in the same order within a kind, also with zero rows.
"""

import contextlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainer.errors import LostRankError, RemoteRankError

Object = TypeVar("Object")


class Comm(ABC):
    """What the trainer asks of its ranks; `bytes_sent` and `bytes_received` count what went to and came from others."""

    rank: int
    size: int
    moves_cuda_tensors: bool
    """Whether the collectives take tensors of a GPU."""

    def __init__(self) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0

    @abstractmethod
    def alltoall(self, rows_N: Tensor, splits_P: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Sends the first `splits_P[0]` rows to rank 0, and so on.

        Returns the rows received, in the order of the ranks that sent them, and their counts (P,) int32.
        """

    @abstractmethod
    def allreduce_sum_(self, values: Tensor, name: str) -> Tensor:
        """Sums `values` over all ranks, in place; the result has the same bits on every rank."""

    @abstractmethod
    def allgather(self, rows_N: Tensor, name: str) -> Tensor:
        """The rows of all ranks, in the order of ranks; their numbers may differ."""

    @abstractmethod
    def allgather_object(self, value: Object, name: str = "objects") -> list[Object]:
        """One value from each rank, in the order of ranks."""

    @abstractmethod
    def broadcast_object(self, value: Object, root: int = 0) -> Object:
        """The value of rank `root`."""

    @abstractmethod
    def close(self) -> None:
        """Leaves the ranks. Safe to call twice."""

    def agree(self, error: Exception | None) -> None:
        """Every rank calls this with its error or None; if any has one, all raise.

        A rank with an error raises it, the others RemoteRankError with the first failed rank and its text.
        """
        texts = self.allgather_object(None if error is None else f"{type(error).__name__}: {error}", name="agree")
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text is not None:
                raise RemoteRankError(rank, text)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Lets every rank come to the end of the block, and then raises on all of them where one failed."""
        error: Exception | None = None
        try:
            yield
        except Exception as failure:  # whatever it is, the other ranks wait for this one's answer
            error = failure
        self.agree(error)


class SoloComm(Comm):
    """One rank alone: every collective returns what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size, self.moves_cuda_tensors = 0, 1, True

    def alltoall(self, rows_N: Tensor, splits_P: Tensor, name: str) -> tuple[Tensor, Tensor]:
        return rows_N, splits_P

    def allreduce_sum_(self, values: Tensor, name: str) -> Tensor:
        return values

    def allgather(self, rows_N: Tensor, name: str) -> Tensor:
        return rows_N

    def allgather_object(self, value: Object, name: str = "objects") -> list[Object]:
        return [value]

    def broadcast_object(self, value: Object, root: int = 0) -> Object:
        return value

    def close(self) -> None:
        pass


class HorovodComm(Comm):
    """The ranks that `horovodrun` started."""

    def __init__(self) -> None:
        super().__init__()
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
        with self._collective(name):
            received, counts_P = self._hvd.alltoall(rows_N.contiguous(), splits_P, name=f"alltoall.{name}")
        row_bytes = rows_N.element_size() * math.prod(rows_N.shape[1:])
        self.bytes_sent += row_bytes * (len(rows_N) - int(splits_P[self.rank]))
        self.bytes_received += row_bytes * (len(received) - int(counts_P[self.rank]))
        return received, counts_P

    def allreduce_sum_(self, values: Tensor, name: str) -> Tensor:
        with self._collective(name):
            self._hvd.allreduce_(values, op=self._hvd.Sum, name=f"allreduce.{name}")
        # A ring sends and receives every element twice, but for the part that a rank reduces itself.
        ring_bytes = 2 * values.nbytes * (self.size - 1) // self.size
        self.bytes_sent += ring_bytes
        self.bytes_received += ring_bytes
        return values

    def allgather(self, rows_N: Tensor, name: str) -> Tensor:
        with self._collective(name):
            gathered: Tensor = self._hvd.allgather(rows_N.contiguous(), name=f"allgather.{name}")
        self.bytes_sent += rows_N.nbytes * (self.size - 1)
        self.bytes_received += gathered.nbytes - rows_N.nbytes
        return gathered

    def allgather_object(self, value: Object, name: str = "objects") -> list[Object]:
        with self._collective(name):
            values: list[Object] = self._hvd.allgather_object(value, name=f"allgather_object.{name}")
        return values

    def broadcast_object(self, value: Object, root: int = 0) -> Object:
        with self._collective("broadcast_object"):
            result: Object = self._hvd.broadcast_object(value, root_rank=root, name="broadcast_object")
        return result

    def close(self) -> None:
        self._hvd.shutdown()

    @contextlib.contextmanager
    def _collective(self, name: str) -> Iterator[None]:
        try:
            yield
        except self._internal_error as error:
            raise LostRankError(
                f"rank {self.rank} lost another rank in the middle of collective {name}; "
                "start again, with run.resume=latest and the run's name where it has a checkpoint"
            ) from error


def connect() -> Comm:
    """Horovod's ranks where `horovodrun` started this process, else one rank alone."""
    if "HOROVOD_RANK" in os.environ or "HOROVOD_SIZE" in os.environ:
        return HorovodComm()
    return SoloComm()
