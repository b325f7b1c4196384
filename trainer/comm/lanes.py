"""Process groups of torch.distributed, made when they are first needed, in whatever order that is on each rank.

Ranks meet at torchrun's store of keys. They wait there, in sight of their deadline, until all have come to a lane;
connecting then takes no time worth a deadline. Each lane asks the store over a connection of its own: a client answers
one question after the other, and the lane that another thread makes may be what a lane's ranks wait for.
"""

import contextlib
import functools
import ipaddress
import itertools
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from trainer.comm.lateness import Answer, in_time, loss
from trainer.errors import ConfigError, LostRankError

Carrier = Literal["gloo", "nccl"]
ProcessGroup = Any
"""What the two groups have in common is typed nowhere."""

_CONNECT = timedelta(seconds=120)
"""For ranks that are all there to connect."""
_FOREVER = timedelta(days=365)
"""A group itself gives up after this; it would take its connections along. Ours is `Comm.deadline_s`."""
_LEAVE_S = 5.0
"""How long the rank that holds the store waits for the others to leave."""
_ANSWER_S = 5.0
"""How long an answer of the store may take."""
_times = itertools.count()


@dataclass(frozen=True)
class RankAddress:
    """Where a rank runs and listens: `address` is None where GLOO_SOCKET_IFNAME says it; `gpus` that NCCL can use."""

    host: str
    address: str | None
    gpus: int


@dataclass
class Meeting:
    """Where ranks meet: `store` is torchrun's, or held by rank 0 where something else started the ranks."""

    store: Store
    rank: int
    size: int
    here: RankAddress
    is_ours: bool
    """Whether rank 0 holds the store, which ends with it."""
    is_silent: bool = False
    """Whether the store has not answered in time; it is not asked again then."""

    @classmethod
    def of_environment(cls, patience_s: float) -> "Meeting":
        """Meet where torchrun's variables say. Raises LostRankError where nobody is there."""
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        is_ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        try:
            store: Store = _store_at(host, port, rank, size, holds=is_ours and rank == 0, patience_s=patience_s)
        except (RuntimeError, OSError) as error:
            raise LostRankError(
                f"rank {rank} did not reach the other ranks at MASTER_ADDR:MASTER_PORT={host}:{port} within "
                f"run.deadline_s={patience_s:g}: {_first_line(error)}"
            ) from error
        # Another job may have met there, and this process too: several Comms of one process come one after the other.
        launch = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
        store = PrefixStore("/".join([*launch, str(next(_times))]), store)
        store.set_timeout(_CONNECT)
        by_interface = bool(os.environ.get("GLOO_SOCKET_IFNAME"))
        address = None if by_interface else own_address(host, is_one_host=_is_one_host(size))
        gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
        return cls(store, rank, size, RankAddress(socket.gethostname(), address, gpus), is_ours)

    def put(self, key: str, value: str) -> None:
        """Write for all ranks to read; nothing where the store is gone."""
        self._ask(lambda: self.store.set(key, value))

    def get(self, key: str) -> str | None:
        """Read what a rank wrote; None where there is nothing, or the store is gone."""
        return self._ask(lambda: self.store.get(key).decode() if self.store.check([key]) else None)

    def leave(self) -> None:
        """Tell the rank that holds the store that this one needs it no more; that one waits a little for the others."""
        if not self.is_ours:
            return
        left, end_s = self._ask(lambda: self.store.add("left", 1)), time.monotonic() + _LEAVE_S
        while self.rank == 0 and left is not None and left < self.size and time.monotonic() < end_s:
            time.sleep(0.01)
            left = self._ask(lambda: self.store.add("left", 0))

    def _ask(self, question: Callable[[], Answer]) -> Answer | None:
        try:
            return None if self.is_silent else in_time(question, _ANSWER_S)
        except TimeoutError:
            self.is_silent = True
        except (RuntimeError, OSError):
            pass
        return None


class Lanes:
    """Groups of all ranks by name, each with connections and a thread of its own."""

    def __init__(self, meeting: Meeting, patience_s: Callable[[], float], give_up: Callable[[str], NoReturn]) -> None:
        """`patience_s`: how long to wait for the others from now on; `give_up` is called with the lane's name then."""
        self._meeting, self._patience_s, self._give_up = meeting, patience_s, give_up
        self._devices = _devices(meeting.here.address)
        self._groups: dict[tuple[Carrier, str], ProcessGroup] = {}
        self.ranks: list[RankAddress] = []
        """Of all ranks, once a lane was made."""

    def of(self, carrier: Carrier, name: str) -> ProcessGroup:
        """Return the group of that name. The first call waits for all ranks; one thread at a time asks for one name.

        Raises LostRankError where they cannot connect, ConfigError where they listen where others do not reach them.
        """
        group = self._groups.get((carrier, name))
        if group is None:
            group = self._groups[carrier, name] = self._connected(carrier, name)
        return group

    def clear(self) -> None:
        """Leave all groups; nothing may be under way in them."""
        self._groups.clear()

    def _connected(self, carrier: Carrier, name: str) -> ProcessGroup:
        meeting, end_s, pause_s = self._meeting, time.monotonic() + self._patience_s(), 1e-3
        try:
            clone = in_time(meeting.store.clone, self._patience_s())  # type: ignore[attr-defined]
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
            raise LostRankError(f"{loss(meeting.rank, name.partition('.')[2])} ({_first_line(error)})") from error

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


@functools.cache  # of a process that connects again: its own store still listens
def _store_at(host: str, port: int, rank: int, size: int, *, holds: bool, patience_s: float) -> Store:
    """Connect to the store of all ranks, or hold it: among ranks of one host where these alone reach it."""
    listener = None
    if holds:
        _wait_for(lambda _: socket.getaddrinfo(host, port), patience_s)
        address = listening_address(host, is_one_host=_is_one_host(size))
        listener = socket.create_server((address, port)).detach()
        host = address or "127.0.0.1"  # whatever MASTER_ADDR may lead to, its own store is here
    else:  # torch's own client says on several screens that nothing listens
        _wait_for(lambda left_s: socket.create_connection((host, port), timeout=left_s).close(), patience_s)
    patience = timedelta(seconds=patience_s)
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


def _wait_for(reach: Callable[[float], object], patience_s: float) -> None:
    """Reach something, within the seconds that it is given, or try again: a host's name may come later than its ranks.

    Raises the last try's OSError after `patience_s`.
    """
    end_s = time.monotonic() + patience_s
    while True:
        try:
            reach(max(0.1, end_s - time.monotonic()))
        except OSError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.05)
        else:
            return


def own_address(master: str, *, is_one_host: bool) -> str:
    """Return the address to listen at: loopback among ranks of one host, else that of the way to `master`.

    Raises ConfigError where there is no way.
    """
    if is_one_host:
        return "127.0.0.1"
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR={master}: no way leads there from {socket.gethostname()}: {error}") from error


def check_reach(ranks: list[RankAddress]) -> None:
    """Raise ConfigError where one of the ranks of several hosts listens on loopback."""
    hosts = dict.fromkeys(each.host for each in ranks)
    for rank, each in enumerate(ranks):
        if len(hosts) > 1 and each.address is not None and each.address.startswith("127."):
            other = next(host for host in hosts if host != each.host)
            raise ConfigError(
                f"rank {rank} on {each.host} would listen at {each.address}, out of reach for {other}: there, "
                f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} leads to loopback; name the interface between the hosts: "
                "GLOO_SOCKET_IFNAME=eth0"
            )


def has_gpu_for_each(ranks: list[RankAddress]) -> bool:
    """Return whether every rank can have a GPU for itself, as NCCL wants it."""
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
        raise ConfigError(f"GLOO_SOCKET_IFNAME={names}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
