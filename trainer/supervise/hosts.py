"""The hosts that a run may use: named in a list, a file or by a script; here, or reached over ssh."""

import contextlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from featurestore.storage.local import read_text
from featurestore.text import one_line
from trainer.errors import ConfigError
from trainer.supervise.policy import HostSlots

AGENT = Path(__file__).with_name("agent.py")
CONNECT_S = 10
LOOK_S, LOOK_BY_SCRIPT_S = 1.0, 10.0
"""Between two readings of the hosts; a script may ask something that is slow."""
_SCRIPT_S = 60
_HOST = re.compile(r"(?P<name>[\w.@-]+)(?::(?P<count>\d+)|\s+slots\s*=\s*(?P<slots>\d+))?")


def parse_hosts(lines: Sequence[str], source: str) -> list[HostSlots]:
    """Read lines `host`, `host:4` or `host slots=4`; empty ones and comments are left out. Raises ConfigError."""
    found: dict[str, HostSlots] = {}
    for line in lines:
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _HOST.fullmatch(text)
        count = int(match["count"] or match["slots"] or 1) if match else 0
        if match is None or count == 0 or match["name"].startswith("-"):
            raise ConfigError(f"{source}: '{text}' is no host; write it as name:slots, as a:4")
        if match["name"] in found:
            raise ConfigError(f"{source}: host {match['name']} is there twice; add its slots")
        found[match["name"]] = HostSlots(match["name"], count)
    if not found:
        raise ConfigError(f"{source} names no host; write them as a:4,b:4")
    return list(found.values())


def hosts_of(
    hosts: str | None, file: Path | None, script: Path | None, ranks: int | None
) -> Callable[[], list[HostSlots]]:
    """Return the function that reads the hosts anew, from the one source that is given, or from none: this machine."""
    if sum(each is not None for each in (hosts, file, script)) > 1:
        raise ConfigError("give one of --hosts, --hosts-file and --host-discovery-script")
    if file is not None:
        return lambda: parse_hosts(_lines_of(file), f"--hosts-file {file}")
    if script is not None:
        return lambda: parse_hosts(_printed_by(script), f"--host-discovery-script {script}")
    if hosts is None and ranks is None:
        raise ConfigError("--hosts a:4,b:4 says where ranks may run, or --max-np how many run on this machine")
    return lambda: parse_hosts((hosts or f"localhost:{ranks}").split(","), "--hosts")


def _lines_of(file: Path) -> list[str]:
    try:
        return read_text(file).splitlines()
    except (OSError, UnicodeDecodeError) as failure:
        raise ConfigError(f"--hosts-file {file} cannot be read: {failure}") from failure


def _printed_by(script: Path) -> list[str]:
    try:
        done = subprocess.run([script.absolute()], capture_output=True, timeout=_SCRIPT_S, check=False)
    except subprocess.TimeoutExpired as failure:
        raise ConfigError(f"--host-discovery-script {script} did not end within {_SCRIPT_S} s") from failure
    except OSError as failure:
        raise ConfigError(f"--host-discovery-script {script} cannot be started: {one_line(failure)}") from failure
    out, err = (printed.decode(errors="replace") for printed in (done.stdout, done.stderr))
    if done.returncode:
        code = done.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        last = err.strip().rpartition("\n")[2].strip()
        raise ConfigError(f"--host-discovery-script {script} ended with {how}" + (f": {last}" if last else ""))
    return out.splitlines()


def is_here(host: str) -> bool:
    """Return whether a name is one of this machine: a socket may be bound to its address."""
    if host == "localhost":
        return True
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as bound:
                bound.bind(address)
                return True
    return False


def check_ssh(ssh: Sequence[str], hosts: Sequence[HostSlots]) -> None:
    """Raise ConfigError where hosts are elsewhere, and the command that reaches them does not exist."""
    away = next((each.host for each in hosts if not is_here(each.host)), None)
    if away is not None and not (ssh and shutil.which(ssh[0])):
        raise ConfigError(f"--ssh '{shlex.join(ssh)}': there is no such command, and {away} is another machine")


def agent_command(host: str, ssh: Sequence[str], lease_s: float, *, here: bool) -> list[str]:
    """Make the command line that starts the agent on a host; on another one, the same Python and path are there too."""
    agent = [sys.executable, str(AGENT), f"{lease_s:g}"]
    if here:
        return [*agent, "--local"]
    return [*ssh, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", host, f"exec {shlex.join(agent)}"]
