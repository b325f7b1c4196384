"""Two ranks, each in a network namespace of its own and on a core of its own, joined by a link of a given speed.

They are two hosts of one core, as near as one machine comes to it; needs root and iproute2. horovodrun starts the
second rank by ssh; the script that it finds under this name enters the namespace instead.
"""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HOSTS = ("10.198.51.1", "10.198.51.2")
_DEVICE = "bench0"  # the same name on both sides: horovodrun takes one for all ranks
_OWN_FILES = Path("/etc/netns")  # `ip netns exec` puts the files of NAME here in the place of those in /etc
_SSH = """#!/bin/sh
# ssh [options] HOST [options] COMMAND: runs COMMAND in the namespace that stands for HOST.
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
  *) echo "no namespace stands for $host" >&2; exit 255 ;;
esac
"""


class LinkError(Exception):
    """This machine cannot join namespaces by a link; the text says why."""


@dataclass(frozen=True)
class Link:
    """How to start two ranks over the link, one in each namespace."""

    prefix: list[str]
    environment: dict[str, str]


@contextlib.contextmanager
def link(folder: Path, rate: str = "1gbit") -> Iterator[Link]:
    """The link, gone behind the block. `rate`: as tc writes it. Raises LinkError where the machine cannot."""
    _check_able()
    names = tuple(f"cm-bench-{os.getpid()}-{side}" for side in "ab")
    enter = [
        ["taskset", "-c", str(core), "ip", "netns", "exec", name] for core, name in zip(_cores(), names, strict=True)
    ]
    script = folder / "ssh"
    script.write_text(_SSH.format(host=_HOSTS[1], enter=shlex.join(enter[1])))
    script.chmod(0o755)
    before = signal.signal(signal.SIGTERM, _stop)  # namespaces outlive a process that does not remove them
    try:
        _join(names, rate)
        horovodrun = str(Path(sys.executable).with_name("horovodrun"))
        hosts = ",".join(f"{host}:1" for host in _HOSTS)
        launcher = [horovodrun, "-np", "2", "-H", hosts, "--network-interfaces", _DEVICE]
        # Horovod adds the loopback device to those it was given, and then takes any one of them.
        each_rank = ["env", f"HOROVOD_GLOO_IFACE={_DEVICE}"]
        yield Link(
            [*enter[0], *launcher, *each_rank],
            {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        )
    finally:
        for name in names:  # what is in a namespace goes with it
            shutil.rmtree(_OWN_FILES / name, ignore_errors=True)
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        script.unlink()
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _cores() -> tuple[int, int]:
    """One for each side, among those that this process may use; the same one where there is no other."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[-1]


def _check_able() -> None:
    missing = [tool for tool in ("ip", "tc", "taskset") if shutil.which(tool) is None]
    if missing:
        raise LinkError(f"{' and '.join(missing)} not found; install iproute2 and util-linux")
    if os.geteuid() != 0:
        raise LinkError("network namespaces need root")


def _join(names: tuple[str, ...], rate: str) -> None:
    for name, host in zip(names, _HOSTS, strict=True):
        # Horovod's process sets listen where this host's name leads to: over the link, then, and not to loopback.
        (_OWN_FILES / name).mkdir(parents=True)
        (_OWN_FILES / name / "hosts").write_text(f"127.0.0.1 localhost\n{host} {socket.gethostname()}\n")
        _ip("netns", "add", name)
    _ip("link", "add", _DEVICE, "netns", names[0], "type", "veth", "peer", "name", _DEVICE, "netns", names[1])
    for name, host in zip(names, _HOSTS, strict=True):
        _ip("-n", name, "address", "add", f"{host}/24", "dev", _DEVICE)
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "set", _DEVICE, "up")
        shape = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
        _tool("tc", "-n", name, "qdisc", "add", "dev", _DEVICE, "root", *shape)


def _ip(*arguments: str) -> None:
    _tool("ip", *arguments)


def _tool(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LinkError(f"{' '.join(command)}: {done.stderr.strip()}")
