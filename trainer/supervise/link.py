"""The supervisor's side of one host: its agent is started, heard, and started again as long as the host is wanted."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.supervise.hosts import CONNECT_S, agent_command, is_here

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
    """One host. `hello`: what its agent said first; None while the host cannot be used."""

    def __init__(self, host: str, ssh: Sequence[str], lease_s: float, news: "asyncio.Queue[News]") -> None:
        self.host, self.is_here = host, is_here(host)
        self.hello: dict[str, Any] | None = None
        self.trouble: str | None = None
        """Why the host could not be reached the last time."""
        self._command = agent_command(host, ssh, lease_s, here=self.is_here)
        self._lease_s, self._news = lease_s, news
        self._process: asyncio.subprocess.Process | None = None
        self._heard_s = 0.0
        self._leased_until = 0.0
        """Until then, by this machine's clock, ranks may live on a host that is out of reach."""

    async def keep(self) -> None:
        """Connect for ever, again whenever the connection is lost, with growing pauses."""
        pause_s = _FIRST_PAUSE_S
        while True:
            came = await self._connection()
            await asyncio.sleep(max(self._leased_until - time.monotonic(), 0))
            pause_s = _FIRST_PAUSE_S if came else min(2 * pause_s, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)

    @property
    def may_have_ranks(self) -> bool:
        """Whether the host is out of reach, and ranks of the last connection may not have ended yet."""
        return self.hello is None and time.monotonic() < self._leased_until

    async def close(self) -> None:
        """End the agent, and with it its ranks; returns when it is gone, or cannot be reached."""
        if self._process is not None and self._process.stdin is not None and self._process.returncode is None:
            self._process.stdin.close()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), 5)
        self.drop("closed")

    def send(self, what: dict[str, Any]) -> None:
        """Ask the agent for something; a lost one hears nothing."""
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(what).encode() + b"\n")

    def drop(self, why: str) -> None:
        """Give the connection up: its agent ends all ranks when it notices, a lease later at the latest."""
        self.trouble = why
        if self._process is not None and self._process.returncode is None:
            # Not Process.kill: it looks first whether the process has ended, and takes the exit code from asyncio.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def _connection(self) -> bool:
        """Live through one connection; return whether the agent ever answered."""
        pipe = asyncio.subprocess.PIPE
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *self._command, stdin=pipe, stdout=pipe, stderr=pipe, limit=_LONGEST_LINE, start_new_session=True
            )
        except OSError as failure:
            self.trouble = f"{self._command[0]} cannot be started: {failure.strerror}"
            return False
        self._heard_s = time.monotonic() + CONNECT_S + _START_S
        self.trouble = None
        watcher, said = asyncio.create_task(self._watch()), asyncio.create_task(self._errors())
        try:
            await self._listen()
            with contextlib.suppress(asyncio.TimeoutError):  # it has an exit code of its own in a moment
                await asyncio.wait_for(process.wait(), 1)
        finally:
            watcher.cancel()
            self.drop(self.trouble or "")
            came, self.hello = self.hello is not None, None
        code = await process.wait()
        with contextlib.suppress(asyncio.TimeoutError):
            self.trouble = self.trouble or await asyncio.wait_for(said, 1) or f"its agent ended ({code})"
        if self.is_here:  # stdout has ended: neither the agent nor any of its ranks is left
            self._leased_until = 0.0
        if came:
            self._news.put_nowait(News(self.host, {"is": "lost", "why": self.trouble}))
        return came

    async def _listen(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        while line := await self._process.stdout.readline():
            what = _read(line)
            if what is None:  # what a shell says when somebody logs in
                continue
            self._heard_s = time.monotonic()
            if what["is"] == "beat":
                self._leased_until = time.monotonic() + 1.05 * self._lease_s
                self.send({"do": "beat", "sent_s": what["sent_s"]})
                continue
            if what["is"] == "here":
                self.hello = what
            self._news.put_nowait(News(self.host, what))

    async def _watch(self) -> None:
        """Drop an agent that says nothing for half of its lease."""
        while time.monotonic() < self._heard_s + self._lease_s / 2:
            await asyncio.sleep(self._lease_s / 10)
        self.drop("it has not answered in time")

    async def _errors(self) -> str:
        """Return the last line that ssh, or the agent, has written on stderr."""
        assert self._process is not None and self._process.stderr is not None
        last = ""
        async for line in self._process.stderr:
            last = line.decode(errors="replace").strip() or last
        return last


def _read(line: bytes) -> dict[str, Any] | None:
    """Return an answer of an agent; None where it is none."""
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None
