"""What ranks find in their environment, as horovodrun or torchrun would put it there, so that they find each other."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from trainer.launch.rendezvous import free_port, horovod_rendezvous
from trainer.launch.variables import By, Place, Variables, horovod_variables, torch_variables
from trainer.supervise.policy import HostSlots

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
def environments(by: By, hosts: Sequence[HostSlots], reach: Mapping[str, Reach]) -> Iterator[list[Variables]]:
    """Yield the variables of each rank; what they meet at is there until the block ends. One rank alone needs none."""
    counts = [each.count for each in hosts]
    places = [Place(counts, node, local) for node, count in enumerate(counts) for local in range(count)]
    at = [reach[each.host] for each in hosts]
    if len(places) == 1:
        yield [{}]
    elif by == By.TORCH:
        port = free_port()
        yield [torch_variables(each, at[0].own, port, at[each.node].interface) for each in places]
    else:
        names, heads = [each.host for each in hosts], {each.head for each in reach.values()}
        with horovod_rendezvous(names, counts, heads.pop() if len(heads) == 1 else "") as port:
            yield [
                horovod_variables(each, names[each.node], at[each.node].head, port, at[each.node].interface)
                for each in places
            ]
