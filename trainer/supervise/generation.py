"""One generation: all ranks started together, watched, and ended for certain before the next one begins."""

import asyncio
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featurestore.console.commandline import OK, STOPPED
from trainer.launch.variables import Variables
from trainer.supervise.link import Link, News
from trainer.supervise.policy import HostSlots, RankEnd
from trainer.supervise.report import LastWords, Printer

DEATH_GRACE_S, FAILURE_GRACE_S, END_GRACE_S = 3.0, 5.0, 60.0
"""How long other ranks may live on after one has died, has failed (others may have more to say), has ended well."""
NUMBER = "SUPERVISE_GENERATION"
_KILL_S = 20.0
"""After SIGKILL; a host that does not say by then that its ranks are gone is given up."""
_OWN = ("SSH_", "XDG_", "DBUS_", "HOME", "HOSTNAME", "LOGNAME", "OLDPWD", "PWD", "SHELL", "SHLVL", "TMPDIR", "USER")
"""Variables, or beginnings of them, that are a host's own."""


class Generation:
    """Ranks of one start. `ends`: how they ended, in that order."""

    def __init__(
        self, hosts: Sequence[HostSlots], links: Mapping[str, Link], news: "asyncio.Queue[News]", printer: Printer
    ) -> None:
        names = [each.host for each in hosts for _ in range(each.count)]
        self._host_of = dict(enumerate(names))
        self._links, self._news = {name: links[name] for name in names}, news
        self._printer = printer
        self._alive = set(self._host_of)
        self._killed: set[int] = set()
        self._last: dict[int, LastWords] = defaultdict(LastWords)
        self._kill_at = float("inf")
        self.ends: list[RankEnd] = []
        self.started_s = time.monotonic()

    def start(self, command: Sequence[str], environments: Sequence[Variables], number: int) -> None:
        """Let the agents start the ranks, which find the `number` of the generation in their environment."""
        shared = {**inherited(os.environ), "PYTHONUNBUFFERED": "1", NUMBER: str(number)}
        for host, link in self._links.items():
            ranks = [rank for rank, name in self._host_of.items() if name == host]
            link.send(
                {
                    "do": "start",
                    "command": list(command),
                    "folder": str(Path.cwd()),
                    "environment": shared,
                    "ranks": [{"rank": rank, "environment": environments[rank]} for rank in ranks],
                }
            )

    def stop(self, grace_s: float) -> None:
        """Ask all ranks to write a checkpoint and end; those that have not after `grace_s` are killed."""
        self._signal(signal.SIGTERM)
        self._kill_at = min(self._kill_at, time.monotonic() + grace_s)

    @property
    def is_over(self) -> bool:
        return not self._alive

    async def next_news(self, most_s: float) -> None:
        """Wait for news, at most so long, and take it in; kill ranks whose time is up."""
        wait_s = min(most_s, max(self._kill_at - time.monotonic(), 0))
        try:
            self._take(await asyncio.wait_for(self._news.get(), wait_s))
        except TimeoutError:
            if time.monotonic() >= self._kill_at:
                self._kill()

    def _take(self, news: News) -> None:
        kind = news.what["is"]
        if kind == "lost" and news.host in self._links:
            for rank in sorted(each for each in self._alive if self._host_of[each] == news.host):
                self._end(rank, None, news.what["why"])
        elif kind in ("line", "end") and self._host_of.get(news.what["rank"]) == news.host:
            if kind == "line":
                self._show(news.what)
            elif news.what["rank"] in self._alive:
                self._end(news.what["rank"], news.what["code"], self._last[news.what["rank"]].text or None)

    def _end(self, rank: int, code: int | None, error: str | None) -> None:
        self._alive.discard(rank)
        end = RankEnd(rank=rank, host=self._host_of[rank], code=code, error=error, was_killed=rank in self._killed)
        self.ends.append(end)
        grace_s = END_GRACE_S if code in (OK, STOPPED) else FAILURE_GRACE_S if end.gave_up else DEATH_GRACE_S
        self._kill_at = min(self._kill_at, time.monotonic() + grace_s)

    def _kill(self) -> None:
        """Kill what is alive; the second time, give up the hosts that have not said that it is gone."""
        if self._killed:
            for host in {self._host_of[rank] for rank in self._alive}:
                self._links[host].drop("its ranks did not end by SIGKILL")
        self._killed |= self._alive
        self._signal(signal.SIGKILL)
        self._kill_at = time.monotonic() + _KILL_S

    def _signal(self, number: int) -> None:
        for link in self._links.values():
            link.send({"do": "signal", "number": number})

    def _show(self, line: Mapping[str, Any]) -> None:
        """Print a line of a rank: that of rank 0 as it is."""
        rank, text = line["rank"], line["text"]
        if line["stream"] == "err":
            self._last[rank].add(text)
        stream = sys.stderr if line["stream"] == "err" else sys.stdout
        self._printer.line(stream, text if rank == 0 else f"[rank {rank}] {text}")


def inherited(environment: Mapping[str, str]) -> Variables:
    """Return the variables of this process that ranks on any host get."""
    return {name: value for name, value in environment.items() if not name.startswith(_OWN)}
