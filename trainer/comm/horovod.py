"""Collectives over Horovod, and its rendezvous store.

Horovod connects its ranks by Gloo, which ends the process (SIGABRT) if one does not arrive within 30 s. So here they
first wait for each other, with their own deadline.
"""

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from trainer.comm.comm import DEADLINE_S, Board, Comm, loss
from trainer.errors import ConfigError, LateRankError, LostRankError

_DISCARD = 9
_CYCLE_TIME = "2"
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
        os.environ.setdefault("HOROVOD_CYCLE_TIME", _CYCLE_TIME)
        if server := os.environ.get(_ADDRESS[0]):
            for variable in ("HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME"):  # horovodrun sets both
                with contextlib.suppress(OSError):  # `meet` says what is out of reach
                    os.environ.setdefault(variable, interface_towards(server))
        try:
            import horovod.torch as hvd
            from horovod.common.exceptions import HorovodInternalError
            from horovod.runner.http.http_client import put_data_into_kvstore, read_data_from_kvstore
        except ImportError as error:
            raise ConfigError(
                f"horovodrun started this process, but its Python cannot import Horovod ({error}): make install builds "
                "it; without it, start the ranks by torchrun"
            ) from error

        self._hvd: Any = hvd
        self._internal_error: type[Exception] = HorovodInternalError
        rank, scope = int(os.environ["HOROVOD_RANK"]), f"comm.{next(_meetings)}"
        address = [os.environ[name] for name in _ADDRESS]
        write, read = (partial(each, *address, scope) for each in (put_data_into_kvstore, read_data_from_kvstore))
        self._board = Board(rank, write, read, f"{':'.join(_ADDRESS)}={':'.join(address)}")
        meet(self._board, rank, int(os.environ["HOROVOD_SIZE"]), deadline_s)
        hvd.init()
        self.rank, self.size = hvd.rank(), hvd.size()
        self.moves_cuda_tensors = bool(hvd.nccl_built())

    def _alltoall(self, rows_N: Tensor, splits_P: Tensor, name: str) -> tuple[Tensor, Tensor]:
        with self._named(name):
            handle = self._hvd.alltoall_async(rows_N.contiguous(), splits_P, name=f"alltoall.{name}")
        received, counts_P = self._wait(handle, name)
        return received, counts_P

    def _start_allreduce_sum_(self, values: Tensor, name: str) -> Callable[[], object]:
        with self._named(name):
            handle = self._hvd.allreduce_async_(values, op=self._hvd.Sum, name=f"allreduce.{name}")
        return partial(self._wait, handle, name)

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
                    raise LateRankError(self._board.lateness(name, self.size, self.deadline_s))
            return self._hvd.synchronize(handle)

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Raise LostRankError if Horovod finds that another rank was lost, before or during a collective."""
        try:
            yield
        except self._internal_error as error:
            raise LostRankError(loss(self.rank, name)) from error


_ADDRESS = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
_meetings = itertools.count()  # several Comms of one process come one after the other


def interface_towards(address: str) -> str:
    """Name the network interface by which this host reaches an address: eth0, or lo for one of its own.

    Without that, Gloo takes the address of the host's name, which on many systems is a loopback one.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, _DISCARD))  # nothing is sent: the kernel chooses the way
        own = probe.getsockname()[0]
    return next(
        (name for name, found in psutil.net_if_addrs().items() if own in [each.address for each in found]), "lo"
    )


def meet(board: Board, rank: int, size: int, deadline_s: float) -> None:
    """Wait until all ranks have arrived here. Each reads one key, but rank 0 reads one of each rank.

    Raises LostRankError if the store is out of reach, LateRankError if ranks do not arrive, after `deadline_s`.
    """
    here, end_s, pause_s, number = f"{rank}.start", time.monotonic() + deadline_s, 1e-3, 0  # as `lateness` asks for
    awaited = [f"{each}.start" for each in range(size)] if rank == 0 else ["all"]
    trouble = board.put(here, "here")
    while number < len(awaited):
        if trouble is None and board.get(awaited[number]) is not None:
            number += 1
            continue
        if time.monotonic() > end_s:
            if trouble is not None:
                raise LostRankError(
                    f"rank {rank} did not reach the process that started the ranks within run.deadline_s="
                    f"{deadline_s:g}, at {board.where}: {trouble}"
                )
            raise LateRankError(board.lateness("start", size, deadline_s))
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, 0.1)
        board.is_silent = False  # it is asked again, as its process may have been stopped for a while
        if trouble is not None:
            trouble = board.put(here, "here")
    if rank == 0:
        board.put("all", "here")
