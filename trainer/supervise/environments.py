"""What ranks find in their environment, as horovodrun or torchrun would put it there, so that they find each other."""

import importlib
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from trainer.supervise.policy import Slots

Variables = dict[str, str]
LOOPBACK = "127.0.0.1"


class By(StrEnum):
    """What carries the collectives."""

    HOROVOD = "horovod"
    TORCH = "torch"


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


def load(by: By) -> None:
    """Import what `environments` needs; with torch behind it, that takes seconds."""
    if by == By.HOROVOD:
        importlib.import_module("trainer.comm.rendezvous")


@contextmanager
def environments(by: By, hosts: Sequence[Slots], reach: Mapping[str, Reach]) -> Iterator[list[Variables]]:
    """Yield the variables of each rank; what they meet at is there until the block ends. One rank alone needs none."""
    if sum(each.count for each in hosts) == 1:
        yield [{}]
    elif by == By.TORCH:
        yield _as_torchrun(hosts, reach)
    else:
        heads = {each.head for each in reach.values()}
        with _rendezvous(hosts, heads.pop() if len(heads) == 1 else "") as port:
            yield _as_horovodrun(hosts, reach, port)


def _as_horovodrun(hosts: Sequence[Slots], reach: Mapping[str, Reach], port: int) -> list[Variables]:
    """`cross` counts the ranks of the same local number."""
    variables: list[Variables] = []
    for each in hosts:
        for local in range(each.count):
            peers = [host.host for host in hosts if host.count > local]
            variables.append(
                {
                    "HOROVOD_RANK": str(len(variables)),
                    "HOROVOD_SIZE": str(sum(host.count for host in hosts)),
                    "HOROVOD_LOCAL_RANK": str(local),
                    "HOROVOD_LOCAL_SIZE": str(each.count),
                    "HOROVOD_CROSS_RANK": str(peers.index(each.host)),
                    "HOROVOD_CROSS_SIZE": str(len(peers)),
                    "HOROVOD_HOSTNAME": each.host,
                    "HOROVOD_CONTROLLER": "gloo",
                    "HOROVOD_CPU_OPERATIONS": "gloo",
                    "HOROVOD_GLOO_RENDEZVOUS_ADDR": reach[each.host].head,
                    "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
                    **_interface("HOROVOD_GLOO_IFACE", reach[each.host]),
                }
            )
    return variables


def _as_torchrun(hosts: Sequence[Slots], reach: Mapping[str, Reach]) -> list[Variables]:
    """Rank 0 listens where the others meet."""
    port = _free_port()
    places = [(node, local) for node, each in enumerate(hosts) for local in range(each.count)]
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(hosts[node].count),
            "GROUP_RANK": str(node),
            "MASTER_ADDR": reach[hosts[0].host].own,
            "MASTER_PORT": str(port),
            **_interface("GLOO_SOCKET_IFNAME", reach[hosts[node].host]),
        }
        for rank, (node, local) in enumerate(places)
    ]


def _interface(variable: str, reach: Reach) -> Variables:
    return {variable: reach.interface, "NCCL_SOCKET_IFNAME": reach.interface} if reach.interface else {}


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("", 0))
        return int(bound.getsockname()[1])


@contextmanager
def _rendezvous(hosts: Sequence[Slots], address: str) -> Iterator[int]:
    """Serve Horovod's rendezvous at `address` ("": all of this machine) and yield its port."""
    from trainer.comm.rendezvous import rendezvous_server

    server = rendezvous_server([each.host for each in hosts], [each.count for each in hosts], address)
    listening = threading.Thread(target=server.serve_forever, daemon=True)
    listening.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        listening.join()
