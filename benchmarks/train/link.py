"""Two ranks, each on a host of its own and on a core of its own, joined by a link of a given speed.

Hosts are those of the tests (`tests/cluster/hosts.py`): network namespaces, as near to two machines as one comes; they
need root and iproute2. horovodrun starts the second rank by ssh; the script that it finds under this name enters the
other host's network instead, so no sshd is needed.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

_DEVICE = "eth0"
_SSH = """#!/bin/sh
# ssh [options] HOST [options] COMMAND: runs COMMAND in the network of HOST.
host=
while [ $# -gt 0 ]; do
  case "$1" in
    -o | -p | -i | -l) shift 2 ;;
    -*) shift ;;
    *) [ -z "$host" ] || break; host=$1; shift ;;
  esac
done
case "$host" in
  {host}) exec {enter} sh -c "$*" ;;
  *) echo "there is no host $host" >&2; exit 255 ;;
esac
"""


class LinkError(Exception):
    """This machine cannot join namespaces by a link; the text says why."""


@dataclass(frozen=True)
class Link:
    """How to start two ranks over the link, one on each host."""

    prefix: list[str]
    environment: dict[str, str]


@contextlib.contextmanager
def link(folder: Path, rate: str = "1gbit") -> Iterator[Link]:
    """Make the link; it is gone after the block, or with this process. `rate`: as tc writes it.

    Raises LinkError where the machine has no namespaces.
    """
    from tests.cluster.hosts import lacking, network

    if missing := lacking():
        raise LinkError(f"hosts of one machine need {missing}")
    with TemporaryDirectory(dir=folder) as files, network(Path(files), ["a", "b"], rate, ssh=False) as net:
        here, there = net["a"], net["b"]
        script = Path(files) / "ssh"
        script.write_text(_SSH.format(host=there.address, enter=shlex.join(there.command_here())))
        script.chmod(0o755)
        horovodrun = str(Path(sys.executable).with_name("horovodrun"))
        launcher = [
            horovodrun,
            "-np",
            "2",
            "-H",
            f"{here.address}:1,{there.address}:1",
            "--network-interfaces",
            _DEVICE,
        ]
        # Horovod adds the loopback device to those it was given, and then takes any one of them.
        each_rank = ["env", f"HOROVOD_GLOO_IFACE={_DEVICE}"]
        search = f"{script.parent}:{os.environ['PATH']}"
        yield Link(here.command_here(*launcher, *each_rank), {**os.environ, "PATH": search})
