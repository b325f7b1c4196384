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

from trainer.launch import By, Place, Variables, horovod_variables, torch_variables

_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface
_DISCARD = 9


def main() -> None:
    """Set the variables of this rank and run the command in this process's place."""
    way, port, ranks, *command = sys.argv[1:]
    head = os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    own = variables_of(By(way), os.environ, head, int(port), [int(count) for count in ranks.split(",")])
    try:
        os.execvpe(command[0], command, {**os.environ, **own})
    except OSError as error:
        sys.exit(f"error: {command[0]} cannot be run on {os.environ['SLURMD_NODENAME']}: {error.strerror}")


def variables_of(by: By, slurm: Mapping[str, str], head: str, port: int, ranks_of_node: Sequence[int]) -> Variables:
    """Return what the launcher of Horovod or torch would set for this rank; all meet on `port` of `head`."""
    place = Place(ranks_of_node, int(slurm["SLURM_NODEID"]), int(slurm["SLURM_LOCALID"]))
    interface = interface_towards(head)
    if by == By.TORCH:
        return torch_variables(place, head, port, interface)
    return horovod_variables(place, slurm["SLURMD_NODENAME"], head, port, interface)


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
