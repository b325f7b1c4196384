"""Collectives: their interface, those of a single rank, late or lost ranks, and which ranks this process is one of.

A collective has a fixed name per kind, so that collectives of several kinds may run at the same time, from several
threads; every rank calls those of one kind in the same order, from one thread at a time, also with zero rows.
"""

import contextlib
import importlib.util
import math
import os
import pickle
import shutil
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from trainer.errors import ConfigError, LateRankError, RemoteRankError
from trainer.problems import Problem

Object = TypeVar("Object")

DEADLINE_S = 600.0


@dataclass
class Traffic:
    """Bytes sent to and received from other ranks."""

    sent: int = 0
    received: int = 0


class Comm(ABC):
    """The interface of collectives. `traffic` counts the bytes of each collective by its name."""

    rank: int
    size: int
    moves_cuda_tensors: bool
    """Whether the collectives take tensors of a GPU."""
    without_cuda = ""
    """The reason why not, and the way out."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self.traffic: dict[str, Traffic] = {}
        self.deadline_s = deadline_s
        """A collective that takes longer raises LateRankError."""
        self.is_stuck = False
        """Whether a collective was abandoned: then the ranks can only be left by ending the process."""

    def alltoall(self, rows_N: Tensor, splits_P: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Send the first `splits_P[0]` rows to rank 0, and so on; int32 splits, which cut all rows.

        Returns the rows received, in the order of the ranks that sent them, and their counts (P,) int32.
        """
        if splits_P.dtype != torch.int32 or int(splits_P.sum()) != len(rows_N):
            raise ValueError(f"{name}: splits {splits_P.tolist()} ({splits_P.dtype}) do not cut {len(rows_N)} rows")
        received, counts_P = self._alltoall(rows_N, splits_P, name)
        row_bytes = rows_N.element_size() * math.prod(rows_N.shape[1:])
        sent, got = (int(each_P.sum() - each_P[self.rank]) for each_P in (splits_P, counts_P))
        self._count(name, row_bytes * sent, row_bytes * got)
        return received, counts_P

    @abstractmethod
    def _alltoall(self, rows_N: Tensor, splits_P: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Carry out `alltoall`."""

    def start_allreduce_sum_(self, values: Tensor, name: str) -> Callable[[], object]:
        """Begin to sum `values` over all ranks, in place; the result has the same bits on every rank.

        The values must not be used until the returned function, which waits for the end, has returned.
        """
        # What a ring sends and receives: every element twice, but for the part that a rank reduces itself.
        ring_bytes = 2 * values.nbytes * (self.size - 1) // self.size
        self._count(name, ring_bytes, ring_bytes)
        return self._start_allreduce_sum_(values, name)

    @abstractmethod
    def _start_allreduce_sum_(self, values: Tensor, name: str) -> Callable[[], object]:
        """Carry out `start_allreduce_sum_`."""

    def allreduce_sum_(self, values: Tensor, name: str) -> Tensor:
        """Sum `values` over all ranks, in place; return them."""
        self.start_allreduce_sum_(values, name=name)()
        return values

    def allgather(self, rows_N: Tensor, name: str) -> Tensor:
        """Return the rows of all ranks, in the order of ranks; their numbers may differ."""
        return torch.cat(self._gathered(rows_N, name))

    def allgather_object(self, value: Object, name: str = "objects") -> list[Object]:
        """Return one value from each rank, in the order of ranks: of the same program, so it may be unpickled."""
        data_N = torch.from_numpy(np.frombuffer(pickle.dumps(value), np.uint8).copy())
        return [pickle.loads(each_N.numpy().tobytes()) for each_N in self._gathered(data_N, name)]

    def broadcast_object(self, value: Object, root: int = 0) -> Object:
        """Return the value of rank `root`."""
        return cast("Object", self.allgather_object(value if self.rank == root else None, "broadcast")[root])

    @abstractmethod
    def carrier(self, device: torch.device) -> str | None:
        """Return the transport of tensors on `device`, e.g. "Gloo by Horovod"; None for a single rank."""

    @abstractmethod
    def close(self) -> None:
        """Leave the ranks. Safe to call twice."""

    def agree(self, error: Exception | None, name: str = "agree") -> None:
        """Raise on all ranks if one has an error; every rank calls it with its error or None.

        A rank with an error raises it, the others RemoteRankError with the first failed rank and its error.
        """
        errors = self.allgather_object(None if error is None else (type(error).__name__, str(error)), name=name)
        if error is not None:
            raise error
        for rank, found in enumerate(errors):
            if found is not None:
                raise RemoteRankError(Problem.RANK_FAILED, rank, *found)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Wait until every rank has reached the end of the block, then raise on all if one failed."""
        error: Exception | None = None
        try:
            yield
        except Exception as failure:  # any failure: the other ranks wait for this rank's answer
            error = failure
        self.agree(error)

    def on_all(self, work: Callable[[], Object]) -> Object:
        """Return the result of `work` on this rank after all ranks have succeeded."""
        with self.agreed():
            return work()

    def on_rank_0(self, work: Callable[[], Object]) -> Object:
        """Return the result of `work` on rank 0, on every rank; the others do nothing."""
        result: Object | None = self.on_all(work if self.rank == 0 else lambda: None)
        return cast("Object", self.broadcast_object(result))

    def _gathered(self, rows_N: Tensor, name: str) -> list[Tensor]:
        """Return the rows of each rank, which sends them to all, by way of the CPU."""
        copies = rows_N.cpu().repeat(self.size, *[1] * (rows_N.ndim - 1))
        rows, counts_P = self.alltoall(copies, torch.full((self.size,), len(rows_N), dtype=torch.int32), name=name)
        return list(torch.split(rows.to(rows_N.device), counts_P.tolist()))

    def _count(self, name: str, sent: int, received: int) -> None:
        if self.size > 1:
            traffic = self.traffic.setdefault(name, Traffic())
            traffic.sent += sent
            traffic.received += received


class SoloComm(Comm):
    """One rank alone: every collective returns its input."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        super().__init__(deadline_s)
        self.rank, self.size, self.moves_cuda_tensors = 0, 1, True

    def alltoall(self, rows_N: Tensor, splits_P: Tensor, name: str) -> tuple[Tensor, Tensor]:
        return rows_N, splits_P

    def start_allreduce_sum_(self, values: Tensor, name: str) -> Callable[[], object]:
        return lambda: None

    _alltoall, _start_allreduce_sum_ = alltoall, start_allreduce_sum_

    def allgather_object(self, value: Object, name: str = "objects") -> list[Object]:
        return [value]

    def carrier(self, device: torch.device) -> str | None:
        return None

    def close(self) -> None:
        pass


_GRACE_S = 2.0
"""Seconds that a late rank waits for the others to report that they are waiting too."""
_ANSWER_S = 5.0
"""Seconds that an answer of the launcher's store may take, as its process may be stopped."""
Answer = TypeVar("Answer")


class Board:
    """The key-value store of the launcher, which all ranks reach; late ranks post there in which collective they wait.

    `read` returns None for a missing key; a lost store reads as empty. `where`: its address. A rank may
    wait in two collectives at once: that of its step, and that of the thread ahead.
    """

    def __init__(
        self, rank: int, write: Callable[[str, str], object], read: Callable[[str], str | None], where: str
    ) -> None:
        self._rank, self._write, self._read, self.where = rank, write, read, where
        self.is_silent = False
        """Whether the store has not answered in time; then it is not asked again."""

    def put(self, key: str, value: str) -> str | None:
        """Write a value for all ranks; return why that failed, None where it did not."""
        return self.ask(lambda: self._write(key, value))[1]

    def get(self, key: str) -> str | None:
        """Read the value that a rank has written."""
        return self.ask(lambda: self._read(key))[0]

    def ask(self, question: Callable[[], Answer]) -> tuple[Answer | None, str | None]:
        """Return the store's answer, or None and why there is none."""
        try:
            return (None, "no answer") if self.is_silent else (in_time(question, _ANSWER_S), None)
        except TimeoutError:
            self.is_silent = True
            return None, "no answer"
        except (RuntimeError, OSError, HTTPException) as error:
            return None, str(error.args[-1]) if error.args else type(error).__name__

    def lateness(self, name: str, size: int, deadline_s: float) -> LateRankError:
        """Name the ranks, of `size`, that did not reach collective `name` in time, and the collectives they are in."""
        self.put(f"{self._rank}.{name}", name)
        self.put(str(self._rank), name)
        time.sleep(_GRACE_S)
        late = [rank for rank in range(size) if rank != self._rank and self.get(f"{rank}.{name}") is None]
        where = {rank: self.get(str(rank)) for rank in late}
        ranks = ", ".join(f"rank {rank}" + (f" (in {at})" if at else "") for rank, at in where.items())
        silence = f"; the store at {self.where}, where ranks say where they are, does not answer"
        ranks, silence = ranks or "nobody is missing, so look at the network", silence if self.is_silent else ""
        return LateRankError(Problem.LATE_RANKS, name, deadline_s, self._rank, ranks, silence)


def in_time(question: Callable[[], Answer], patience_s: float) -> Answer:
    """Return the store's answer. Raises TimeoutError without one, as its client would wait for ever.

    The store may be in a process that hangs, or on a host that has lost its power.
    """
    answer: Future[Answer] = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer.result(patience_s)


_HOROVOD = ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def connect(deadline_s: float = DEADLINE_S) -> Comm:
    """Return the ranks of `horovodrun` or `torchrun`, whichever started this process, else one rank alone.

    Raises ConfigError where the environment tells half of it, or Horovod is not installed, LostRankError where ranks
    have not come within `deadline_s`.
    """
    from trainer.comm.distributed import HorovodComm, TorchComm  # which are built upon this module

    if _has_set(_HOROVOD):
        return HorovodComm(deadline_s)
    return TorchComm(deadline_s) if _has_set(_TORCHRUN) else SoloComm(deadline_s)


def _has_set(names: tuple[str, ...]) -> bool:
    """Return whether a launcher has set its variables; one of the first two says that it did."""
    missing = [name for name in names if name not in os.environ]
    if missing and not {*names[:2]} <= {*missing}:
        found = ", ".join(name for name in names if name not in missing)
        raise ConfigError(Problem.HALF_A_LAUNCH, found, ", ".join(missing))
    return not missing


def launcher_of(ranks: int) -> list[str]:
    """Return the words before `-m MODULE` or a script that start ranks on this machine.

    By horovodrun where that and Horovod are installed: without --gloo it loads torch once more, to ask for MPI. Else by
    torchrun, so that its ranks meet at rank 0's own store: that of the launcher, which we leave out, listens on all
    addresses.
    """
    beside = Path(sys.executable).with_name("horovodrun")
    horovodrun = str(beside) if beside.exists() else shutil.which("horovodrun")
    if horovodrun is None or importlib.util.find_spec("horovod") is None:
        meeting = ["--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--local-addr", "127.0.0.1"]
        torchrun = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", sys.executable, "-m", "torch.distributed.run"]
        return [*torchrun, *meeting, "--nproc-per-node", str(ranks)]
    return [horovodrun, "--gloo", "-np", str(ranks), sys.executable]
