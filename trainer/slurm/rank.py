"""One rank: srun starts this program on the nodes; it finds its place among the ranks and becomes the command.

Arguments: horovod or torch, the port of the rendezvous, the ranks of each node (2,2,1), then the command. Quick to
import: every rank begins here.
"""

import fcntl
import os
import socket
import struct
import sys
from collections.abc import Mapping, Sequence

_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface
_DISCARD = 9


def main() -> None:
    """Set the variables of this rank and run the command in this process's place."""
    way, port, ranks, *command = sys.argv[1:]
    ranks_of_node = [int(count) for count in ranks.split(",")]
    head = os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    make = horovod_variables if way == "horovod" else torch_variables
    own = make(os.environ, head, port, ranks_of_node, interface_towards(head))
    try:
        os.execvpe(command[0], command, {**os.environ, **own})
    except OSError as error:
        sys.exit(f"error: {command[0]} cannot be run on {os.environ['SLURMD_NODENAME']}: {error.strerror}")


def horovod_variables(
    slurm: Mapping[str, str], head: str, port: str, ranks_of_node: Sequence[int], interface: str
) -> dict[str, str]:
    """Return what horovodrun would set for this rank; `cross` counts those of the same local number."""
    local, node = int(slurm["SLURM_LOCALID"]), int(slurm["SLURM_NODEID"])
    peers = [number for number, count in enumerate(ranks_of_node) if count > local]
    return {
        "HOROVOD_RANK": slurm["SLURM_PROCID"],
        "HOROVOD_SIZE": str(sum(ranks_of_node)),
        "HOROVOD_LOCAL_RANK": str(local),
        "HOROVOD_LOCAL_SIZE": str(ranks_of_node[node]),
        "HOROVOD_CROSS_RANK": str(peers.index(node)),
        "HOROVOD_CROSS_SIZE": str(len(peers)),
        "HOROVOD_HOSTNAME": slurm["SLURMD_NODENAME"],
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": head,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": port,
        "HOROVOD_GLOO_IFACE": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }


def torch_variables(
    slurm: Mapping[str, str], head: str, port: str, ranks_of_node: Sequence[int], interface: str
) -> dict[str, str]:
    """Return what torchrun would set for this rank; rank 0 listens on `port` of `head`."""
    node = int(slurm["SLURM_NODEID"])
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": str(sum(ranks_of_node)),
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(ranks_of_node[node]),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": head,
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }


def interface_towards(address: str) -> str:
    """Name the network interface by which this host reaches an address: eth0, or lo for one of its own.

    Without it, Gloo takes the address of the host's name, which on many systems is a loopback one.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, _DISCARD))  # nothing is sent: the kernel chooses the way
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                asked = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(asked[20:24]) == own:
                return name
    return "lo"


if __name__ == "__main__":
    main()
