"""The ranks that `horovodrun` started: with horovod_store.py the one door to Horovod."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from trainer.comm import horovod_store
from trainer.comm.comm import DEADLINE_S, Comm, Object, check_splits, pickled, unpickled
from trainer.comm.lateness import Bulletin, loss
from trainer.errors import ConfigError, LateRankError, LostRankError

_SETTINGS = {"HOROVOD_CYCLE_TIME": "2"}
"""Milliseconds between two looks at what is to be done; each talks to the other ranks, and takes the processor from the
step: two ranks of one core are a fifth faster with this than with 0.3, a small collective takes one or two ms more. The
environment's own value wins."""
WITHOUT_NCCL = "this Horovod was built without NCCL; build it with NCCL: HOROVOD_GPU_OPERATIONS=NCCL make install"


class HorovodComm(Comm):
    """The ranks that `horovodrun` started."""

    without_cuda = WITHOUT_NCCL

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        super().__init__(deadline_s)
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            import horovod.torch as hvd
            from horovod.common.exceptions import HorovodInternalError
        except ImportError as error:
            raise ConfigError(
                f"horovodrun started this process, but its Python cannot import Horovod ({error}): make install builds "
                "it; without it, start the ranks by torchrun"
            ) from error

        self._hvd: Any = hvd
        self._internal_error: type[Exception] = HorovodInternalError
        horovod_store.meet(int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"]), deadline_s)
        hvd.init()
        self.rank, self.size = hvd.rank(), hvd.size()
        self.moves_cuda_tensors = bool(hvd.nccl_built())

    def alltoall(self, rows_N: Tensor, splits_P: Tensor, name: str) -> tuple[Tensor, Tensor]:
        check_splits(rows_N, splits_P, name)
        with self._named(name):
            handle = self._hvd.alltoall_async(rows_N.contiguous(), splits_P, name=f"alltoall.{name}")
        received, counts_P = self._wait(handle, name)
        self._count_alltoall(rows_N, splits_P, counts_P, name)
        return received, counts_P

    def start_allreduce_sum_(self, values: Tensor, name: str) -> Callable[[], None]:
        with self._named(name):
            handle = self._hvd.allreduce_async_(values, op=self._hvd.Sum, name=f"allreduce.{name}")

        def finish() -> None:
            self._wait(handle, name)
            self._count_allreduce(values, name)

        return finish

    def allgather(self, rows_N: Tensor, name: str) -> Tensor:
        with self._named(name):
            handle = self._hvd.allgather_async(rows_N.contiguous(), name=f"allgather.{name}")
        gathered: Tensor = self._wait(handle, name)
        self._count(name, rows_N.nbytes * (self.size - 1), gathered.nbytes - rows_N.nbytes)
        return gathered

    def allgather_object(self, value: Object, name: str = "objects") -> list[Object]:
        data = pickled(value)
        sizes_P = self.allgather(torch.tensor([len(data)]), name=f"{name}.sizes").tolist()
        pieces = torch.split(self.allgather(data, name=name), sizes_P)
        return [cast("Object", unpickled(piece)) for piece in pieces]

    def broadcast_object(self, value: Object, root: int = 0) -> Object:
        return cast("Object", self.allgather_object(value if self.rank == root else None, name="broadcast")[root])

    def carrier(self, device: torch.device) -> str | None:
        if device.type == "cuda" and self.moves_cuda_tensors:
            return "NCCL by Horovod"
        return "Gloo by Horovod" if self._hvd.gloo_enabled() else "MPI by Horovod"

    def close(self) -> None:
        # Horovod's end waits for all ranks: for ever, if one is stuck. The process ends without it then.
        if not self.is_stuck:
            self._hvd.shutdown()

    def _wait(self, handle: int, name: str) -> Any:
        """Return the result of the collective. Raises LostRankError, LateRankError."""
        start_s, pause_s = time.monotonic(), 1e-4
        with self._named(name):
            while not self._hvd.poll(handle):
                time.sleep(pause_s)
                pause_s = min(1.2 * pause_s, 1e-3)
                if time.monotonic() - start_s > self.deadline_s:
                    self.is_stuck = True
                    bulletin = Bulletin(self.rank, horovod_store.put, horovod_store.get)
                    raise LateRankError(bulletin.lateness(name, self.size, self.deadline_s))
            return self._hvd.synchronize(handle)

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Raise LostRankError where Horovod finds another rank gone, at the beginning of a collective or in it."""
        try:
            yield
        except self._internal_error as error:
            raise LostRankError(loss(self.rank, name)) from error
