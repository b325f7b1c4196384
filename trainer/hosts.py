"""Hosts: their names and slots, links to their agents, and what ranks on them find each other by."""

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.launch import By, Slots, Variables, meeting, variables_of

AGENT = Path(__file__).with_name("agent.py")
CONNECT_S = 10
_HOST = re.compile(r"(?P<name>[\w.@-]+)(?::(?P<count>\d+))?")


def parse_hosts(text: str) -> Slots:
    """Read hosts written as a:4,b:4; one without a number has one slot. Raises ConfigError."""
    found: dict[str, int] = {}
    for each in map(str.strip, text.split(",")):
        match = _HOST.fullmatch(each)
        count = int(match["count"] or 1) if match else 0
        if match is None or count == 0 or match["name"].startswith("-"):
            raise ConfigError(f"--hosts: '{each}' is not a host; write it as name:slots, as a:4")
        if match["name"] in found:
            raise ConfigError(f"--hosts: host {match['name']} is there twice; add its slots")
        found[match["name"]] = count
    return found


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


def agent_command(host: str, ssh: Sequence[str], lease_s: float, *, here: bool) -> list[str]:
    """Make the command line that starts the agent on a host; on another one, the same Python and path are there too."""
    agent = [sys.executable, "-P", str(AGENT), f"{lease_s:g}"]  # -P: no module of this folder is in its way
    if here:
        return [*agent, "--local"]
    return [*ssh, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", host, f"exec {shlex.join(agent)}"]


_LONGEST_LINE = 2**20
_START_S = 60.0
"""For Python to start on a busy host."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


@dataclass(frozen=True)
class News:
    """What came from a host: an answer of its agent, or {"is": "lost", "why": ...}."""

    host: str
    what: dict[str, Any]


class Link:
    """One host, connected to until it is closed. `hello`: what its agent said first; None while it cannot be used."""

    def __init__(self, host: str, ssh: Sequence[str], lease_s: float, news: "asyncio.Queue[News]") -> None:
        self.host, self.is_here = host, is_here(host)
        self.hello: dict[str, Any] | None = None
        self.trouble: str | None = None
        """Why the host could not be reached the last time."""
        self._command = agent_command(host, ssh, lease_s, here=self.is_here)
        self._lease_s, self._news = lease_s, news
        self._process: asyncio.subprocess.Process | None = None
        self._leased_until = 0.0
        """Time, by this machine's clock, until which ranks may be alive on an unreachable host."""
        self.keeper = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        """Connect for ever, again whenever the connection is lost, with growing pauses."""
        pause_s = _FIRST_PAUSE_S
        while True:
            came = await self._connection()
            await asyncio.sleep(max(self._leased_until - time.monotonic(), 0))
            pause_s = _FIRST_PAUSE_S if came else min(2 * pause_s, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)

    @property
    def may_have_ranks(self) -> bool:
        """Whether the host is unreachable and ranks of the last connection may still be alive."""
        return self.hello is None and time.monotonic() < self._leased_until

    async def close(self) -> None:
        """End the agent and its ranks; return when it is gone or unreachable."""
        if self.hello is not None and self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await self._process.wait()
        self.keeper.cancel()
        await asyncio.gather(self.keeper, return_exceptions=True)

    def send(self, what: dict[str, Any]) -> None:
        """Ask the agent for something; a lost one hears nothing."""
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(what).encode() + b"\n")

    def drop(self, why: str) -> None:
        """Drop the connection: its agent ends all ranks when it notices, at the latest after a lease."""
        self.trouble = why
        if self._process is not None and self._process.returncode is None:
            # Not Process.kill: it looks first whether the process has ended, and takes the exit code from asyncio.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def _connection(self) -> bool:
        """Live through one connection; return whether the agent ever answered."""
        pipe = asyncio.subprocess.PIPE
        with tempfile.TemporaryFile() as errors:
            try:
                self._process = process = await asyncio.create_subprocess_exec(
                    *self._command, stdin=pipe, stdout=pipe, stderr=errors, limit=_LONGEST_LINE, start_new_session=True
                )
            except OSError as failure:
                self.trouble = f"{self._command[0]} cannot be started: {failure.strerror}"
                return False
            self.trouble = None
            try:
                await self._listen()
                with contextlib.suppress(TimeoutError):  # it has an exit code of its own in a moment
                    async with asyncio.timeout(1):
                        await process.wait()
            finally:
                self.drop(self.trouble or "")
                came, self.hello = self.hello is not None, None
            code = await process.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().rpartition("\n")[2].strip()
        self.trouble = self.trouble or said or f"its agent ended ({code})"
        if self.is_here:  # stdout has ended: neither the agent nor any of its ranks is left
            self._leased_until = 0.0
        if came:
            self._news.put_nowait(News(self.host, {"is": "lost", "why": self.trouble}))
        return came

    async def _listen(self) -> None:
        """Take in what the agent says until its end; one that says nothing for half of its lease is dropped."""
        assert self._process is not None and self._process.stdout is not None
        patience_s: float | None = CONNECT_S + _START_S
        while True:
            try:
                async with asyncio.timeout(patience_s):  # wait_for loses a cancellation that comes with a line
                    line = await self._process.stdout.readline()
            except TimeoutError:
                self.drop("it has not answered in time")
                patience_s = None  # the ranks of this machine hold its stdout open until they are gone
                continue
            if not line:
                return
            try:
                what = json.loads(line)
            except ValueError:
                what = None
            if not isinstance(what, dict):  # what a shell says when somebody logs in
                continue
            patience_s = self._lease_s / 2
            if what["is"] == "beat":
                self._leased_until = time.monotonic() + 1.05 * self._lease_s
                self.send({"do": "beat", "sent_s": what["sent_s"]})
                continue
            if what["is"] == "here":
                self.hello = what
            self._news.put_nowait(News(self.host, what))


LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Reach:
    """Addresses of one host: `own`, by which others reach it, and `head`, by which it reaches the supervisor."""

    own: str
    head: str


def reach_of_all(links: Sequence[Link]) -> dict[str, Reach]:
    """Return the addresses of hosts that answer, by their names: what sshd says there of both ends of a connection.

    Other hosts reach this machine by the address from which it has reached one of them.
    """
    ssh = {each.host: None if each.is_here else each.hello.get("ssh") for each in links if each.hello}
    head = next((both.split()[0] for both in ssh.values() if both), LOOPBACK)
    ends = {host: (both or f"{head} 0 {head} 0").split() for host, both in ssh.items()}
    return {host: Reach(own, client) for host, (client, _, own, _) in ends.items()}


@contextlib.contextmanager
def environments(by: By, slots: Slots, reach: Mapping[str, Reach]) -> Iterator[list[Variables]]:
    """Yield the variables of each rank; what they meet at is there until the block ends. One rank alone needs none."""
    if sum(slots.values()) == 1:
        yield [{}]
        return
    heads, first = {each.head for each in reach.values()}, reach[next(iter(slots))].own
    with meeting(by, slots, heads.pop() if len(heads) == 1 else "") as port:
        yield [
            variables_of(by, slots, host, local, first if by == By.TORCH else reach[host].head, port)
            for host, count in slots.items()
            for local in range(count)
        ]
