"""Collectives over torch.distributed, in lanes that do not wait for each other, and over Horovod.

Ranks of torch.distributed meet at torchrun's store of keys. They wait there, in sight of their deadline, until all have
come to a lane; connecting then takes no time worth a deadline. Each lane asks the store over a connection of its own: a
client answers one question after the other, and the lane that another thread makes may be what a lane's ranks wait for.

A process group takes its collectives in one order on every rank. Ours have an order among those of one name alone: the
sum of a gradient begins when backward has made it, beside collectives of the thread ahead. So groups are lanes. What
the thread that made the Comm waits for comes one after the other, and has one lane; every other collective has the
lane of its name. No lane waits for another, whatever the order in which ranks come to them.

Horovod connects its ranks by Gloo, which ends the process (SIGABRT) if one does not arrive within 30 s. So here they
first wait for each other, with their own deadline.
"""

import contextlib
import ctypes
import functools
import ipaddress
import itertools
import json
import math
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NoReturn, cast

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from trainer.comm.comm import DEADLINE_S, Board, Comm, in_time
from trainer.errors import ConfigError, LostRankError
from trainer.problems import Problem

Carrier = Literal["gloo", "nccl"]
ProcessGroup = Any
"""What the two groups have in common is typed nowhere."""

_CONNECT = timedelta(seconds=120)
"""Seconds for ranks to connect once all have arrived."""
_FOREVER = timedelta(days=365)
"""A group's own timeout, which would close its connections; ours is `Comm.deadline_s`."""
_TRY_S = 5.0
"""Seconds that a try to reach the store may take; the next one begins at once."""
_LEAVE_S = 5.0
"""Seconds that the rank that holds the store waits for the others to leave."""
_times = itertools.count()
_MAIN = "lane.start"
_LOOK_S = 0.2
"""Seconds between checks of the deadline and of signals during a wait, which ends at once with its collective."""
_DISCARD = 9
_CYCLE_TIME = "2"
"""Milliseconds between two looks at what is to be done; each talks to the other ranks, and takes the processor from the
step: two ranks of one core are a fifth faster with this than with 0.3, a small collective takes one or two ms more. The
environment's own value wins."""
WITHOUT_NCCL = (
    "this Horovod was built without NCCL; start the ranks by torchrun, whose NCCL needs no build, "
    "or build Horovod with it: HOROVOD_GPU_OPERATIONS=NCCL make install"
)
_ADDRESS = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
_meetings = itertools.count()  # several Comms of one process come one after the other


@dataclass(frozen=True)
class RankAddress:
    """A rank's host and address (None if GLOO_SOCKET_IFNAME gives it), and the number of GPUs that NCCL can use."""

    host: str
    address: str | None
    gpus: int


@dataclass
class Meeting:
    """The meeting point of ranks: `store` is torchrun's, or rank 0's if another launcher started the ranks."""

    store: Store
    rank: int
    size: int
    here: RankAddress
    is_ours: bool
    """Whether rank 0 holds the store, which ends with it."""

    @functools.cached_property
    def board(self) -> Board:
        """Return the board on which the ranks of this store post in which collective they wait."""
        store = self.store

        def read(key: str) -> str | None:
            return store.get(key).decode() if store.check([key]) else None

        return Board(self.rank, store.set, read, "MASTER_ADDR:MASTER_PORT")

    @classmethod
    def of_environment(cls, patience_s: float) -> "Meeting":
        """Meet at the address in torchrun's variables. Raises LostRankError if nobody is there."""
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        is_ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        try:
            store: Store = _store_at(host, port, rank, size, holds=is_ours and rank == 0, patience_s=patience_s)
        except (RuntimeError, OSError) as error:
            there, why = f"{host}:{port}", _first_line(error)
            raise LostRankError(Problem.NO_ANSWER_OF_RANKS, rank, there, patience_s, why) from error
        # Another job may have met there, and this process too: several Comms of one process come one after the other.
        launch = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
        store = PrefixStore("/".join([*launch, str(next(_times))]), store)
        store.set_timeout(_CONNECT)
        by_interface = bool(os.environ.get("GLOO_SOCKET_IFNAME"))
        address = None if by_interface else own_address(host, is_one_host=_is_one_host(size))
        gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
        return cls(store, rank, size, RankAddress(socket.gethostname(), address, gpus), is_ours)

    def leave(self) -> None:
        """Tell the rank with the store that this one no longer needs it; that rank waits a little for all others."""
        if not self.is_ours:
            return
        end_s, (left, _) = time.monotonic() + _LEAVE_S, self.board.ask(lambda: self.store.add("left", 1))
        while self.rank == 0 and left is not None and left < self.size and time.monotonic() < end_s:
            time.sleep(0.01)
            left, _ = self.board.ask(lambda: self.store.add("left", 0))


class Lanes:
    """Groups of all ranks by name, each with connections and a thread of its own."""

    def __init__(self, meeting: Meeting, patience_s: Callable[[], float], give_up: Callable[[str], NoReturn]) -> None:
        """`patience_s`: how long to wait for the others from now on; `give_up` is called with the lane's name then."""
        self._meeting, self._patience_s, self._give_up = meeting, patience_s, give_up
        self._devices = _devices(meeting.here.address)
        self._groups: dict[tuple[Carrier, str], ProcessGroup] = {}
        self.ranks: list[RankAddress] = []
        """Members of all ranks, after the first lane was made."""

    def of(self, carrier: Carrier, name: str) -> ProcessGroup:
        """Return the group of that name. The first call waits for all ranks; one thread at a time asks for one name.

        Raises LostRankError where they cannot connect, ConfigError where they listen where others do not reach them.
        """
        group = self._groups.get((carrier, name))
        if group is None:
            group = self._groups[carrier, name] = self._connected(carrier, name)
        return group

    def clear(self) -> None:
        """Leave all groups; no collective may be running in them."""
        self._groups.clear()

    def _connected(self, carrier: Carrier, name: str) -> ProcessGroup:
        meeting, end_s, pause_s = self._meeting, time.monotonic() + self._patience_s(), 1e-3
        try:
            opened: Any = meeting.store  # torch 2.13 has no type of clone
            clone = in_time(opened.clone, self._patience_s())
            store = PrefixStore(f"{carrier}/{name}", clone)
            here, places = json.dumps(astuple(meeting.here)), [f"at/{rank}" for rank in range(meeting.size)]
            in_time(lambda: store.set(places[meeting.rank], here), self._patience_s())
            while not in_time(lambda: store.check(places), max(1.0, end_s - time.monotonic())):
                time.sleep(pause_s)
                pause_s = min(1.5 * pause_s, 0.02)
                if time.monotonic() > end_s:
                    self._give_up(name)
            self.ranks = [RankAddress(*json.loads(place)) for place in store.multi_get(places)]
            check_reach(self.ranks)
            return self._new(carrier, store)
        except TimeoutError:
            self._give_up(name)
        except (RuntimeError, OSError) as error:
            raise LostRankError(Problem.LOST_RANK, meeting.rank, _name_of(name), f" ({_first_line(error)})") from error

    def _new(self, carrier: Carrier, store: Store) -> ProcessGroup:
        rank, size = self._meeting.rank, self._meeting.size
        if carrier == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _FOREVER
            return dist.ProcessGroupNCCL(store, rank, size, options)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout, options._threads, options._devices = _CONNECT, 1, self._devices
        group = dist.ProcessGroupGloo(store, rank, size, options)
        group._set_default_timeout(_FOREVER)
        return group


@functools.cache  # this process connects again: its own store still listens
def _store_at(host: str, port: int, rank: int, size: int, *, holds: bool, patience_s: float) -> Store:
    """Connect to the store of all ranks, or hold it: among ranks of one host where these alone reach it."""
    from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

    listener, patience = None, timedelta(seconds=patience_s)
    # The name of a host may be known later than its ranks start; the last try's error is raised.
    retried = Retrying(
        retry=retry_if_exception_type(OSError), stop=stop_after_delay(patience), wait=wait_fixed(0.05), reraise=True
    )
    if holds:
        retried(socket.getaddrinfo, host, port)
        address = listening_address(host, is_one_host=_is_one_host(size))
        listener = socket.create_server((address, port)).detach()
        host = address or "127.0.0.1"  # whatever MASTER_ADDR may lead to, its own store is here
    else:  # torch's own client says on several screens that nothing listens
        retried(lambda: socket.create_connection((host, port), timeout=min(patience_s, _TRY_S)).close())
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, size, holds, patience, wait_for_workers=False, master_listen_fd=listener
    )


def listening_address(master: str, *, is_one_host: bool) -> str:
    """Return the address where rank 0's store listens: loopback where other hosts cannot be meant; else `master`.

    All addresses ("") where that is a name, which may mean another address elsewhere, or is of no interface here.
    """
    with contextlib.suppress(ValueError):
        if ipaddress.IPv4Address(master).is_loopback:
            return master
    if is_one_host or master == "localhost":
        return "127.0.0.1"
    with contextlib.suppress(ValueError, OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind((str(ipaddress.IPv4Address(master)), 0))
        return master
    return ""


def own_address(master: str, *, is_one_host: bool) -> str:
    """Return the address to listen at: loopback for ranks of one host, else that of the route to `master`.

    Raises ConfigError if there is no route.
    """
    if is_one_host:
        return "127.0.0.1"
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(Problem.NO_ROUTE, master, socket.gethostname(), error) from error


def check_reach(ranks: list[RankAddress]) -> None:
    """Raise ConfigError where one of the ranks of several hosts listens on loopback."""
    hosts = dict.fromkeys(each.host for each in ranks)
    for rank, each in enumerate(ranks):
        if len(hosts) > 1 and each.address is not None and each.address.startswith("127."):
            other = next(host for host in hosts if host != each.host)
            master = os.environ.get("MASTER_ADDR")
            raise ConfigError(Problem.LISTENS_ON_LOOPBACK, rank, each.host, each.address, other, master)


def has_gpu_for_each(ranks: list[RankAddress]) -> bool:
    """Return whether every rank can have a GPU of its own, as NCCL requires."""
    return all(rank.gpus >= sum(each.host == rank.host for each in ranks) for rank in ranks)


def _is_one_host(size: int) -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == str(size)


def _devices(address: str | None) -> list[dist.ProcessGroupGloo.Device]:
    if address is not None:
        return [dist.ProcessGroupGloo.create_device(hostname=address)]
    names = os.environ["GLOO_SOCKET_IFNAME"]
    try:
        return [dist.ProcessGroupGloo.create_device(interface=name.strip()) for name in names.split(",")]
    except RuntimeError as error:
        raise ConfigError(Problem.WRONG_INTERFACE, names, _first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


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
        """The last collective of each name."""
        self._beginning: dict[str, Future[dist.Work]] = {}
        """The first collective of each name, which a thread of its own begins."""
        self.moves_cuda_tensors = has_gpu_for_each(self._lanes.ranks)

    def _alltoall(self, rows_N: Tensor, splits_P: Tensor, name: str) -> tuple[Tensor, Tensor]:
        key = f"alltoall.{name}"
        lane = self._lanes.of("gloo", _MAIN if threading.get_ident() == self._thread else key)  # its thread waits
        counts_P = self._tell(lane, splits_P, key)
        received = rows_N.new_empty((int(counts_P.sum()), *rows_N.shape[1:]))
        carrier = self._lanes.of("nccl", key) if rows_N.is_cuda else lane
        row_bytes = rows_N.element_size() * math.prod(rows_N.shape[1:])
        sizes = [[row_bytes * rows for rows in each.tolist()] for each in (counts_P, splits_P)]
        self._wait(key, carrier.alltoall_base(_bytes(received), _bytes(rows_N), *sizes, dist.AllToAllOptions()))
        return received, counts_P

    def _start_allreduce_sum_(self, values: Tensor, name: str) -> Callable[[], object]:
        key = f"allreduce.{name}"
        begun = self._beside(key, lambda: self._allreduce(values, key))
        return lambda: self._wait(key, begun.result())

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
        """Begin a collective without waiting.

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

    def _tell(self, lane: ProcessGroup, counts_P: Tensor, key: str) -> Tensor:
        """Send each rank a number; return the received ones (P,) int32.

        All come with the same collective: where one lane is taken in two orders, that is found here.
        """
        kind = zlib.crc32(key.encode())
        told_P2 = torch.stack([counts_P.long(), torch.full((self.size,), kind)], dim=1)
        heard_P2 = torch.empty_like(told_P2)
        self._wait(key, lane.alltoall_base(heard_P2, told_P2, [], [], dist.AllToAllOptions()))
        astray = (heard_P2[:, 1] != kind).nonzero().flatten().tolist()
        assert not astray, f"ranks {astray} are in another collective than {key} of rank {self.rank}"
        return heard_P2[:, 0].int()

    def _wait(self, key: str, work: dist.Work) -> None:
        """Wait for the end of a collective. Raises LostRankError, LateRankError."""
        self._last[key] = work
        end_s = time.monotonic() + self.deadline_s
        try:
            while not work.is_completed():
                with contextlib.suppress(RuntimeError):  # not yet; or its error, which the next wait raises again
                    work.wait(timedelta(seconds=max(1e-3, min(_LOOK_S, end_s - time.monotonic()))))
                if time.monotonic() > end_s and not work.is_completed():
                    self._give_up(key)
            work.wait()
        except RuntimeError as error:
            self._abandon()
            raise LostRankError(Problem.LOST_RANK, self.rank, _name_of(key), "") from error

    def _give_up(self, key: str) -> NoReturn:
        self._abandon()
        raise self._meeting.board.lateness(_name_of(key), self.size, self.deadline_s)

    def _abandon(self) -> None:
        """Abandon the lanes, as closing them would wait for their collectives."""
        if not self.is_stuck:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._lanes))
        self.is_stuck = True


def _bytes(values: Tensor) -> Tensor:
    """Return the same memory as bytes, as Gloo does not support all of our types."""
    return values.detach().contiguous().view(-1).view(torch.uint8)


def _name_of(key: str) -> str:
    """Return the name of a collective without its kind."""
    return key.partition(".")[2]


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
            raise ConfigError(Problem.NO_HOROVOD, error) from error

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
                    raise self._board.lateness(name, self.size, self.deadline_s)
            return self._hvd.synchronize(handle)

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Raise LostRankError if Horovod finds that another rank was lost, before or during a collective."""
        try:
            yield
        except self._internal_error as error:
            raise LostRankError(Problem.LOST_RANK, self.rank, name, "") from error


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
                raise LostRankError(Problem.NO_ANSWER_OF_LAUNCHER, rank, deadline_s, board.where, trouble)
            raise board.lateness("start", size, deadline_s)
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, 0.1)
        board.is_silent = False  # it is asked again, as its process may have been stopped for a while
        if trouble is not None:
            trouble = board.put(here, "here")
    if rank == 0:
        board.put("all", "here")
