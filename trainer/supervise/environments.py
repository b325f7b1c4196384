"""What ranks find in their environment, as horovodrun or torchrun would put it there, so that they find each other."""

import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from trainer.supervise.policy import Slots

Launcher = Literal["horovodrun", "torchrun"]
Variables = dict[str, str]
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Reach:
    """Addresses of one host: `own`, by which others reach it, and `head`, by which it reaches the supervisor."""

    own: str
    head: str
    interface: str | None


def reach_of(ssh_connection: str | None, interfaces: Mapping[str, str], head: str | None) -> Reach:
    """Tell addresses from what sshd says on a host; of this machine, `head` is that by which other hosts reach it.

    `ssh_connection`: addresses and ports of both ends, None on this machine.
    """
    if ssh_connection is None:
        here = head or LOOPBACK
        return Reach(here, here, interfaces.get(here))
    client, _, own, _ = ssh_connection.split()
    return Reach(own, client, interfaces.get(own))


@contextmanager
def environments(launcher: Launcher, hosts: Sequence[Slots], reach: Mapping[str, Reach]) -> Iterator[list[Variables]]:
    """Yield the variables of each rank; what they meet at is there until the block ends. One rank alone needs none."""
    if sum(each.count for each in hosts) == 1:
        yield [{}]
        return
    if launcher == "torchrun":
        yield _as_torchrun(hosts, reach)
        return
    with _rendezvous(hosts, LOOPBACK if all(each.own == LOOPBACK for each in reach.values()) else "") as ranks:
        for host, rank in zip(_host_of_ranks(hosts), ranks, strict=True):
            rank["HOROVOD_GLOO_RENDEZVOUS_ADDR"] = reach[host].head
            rank.update(_interface("HOROVOD_GLOO_IFACE", reach[host]))
        yield ranks


def _as_torchrun(hosts: Sequence[Slots], reach: Mapping[str, Reach]) -> list[Variables]:
    port = _free_port()
    names = _host_of_ranks(hosts)
    counts = {each.host: each.count for each in hosts}
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(names)),
            "LOCAL_RANK": str(rank - names.index(host)),
            "LOCAL_WORLD_SIZE": str(counts[host]),
            "GROUP_RANK": str(list(counts).index(host)),
            "MASTER_ADDR": reach[names[0]].own,
            "MASTER_PORT": str(port),
            **_interface("GLOO_SOCKET_IFNAME", reach[host]),
        }
        for rank, host in enumerate(names)
    ]


def _host_of_ranks(hosts: Sequence[Slots]) -> list[str]:
    return [each.host for each in hosts for _ in range(each.count)]


def _interface(variable: str, reach: Reach) -> Variables:
    return {variable: reach.interface, "NCCL_SOCKET_IFNAME": reach.interface} if reach.interface else {}


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("", 0))
        return int(bound.getsockname()[1])


@contextmanager
def _rendezvous(hosts: Sequence[Slots], address: str) -> Iterator[list[Variables]]:
    """Serve Horovod's rendezvous at `address` ("": all of this machine) and yield the variables of each rank."""
    from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    plan = get_host_assignments([HostInfo(each.host, each.count) for each in hosts], 1)
    server = RendezvousHTTPServer((address, 0), RendezvousHandler, 0)
    server.daemon_threads = True
    server.init(plan)
    listening = threading.Thread(target=server.serve_forever, daemon=True)
    listening.start()
    try:
        yield [
            {
                "HOROVOD_GLOO_RENDEZVOUS_PORT": str(server.server_port),
                "HOROVOD_CONTROLLER": "gloo",
                "HOROVOD_CPU_OPERATIONS": "gloo",
                "HOROVOD_HOSTNAME": slot.hostname,
                "HOROVOD_RANK": str(slot.rank),
                "HOROVOD_SIZE": str(slot.size),
                "HOROVOD_LOCAL_RANK": str(slot.local_rank),
                "HOROVOD_LOCAL_SIZE": str(slot.local_size),
                "HOROVOD_CROSS_RANK": str(slot.cross_rank),
                "HOROVOD_CROSS_SIZE": str(slot.cross_size),
            }
            for slot in plan
        ]
    finally:
        server.shutdown()
        server.server_close()
        listening.join()
