"""The supervisor: generations of ranks, restarts, and the report."""

import asyncio
import contextlib
import os
import queue
import random
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from featurestore.console.commandline import OK, STOPPED
from featurestore.errors import FAILED, USAGE, UserError
from featurestore.text import count_text, printable
from trainer.launch import By, Variables
from trainer.supervise import policy
from trainer.supervise.hosts import Link, News, TrainCommand, environments, reach_of
from trainer.supervise.policy import HostSlots, Past, RankEnd

_LAST_LINES_S = 10.0
_ERROR, _LONG = "error: ", 500


class Printer:
    """Prints in a thread: a terminal that has been stopped must not keep the supervisor from its hosts."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[tuple[TextIO, str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._print, daemon=True)
        self._thread.start()

    def line(self, stream: TextIO, text: str) -> None:
        """Print a line, soon."""
        self._lines.put((stream, f"{text}\n"))

    def say(self, text: str) -> None:
        """Print a line of the supervisor's own."""
        self.line(sys.stderr, f"supervise: {printable(text)}")

    def close(self) -> None:
        """Wait until all is printed, but not for ever."""
        self._lines.put(None)
        self._thread.join(_LAST_LINES_S)

    def _print(self) -> None:
        while (line := self._lines.get()) is not None:
            stream, text = line
            with contextlib.suppress(OSError):  # nobody reads any more
                stream.write(text)
                stream.flush()


class LastWords:
    """What a rank said last on stderr, in one line: its last error with the lines indented below it, else any line."""

    def __init__(self) -> None:
        self.text = ""
        self._goes_on = False

    def add(self, line: str) -> None:
        """Take in the next line of stderr."""
        is_error = line.startswith(_ERROR)
        if self._goes_on and line.startswith("  ") and len(self.text) < _LONG:
            self.text += f"{' ' if self.text.endswith(':') else '; '}{line.strip()}"
        elif is_error or (line.strip() and not self.text.startswith(_ERROR)):
            self.text = line.strip()
        self._goes_on = is_error or (self._goes_on and line.startswith("  "))


def end_text(end: RankEnd) -> str:
    """Say how a rank ended, e.g. "rank 3 on b died (signal 9)"."""
    who = f"rank {end.rank} on {end.host}"
    if end.code is None:
        return f"{who} is out of reach" + (f" ({end.error})" if end.error else "")
    if end.was_killed:
        return f"{who} did not end by itself and was killed"
    if end.code < 0:
        why = f": {end.error}" if end.gave_up and end.error else ""
        return f"{who} died (signal {-end.code}{_name(-end.code)}{why})"
    return f"{who} ended with exit code {end.code}" + (f" ({end.error})" if end.error else "")


def _name(number: int) -> str:
    return f", {signal.Signals(number).name}" if number in set(signal.Signals) else ""


def past_text(past: Past) -> str:
    """Say why a generation ended: the end of its culprit, and what the first other rank said of it, or any rank."""
    if past.asked and past.first is None:
        return "stopped after a checkpoint, to continue with more hosts"
    ends = [past.culprit or past.ends[0]]
    if past.first and past.first is not past.culprit:
        ends.append(past.first)
    if (ends[0].code or 0) > 0 and not any(each.error for each in ends):  # rank 0 has the word, and may end later
        ends += [each for each in past.ends if each.error and each.error.startswith(_ERROR)][:1]
    return "; ".join(map(end_text, ends))


def start_text(step: int, hosts: Sequence[HostSlots], slots_left: int, slots: int) -> str:
    """Say with what the next generation begins."""
    ranks = sum(each.count for each in hosts)
    where = ", ".join(f"{each.host}:{each.count}" for each in hosts)
    begin = f"resuming at step {step:,}" if step else "starting at the first step"
    return f"{slots_left} of {slots} slots left; {begin} on {ranks} rank{'s' * (ranks != 1)} ({where})"


_SETTLE_S = 3.0
"""After enough hosts are there, for the others to come too."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person may say of a supervision."""

    min_ranks: int
    max_ranks: int
    by: By
    ssh: tuple[str, ...]
    most_fruitless: int
    backoff_s: float
    most_backoff_s: float
    rejoin_after_s: float
    wait_for_hosts_s: float
    stop_grace_s: float
    lease_s: float
    look_s: float
    """Between two readings of the hosts."""


class StopRequest:
    """What signals ask for: the first one that the training stops, a second one that it does so at once."""

    def __init__(self, say: Callable[[str], None], grace_s: float) -> None:
        """`say` gets a line for each of the two; `grace_s`: what the ranks have for a checkpoint."""
        self.asked, self.at_once = asyncio.Event(), False
        self._say, self._grace_s = say, grace_s

    def on_signal(self) -> None:
        """Take one more signal."""
        if not self.asked.is_set():
            self._say(
                f"stopping: the ranks may write a checkpoint, for {self._grace_s:g} s (--stop-grace-s); "
                "a second signal ends them at once"
            )
        elif not self.at_once:
            self._say("stopping at once")
        self.at_once = self.asked.is_set()
        self.asked.set()


@dataclass
class Supervisor:
    """All state of a supervision: the hosts' links and the generations that are over."""

    command: TrainCommand
    read_hosts: Callable[[], list[HostSlots]]
    options: Options
    printer: Printer
    past: list[Past] = field(default_factory=list)

    async def run(self) -> int:
        """Train to the end; returns the exit code. Raises UserError where the hosts or checkpoints cannot be read."""
        self._news: asyncio.Queue[News] = asyncio.Queue()
        self._links: dict[str, Link] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._stop = StopRequest(self.printer.say, self.options.stop_grace_s)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_IGN:  # nohup
                continue
            asyncio.get_running_loop().add_signal_handler(number, self._stop.on_signal)
        self._wanted = self.read_hosts()
        self._keep_links()
        looking = asyncio.create_task(self._look_for_hosts())
        try:
            return await self._generations()
        finally:
            looking.cancel()
            await self._close_links()

    async def _generations(self) -> int:
        while True:
            hosts = await self._hosts()
            if hosts is None:
                return self._without_hosts()
            step = await self._newest_step()  # an earlier supervisor's ranks may have written one meanwhile
            self._drain()
            if any(self._links[each.host].hello is None for each in hosts):
                continue  # lost while the checkpoints were looked at
            self.printer.say(start_text(step, hosts, self._slots_left(), self._slots()))
            if any(link.hello is None for link in self._links.values()):
                self.printer.say(f"without {self._troubles()}")
            ends, asked = await self._generation(hosts, step)
            after = await self._newest_step()
            self.past.append(Past(hosts=hosts, step_before=step, step_after=after, ends=tuple(ends), asked=asked))
            code = policy.exit_code(self.past[-1], self._stop.asked.is_set())
            if code is not None:
                self.printer.say(self._last_words(code))
                return code
            self.printer.say(past_text(self.past[-1]))
            if policy.is_over(self.past, self.options.most_fruitless):
                self.printer.say(
                    f"{len(policy.fruitless(self.past))} starts in a row came to no checkpoint after step {after:,}; "
                    "giving up (--max-restarts-without-progress)"
                )
                return FAILED
            pause_s = policy.back_off_s(self.past, self.options.backoff_s, self.options.most_backoff_s, random.random())
            if pause_s >= 1:
                self.printer.say(f"starting again in {pause_s:.0f} s")
            await self._pause(pause_s)

    async def _generation(self, hosts: Sequence[HostSlots], step: int) -> tuple[list[policy.RankEnd], bool]:
        """Run one generation to its end; returns how its ranks ended, and whether it ended to take more hosts."""
        chosen = {each.host: self._links[each.host] for each in hosts}
        hellos = {host: link.hello or {} for host, link in chosen.items()}
        remote = [hello["ssh"] for host, hello in hellos.items() if not chosen[host].is_here and hello.get("ssh")]
        head = remote[0].split()[0] if remote else None
        reach = {
            host: reach_of(None if chosen[host].is_here else hello.get("ssh"), hello.get("interfaces", {}), head)
            for host, hello in hellos.items()
        }
        generation = Generation(hosts, self._links, self._news, self.printer)
        asked = stopping = hurrying = False
        with environments(self.options.by, hosts, reach) as variables:
            generation.start(self.command.start(), variables, len(self.past))
            while not generation.is_over:
                await generation.next_news(1.0)
                if not stopping and (self._stop.asked.is_set() or self._may_grow(hosts, generation.started_s)):
                    asked, stopping = not self._stop.asked.is_set(), True
                    generation.stop(self.options.stop_grace_s)
                if self._stop.at_once and not hurrying:
                    hurrying = True
                    generation.stop(0)
        return generation.ends, asked

    def _may_grow(self, hosts: Sequence[HostSlots], started_s: float) -> bool:
        """Return whether more ranks could run than do, and the last start was long enough ago."""
        if time.monotonic() - started_s < self.options.rejoin_after_s:
            return False
        possible = policy.place(self._available(), self.options.min_ranks, self.options.max_ranks)
        count, now = sum(each.count for each in possible or ()), sum(each.count for each in hosts)
        if count > now:
            self.printer.say(f"{count} slots are there and {now} in use: a checkpoint, and on with all of them")
        return count > now

    async def _hosts(self) -> tuple[HostSlots, ...] | None:
        """Wait until enough hosts are there; None where a person stopped that, or it took too long."""
        end_s = time.monotonic() + self.options.wait_for_hosts_s
        settled_s: float | None = None
        is_reported = False
        while time.monotonic() < end_s and not self._stop.asked.is_set():
            self._drain()
            if not any(link.may_have_ranks for link in self._links.values()):
                chosen = policy.place(self._available(), self.options.min_ranks, self.options.max_ranks)
                everything = sum(each.count for each in self._wanted)
                if chosen is not None:
                    settled_s = settled_s or time.monotonic() + _SETTLE_S
                    whole = sum(each.count for each in chosen) == min(everything, self.options.max_ranks)
                    if whole or time.monotonic() >= settled_s:
                        return chosen
                elif not is_reported and time.monotonic() > end_s - self.options.wait_for_hosts_s + _SETTLE_S:
                    is_reported = True
                    self.printer.say(f"waiting for {count_text(self.options.min_ranks, 'slot')}: {self._troubles()}")
            await self._pause(0.1)
        return None

    def _without_hosts(self) -> int:
        if self._stop.asked.is_set():
            self.printer.say("stopped; the same command continues the run")
            return STOPPED
        self.printer.say(
            f"fewer than --min-np {self.options.min_ranks} slots for {self.options.wait_for_hosts_s:g} s "
            f"(--wait-for-hosts-s): {self._troubles()}; giving up"
        )
        return FAILED

    def _available(self) -> list[HostSlots]:
        up = [each for each in self._wanted if (link := self._links.get(each.host)) and link.hello is not None]
        return policy.trusted(up, self.past, self.options.min_ranks)

    def _slots(self) -> int:
        return min(sum(each.count for each in self._wanted), self.options.max_ranks)

    def _slots_left(self) -> int:
        return min(sum(each.count for each in self._available()), self.options.max_ranks)

    def _troubles(self) -> str:
        away = [link for link in self._links.values() if link.hello is None]
        return "; ".join(f"{link.host}: {link.trouble or 'no answer yet'}" for link in away) or "too few are named"

    def _keep_links(self) -> None:
        for each in self._wanted:
            if each.host not in self._links:
                link = Link(each.host, self.options.ssh, self.options.lease_s, self._news)
                self._links[each.host] = link
                self._keepers[each.host] = asyncio.create_task(link.keep())

    async def _look_for_hosts(self) -> None:
        """Read the hosts again and again; where that fails once, those known before remain."""
        while True:
            await asyncio.sleep(self.options.look_s)
            with contextlib.suppress(UserError):
                self._wanted = await asyncio.to_thread(self.read_hosts)
                self._keep_links()

    async def _close_links(self) -> None:
        for keeper in self._keepers.values():
            keeper.cancel()
        for link in self._links.values():
            await link.close()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)

    def _drain(self) -> None:
        """Forget what hosts said between two generations; what counts then is which of them are there."""
        while not self._news.empty():
            self._news.get_nowait()

    async def _newest_step(self) -> int:
        """Return the step to continue from; while the run's place cannot be read, wait as for hosts."""
        end_s = time.monotonic() + self.options.wait_for_hosts_s
        while True:
            try:
                return await asyncio.to_thread(self.command.newest_step)
            except (UserError, OSError) as failure:
                typed = getattr(failure, "exit_code", FAILED) == USAGE
                if typed or time.monotonic() > end_s or self._stop.asked.is_set():
                    raise
                self.printer.say(f"the checkpoints cannot be looked at: {failure}; trying again")
                await self._pause(self.options.backoff_s)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.asked.wait(), seconds)

    def _last_words(self, code: int) -> str:
        """Say how the supervision ends."""
        last = self.past[-1]
        restarts = len(self.past) - 1
        after = f"after {restarts} restart{'s' * (restarts != 1)}, with step {last.step_after:,}"
        if code == 0:
            return f"done {after}"
        if code == STOPPED:
            return f"stopped {after}; the same command continues the run"
        return f"{past_text(last)}; not started again"


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
