"""The ranks that `horovodrun` started: the one door to Horovod."""

import contextlib
import math
import os
import pickle
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from trainer.comm.comm import Comm, Object, Traffic
from trainer.errors import LateRankError, LostRankError

_GRACE_S = 2.0
"""Between the ends of two ranks' patience: how long a rank waits for the others to say that they wait too."""
_SETTINGS = {"HOROVOD_CYCLE_TIME": "2"}
"""Milliseconds between two looks at what is to be done; each talks to the other ranks, and takes the processor from the
step: two ranks of one core are a fifth faster with this than with 0.3, a small collective takes one or two ms more. The
environment's own value wins."""


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
