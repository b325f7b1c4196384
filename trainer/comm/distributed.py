"""The ranks that `torchrun` started: the door to torch.distributed, and with lanes.py the one place that knows it.

A process group takes its collectives in one order on every rank. Ours have an order among those of one name alone: the
sum of a gradient begins when backward has made it, beside collectives of the thread ahead. So groups are lanes. What
the thread that made the Comm waits for comes one after the other, and has one lane; every other collective has the
lane of its name. No lane waits for another, whatever the order in which ranks come to them.
"""

import contextlib
import ctypes
import math
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.comm.comm import DEADLINE_S, Comm, Object, check_splits, pickled, unpickled
from trainer.comm.lanes import Lanes, Meeting, ProcessGroup, has_gpu_for_each
from trainer.comm.lateness import Bulletin, loss
from trainer.errors import LateRankError, LostRankError

_MAIN = "lane.start"
_LOOK_S = 0.2
"""How long a wait goes without looking at the deadline and at signals; the end of a collective ends it at once."""
_UNEVEN = 1.5
"""Rows are gathered in parts as long as the longest, unless that carries this many times their bytes."""


class TorchComm(Comm):
    """The ranks that `torchrun` started: Gloo, and NCCL for tensors of GPUs."""

    without_cuda = (
        "torch.distributed moves tensors of GPUs where each rank has one for itself; start at most as many ranks on a "
        "host as it has GPUs"
    )

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        super().__init__(deadline_s)
        self._meeting = Meeting.of_environment(deadline_s)
        self.rank, self.size = self._meeting.rank, self._meeting.size
        self._lanes = Lanes(self._meeting, lambda: self.deadline_s, self._give_up)
        self._lanes.of("gloo", _MAIN)
        self._thread = threading.get_ident()
        self._last: dict[str, dist.Work] = {}
        """Of each name the collective that began last."""
        self._beginning: dict[str, Future[dist.Work]] = {}
        """Of each name that threads of their own begin with: the first one."""
        self.moves_cuda_tensors = has_gpu_for_each(self._lanes.ranks)

    def alltoall(self, rows_N: Tensor, splits_P: Tensor, name: str) -> tuple[Tensor, Tensor]:
        check_splits(rows_N, splits_P, name)
        key = f"alltoall.{name}"
        lane = self._lane_of(key)
        counts_P = self._tell(lane, splits_P, key)
        received = rows_N.new_empty((int(counts_P.sum()), *rows_N.shape[1:]))
        carrier = self._lanes.of("nccl", key) if rows_N.is_cuda else lane
        row_bytes = rows_N.element_size() * math.prod(rows_N.shape[1:])
        sizes = [[row_bytes * rows for rows in each.tolist()] for each in (counts_P, splits_P)]
        self._wait(key, carrier.alltoall_base(_bytes(received), _bytes(rows_N), *sizes, dist.AllToAllOptions()))
        self._count_alltoall(rows_N, splits_P, counts_P, name)
        return received, counts_P

    def start_allreduce_sum_(self, values: Tensor, name: str) -> Callable[[], None]:
        key = f"allreduce.{name}"
        begun = self._beside(key, lambda: self._allreduce(values, key))

        def finish() -> None:
            self._wait(key, begun.result())
            self._count_allreduce(values, name)

        return finish

    def allgather(self, rows_N: Tensor, name: str) -> Tensor:
        return torch.cat(self._gathered(rows_N.cpu(), name)).to(rows_N.device)

    def allgather_object(self, value: Object, name: str = "objects") -> list[Object]:
        return [cast("Object", unpickled(piece)) for piece in self._gathered(pickled(value), name)]

    def broadcast_object(self, value: Object, root: int = 0) -> Object:
        data = pickled(value) if self.rank == root else torch.empty(0, dtype=torch.uint8)
        return cast("Object", unpickled(self._gathered(data, "broadcast")[root]))

    def carrier(self, device: torch.device) -> str | None:
        carrier = "NCCL" if device.type == "cuda" and self.moves_cuda_tensors else "Gloo"
        return f"{carrier} by torch.distributed"

    def close(self) -> None:
        is_begun = all(each.done() for each in self._beginning.values())
        if not self.is_stuck and not (is_begun and all(work.is_completed() for work in self._last.values())):
            self._abandon()
        if self.is_stuck:
            return
        self._last.clear()
        self._lanes.clear()
        self._meeting.leave()

    def _allreduce(self, values: Tensor, key: str) -> dist.Work:
        work = self._lanes.of("nccl" if values.is_cuda else "gloo", key).allreduce([values.detach()])
        self._last[key] = work
        return cast("dist.Work", work)

    def _beside(self, key: str, begin: Callable[[], dist.Work]) -> Future[dist.Work]:
        """Begin a collective without waiting for anybody.

        The first one of a name waits until all ranks come to its lane: in a thread of its own, as they may come to two
        lanes in two orders.
        """
        if key in self._last:
            begun = Future[dist.Work]()
            begun.set_result(begin())
            return begun
        with_thread = ThreadPoolExecutor(1, key)
        begun = self._beginning[key] = with_thread.submit(begin)
        with_thread.shutdown(wait=False)
        return begun

    def _lane_of(self, key: str) -> ProcessGroup:
        """Return the lane of a collective that its thread waits for."""
        return self._lanes.of("gloo", _MAIN if threading.get_ident() == self._thread else key)

    def _tell(self, lane: ProcessGroup, counts_P: Tensor, key: str) -> Tensor:
        """Tell each rank a number; return those that they tell this one (P,) int32.

        All come with the same collective: where one lane is taken in two orders, that is found here.
        """
        kind = zlib.crc32(key.encode())
        told_P2 = torch.stack([counts_P.long(), torch.full((self.size,), kind)], dim=1)
        heard_P2 = torch.empty_like(told_P2)
        self._wait(key, lane.alltoall_base(heard_P2, told_P2, [], [], dist.AllToAllOptions()))
        astray = (heard_P2[:, 1] != kind).nonzero().flatten().tolist()
        assert not astray, f"ranks {astray} are in another collective than {key} of rank {self.rank}"
        return heard_P2[:, 0].int()

    def _gathered(self, rows_N: Tensor, name: str) -> list[Tensor]:
        """Return the rows of each rank."""
        key, rows_N = f"allgather.{name}", rows_N.detach().contiguous()
        lane = self._lane_of(key)
        counts_P = self._tell(lane, torch.full((self.size,), len(rows_N)), key).tolist()
        total, longest = sum(counts_P), max(counts_P)
        if longest * self.size <= _UNEVEN * total:
            padded_N = torch.cat([rows_N, rows_N.new_zeros((longest - len(rows_N), *rows_N.shape[1:]))])
            gathered_PN = rows_N.new_empty((self.size, *padded_N.shape))
            self._wait(key, lane._allgather_base(_bytes(gathered_PN), _bytes(padded_N)))
            pieces_P = [gathered_PN[rank, :count] for rank, count in enumerate(counts_P)]
        else:
            pieces_P = [rows_N.new_empty((count, *rows_N.shape[1:])) for count in counts_P]
            pieces_P[self.rank] = rows_N
            for rank, piece_N in enumerate(pieces_P):
                if len(piece_N):
                    options = dist.BroadcastOptions()
                    options.rootRank = rank
                    self._wait(key, lane.broadcast([_bytes(piece_N)], options))
        row_bytes = rows_N.element_size() * math.prod(rows_N.shape[1:])
        self._count(name, rows_N.nbytes * (self.size - 1), row_bytes * total - rows_N.nbytes)
        return pieces_P

    def _wait(self, key: str, work: dist.Work) -> None:
        """Wait for the end of a collective. Raises LostRankError, LateRankError."""
        self._last[key] = work
        end_s = time.monotonic() + self.deadline_s
        try:
            while not work.is_completed():
                self._look(work, end_s - time.monotonic())
                if time.monotonic() > end_s and not work.is_completed():
                    self._give_up(key)
            work.wait()
        except RuntimeError as error:
            self._abandon()
            raise LostRankError(loss(self.rank, _name_of(key))) from error

    @staticmethod
    def _look(work: dist.Work, left_s: float) -> None:
        """Wait a little for the end of a collective."""
        with contextlib.suppress(RuntimeError):  # not yet; or its error, which the next wait raises again
            work.wait(timedelta(seconds=max(1e-3, min(_LOOK_S, left_s))))

    def _give_up(self, key: str) -> NoReturn:
        self._abandon()
        bulletin = Bulletin(self.rank, self._meeting.put, self._meeting.get)
        text = bulletin.lateness(_name_of(key), self.size, self.deadline_s)
        if self._meeting.is_silent:
            text += "; the store at MASTER_ADDR:MASTER_PORT, where ranks say where they are, does not answer"
        raise LateRankError(text)

    def _abandon(self) -> None:
        """Leave the lanes as they are, for ever: their end would wait for that of their collectives."""
        if not self.is_stuck:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._lanes))
        self.is_stuck = True


def _bytes(values: Tensor) -> Tensor:
    """Return the same memory as bytes: Gloo moves some types, ours are more."""
    return values.detach().contiguous().view(-1).view(torch.uint8)


def _name_of(key: str) -> str:
    """Return the name by which a collective was asked for, without its kind."""
    return key.partition(".")[2]
