"""Collectives over Horovod, and its rendezvous store.

Horovod connects its ranks by Gloo, which ends the process (SIGABRT) if one does not arrive within 30 s. So here they
first wait for each other, with their own deadline.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from typing import Any, cast

import torch
from torch import Tensor

from trainer.comm.comm import (
    DEADLINE_S,
    Answer,
    Bulletin,
    Comm,
    Object,
    check_splits,
    in_time,
    loss,
    pickled,
    unpickled,
)
from trainer.errors import ConfigError, LateRankError, LostRankError

_SETTINGS = {"HOROVOD_CYCLE_TIME": "2"}
"""Milliseconds between two looks at what is to be done; each talks to the other ranks, and takes the processor from the
step: two ranks of one core are a fifth faster with this than with 0.3, a small collective takes one or two ms more. The
environment's own value wins."""
WITHOUT_NCCL = (
    "this Horovod was built without NCCL; start the ranks by torchrun, whose NCCL needs no build, "
    "or build Horovod with it: HOROVOD_GPU_OPERATIONS=NCCL make install"
)


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
        meet(int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"]), deadline_s)
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
                    bulletin = Bulletin(self.rank, put, get)
                    raise LateRankError(bulletin.lateness(name, self.size, self.deadline_s))
            return self._hvd.synchronize(handle)

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Raise LostRankError if Horovod finds that another rank was lost, before or during a collective."""
        try:
            yield
        except self._internal_error as error:
            raise LostRankError(loss(self.rank, name)) from error


_ADDRESS = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
_ANSWER_S = 5.0
"""Timeout of an answer, as the process of the store may be stopped."""
_times = itertools.count()


def put(key: str, value: str, scope: str = "late") -> None:
    """Write a text; do nothing if the store is lost."""
    _ask(lambda: _put(key, value, scope))


def get(key: str, scope: str = "late") -> str | None:
    """Read a text; None if there is none, or the store is lost."""
    answer, _ = _ask(lambda: _get(key, scope))
    return answer


def meet(rank: int, size: int, deadline_s: float) -> None:
    """Wait until all ranks have arrived here. Each reads one key, but rank 0 reads one of each rank.

    Raises LostRankError if the store is out of reach, LateRankError if ranks do not arrive, after `deadline_s`.
    """
    scope = f"meeting.{next(_times)}"  # several Comms of one process come one after the other
    end_s, pause_s, number, is_written = time.monotonic() + deadline_s, 1e-3, 0, False
    awaited = [str(each) for each in range(size)] if rank == 0 else ["all"]
    while number < len(awaited):
        if not is_written:
            _, trouble = _ask(lambda: _put(str(rank), "here", scope))
            is_written = trouble is None
        if is_written and get(awaited[number], scope) is not None:
            number += 1
            continue
        if time.monotonic() > end_s:
            raise _absence(rank, size, deadline_s, scope) if is_written else _no_store(rank, deadline_s, trouble)
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, 0.1)
    if rank == 0:
        put("all", "here", scope)


def _absence(rank: int, size: int, deadline_s: float, scope: str) -> LateRankError:
    late = [each for each in range(size) if get(str(each), scope) is None] or [0]  # which has to say that all are there
    return LateRankError(
        f"rank {rank} has waited more than run.deadline_s={deadline_s:g} for the others to start; not there: "
        f"{', '.join(f'rank {each}' for each in late)}. See what that rank is doing (py-spy dump), or raise "
        "run.deadline_s, and start again"
    )


def _no_store(rank: int, deadline_s: float, trouble: str | None) -> LostRankError:
    return LostRankError(
        f"rank {rank} did not reach the process that started the ranks within run.deadline_s={deadline_s:g}, at "
        f"{':'.join(_ADDRESS)}={':'.join(_place())}: {trouble}"
    )


def _ask(question: Callable[[], Answer]) -> tuple[Answer | None, str | None]:
    """Return the answer, or None and the reason."""
    try:
        return in_time(question, _ANSWER_S), None
    except TimeoutError:
        return None, "no answer"
    except (RuntimeError, OSError, HTTPException) as error:
        return None, str(error.args[-1]) if error.args else type(error).__name__


def _put(key: str, value: str, scope: str) -> None:
    from horovod.runner.http.http_client import put_data_into_kvstore

    put_data_into_kvstore(*_place(), scope, key, value)


def _get(key: str, scope: str) -> str:
    from horovod.runner.http.http_client import read_data_from_kvstore

    return str(read_data_from_kvstore(*_place(), scope, key))


def _place() -> list[str]:
    return [os.environ.get(name, "") for name in _ADDRESS]
