"""The interface of launchers to a rank: variables and rendezvous; and the end of a process that was started."""

import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

import psutil

_DISCARD = 9


@contextmanager
def horovod_rendezvous(hosts: Sequence[str], ranks: Sequence[int], address: str = "") -> Iterator[int]:
    """Serve Horovod's rendezvous at `address` ("": this whole host), `ranks[n]` ranks on `hosts[n]`; yield the port.

    It is Horovod's own server: a key-value store over HTTP, without encryption or password. Ranks reach it by
    HOROVOD_GLOO_RENDEZVOUS_ADDR and _PORT, and name their host, HOROVOD_HOSTNAME, as it is named here.
    """
    from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    server = RendezvousHTTPServer((address, 0), RendezvousHandler, 0)
    server.daemon_threads = True
    server.init(get_host_assignments([HostInfo(*each) for each in zip(hosts, ranks, strict=True)], 1))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def ended(process: "subprocess.Popen[bytes]", patience_s: float = 30.0) -> Iterator[None]:
    """End a process after the block: by SIGTERM, at which horovodrun ends its ranks too, and later by SIGKILL."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """Return a port of this host on which nothing listens now."""
    with socket.socket() as bound:
        bound.bind(("", 0))
        return int(bound.getsockname()[1])


Variables = dict[str, str]


class By(StrEnum):
    """What carries the collectives."""

    HOROVOD = "horovod"
    TORCH = "torch"


@dataclass(frozen=True)
class Place:
    """Where a rank is among all: number `local` of those on host number `node`. Ranks count from host to host."""

    ranks_of_node: Sequence[int]
    node: int
    local: int

    @property
    def rank(self) -> int:
        return sum(self.ranks_of_node[: self.node]) + self.local

    @property
    def size(self) -> int:
        return sum(self.ranks_of_node)


def horovod_variables(place: Place, host: str, address: str, port: int, interface: str | None) -> Variables:
    """Return what horovodrun sets for a rank of `host`, which finds the rendezvous at `address` and `port`.

    `cross` counts the ranks of the same local number. `interface`: the one between the hosts; None leaves it to Gloo.
    """
    peers = [node for node, count in enumerate(place.ranks_of_node) if count > place.local]
    return {
        "HOROVOD_RANK": str(place.rank),
        "HOROVOD_SIZE": str(place.size),
        "HOROVOD_LOCAL_RANK": str(place.local),
        "HOROVOD_LOCAL_SIZE": str(place.ranks_of_node[place.node]),
        "HOROVOD_CROSS_RANK": str(peers.index(place.node)),
        "HOROVOD_CROSS_SIZE": str(len(peers)),
        "HOROVOD_HOSTNAME": host,
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": address,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        **_named(interface, "HOROVOD_GLOO_IFACE"),
    }


def torch_variables(place: Place, address: str, port: int, interface: str | None) -> Variables:
    """Return what torchrun sets for a rank; rank 0 listens on `port` of `address`. `interface`: as for Horovod."""
    return {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        "LOCAL_RANK": str(place.local),
        "LOCAL_WORLD_SIZE": str(place.ranks_of_node[place.node]),
        "GROUP_RANK": str(place.node),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        **_named(interface, "GLOO_SOCKET_IFNAME"),
    }


def _named(interface: str | None, variable: str) -> Variables:
    return {} if interface is None else {variable: interface, "NCCL_SOCKET_IFNAME": interface}


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
