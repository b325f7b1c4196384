"""crossmedia supervise: train a run on several hosts, and start it again by itself when a rank or a host is lost.

A generation is one start of all ranks; it made progress if the run's newest checkpoint is of a later step afterwards.
Pure functions of the past generations decide, and describe, the next action.
"""

import asyncio
import contextlib
import itertools
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.main import get_command

from featurestore.console.commandline import OK, STOPPED, CommandApp, run_app, takes
from featurestore.errors import FAILED, USAGE, UsageError, UserError
from featurestore.published.paths import RunPath, run_path
from featurestore.text import count_text, printable
from trainer.config import load_config
from trainer.daily import app as daily_app
from trainer.daily import day_folders, folder_of
from trainer.errors import ConfigError
from trainer.launch import By, Link, News, Slots, Variables, environments, parse_hosts, reach_of_all
from trainer.main import app as train_app
from trainer.problems import Problem
from trainer.runs.folder import finished

EXAMPLES = """Examples:
  crossmedia supervise --max-np 2 -- crossmedia train --set run.name=a
  crossmedia supervise --min-np 2 --max-np 8 --hosts a:4,b:4 -- crossmedia train --set run.name=a
  crossmedia supervise --hosts a:4,b:4 --ssh 'ssh -p 2222' -- crossmedia train --set run.name=a
  crossmedia supervise --max-np 2 -- crossmedia daily data.samples=data/samples

Each start is a generation: all ranks, on the hosts that answer. If a rank dies, fails or hangs (run.deadline_s), or a
host is lost, the others are ended, and the next generation continues from the newest checkpoint, with as many ranks as
there are slots on the hosts that answer then. All steps, samples and losses are those of an undisturbed run. SIGTERM
and Ctrl-C end it after a checkpoint, a second one at once; the same command continues it.
Exit codes: 0 done, 1 given up, 2 wrong settings (never started again), 130 stopped.
"""
app = CommandApp(rich_markup_mode="markdown")

NUMBER = "SUPERVISE_GENERATION"
FAILURE_GRACE_S, END_GRACE_S = 5.0, 60.0
"""Seconds that other ranks may live on after one has died or failed (others may report more), or has ended well."""
_SETTLE_S = 3.0
"""Seconds to wait for the other hosts once enough are there."""
_KILL_S = 20.0
"""Seconds after SIGKILL until a host that has not reported the end of its ranks is given up."""
_OWN = ("SSH_", "XDG_", "DBUS_", "HOME", "HOSTNAME", "LOGNAME", "OLDPWD", "PWD", "SHELL", "SHLVL", "TMPDIR", "USER")
"""Variables, or beginnings of them, that are a host's own."""
_ERROR = "error: "
MOST_BACKOFF_S = 60.0


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """End of one rank, in the order in which the supervisor heard of it."""

    rank: int
    host: str
    code: int | None
    """Exit code as in subprocess: below 0 the signal; None if its host is unreachable."""
    error: str | None = None
    """Its last error on stderr or, where it had none, its last line there."""
    was_killed: bool = False
    """Whether the supervisor sent SIGKILL, as the rank did not end by itself."""

    @property
    def blame(self) -> int:
        """Return 0 if it died or is out of reach, 1 if it hung, 2 if it ended itself, maybe because of another one.

        SIGABRT is a program's own: C++ sends it to itself for an error that nobody takes, as Gloo's of a rank that does
        not come while they connect.
        """
        if self.code is not None and (self.code > 0 or self.code == -signal.SIGABRT):
            return 2
        return int(self.was_killed)


@dataclass(frozen=True, kw_only=True)
class Past:
    """One generation that is over."""

    step_before: int
    step_after: int
    ends: tuple[RankEnd, ...]


def place(available: Slots, min_ranks: int, max_ranks: int) -> Slots | None:
    """Fill the hosts in order, each up to its slots; None if they have fewer than `min_ranks`.

    Nothing of a run has to be divisible by the number of ranks.
    """
    chosen: dict[str, int] = {}
    for host, count in available.items():
        if take := min(count, max_ranks - sum(chosen.values())):
            chosen[host] = take
    return chosen if sum(chosen.values()) >= min_ranks else None


def without_progress(past: Sequence[Past]) -> int:
    """Count the last generations in a row without progress."""
    return sum(1 for _ in itertools.takewhile(lambda each: each.step_after <= each.step_before, reversed(past)))


def exit_code(last: Past, asked_to_stop: bool) -> int | None:
    """Return the exit code after a generation, or None if the run should be started again.

    Wrong settings are wrong the next time too. A stop that nobody asked the supervisor for is a host that goes down.
    """
    codes = [end.code for end in last.ends]
    if all(code == OK for code in codes):
        return OK
    if USAGE in codes:
        return USAGE
    return STOPPED if asked_to_stop else None


def back_off_s(past: Sequence[Past], base_s: float) -> float:
    """Return how long to wait before the next start: nothing after progress, else twice as long each time."""
    count = without_progress(past)
    return min(MOST_BACKOFF_S, base_s * 2 ** (count - 1)) if count else 0.0


def end_text(end: RankEnd) -> str:
    """Describe the end of a rank, e.g. "rank 3 on b died (signal 9)"."""
    who = f"rank {end.rank} on {end.host}"
    if end.code is None:
        return f"{who} is out of reach" + (f" ({end.error})" if end.error else "")
    if end.was_killed:
        return f"{who} did not end by itself and was killed"
    if end.code < 0:
        name = f", {signal.Signals(-end.code).name}" if -end.code in set(signal.Signals) else ""
        why = f": {end.error}" if end.code == -signal.SIGABRT and end.error else ""
        return f"{who} died (signal {-end.code}{name}{why})"
    return f"{who} ended with exit code {end.code}" + (f" ({end.error})" if end.error else "")


def past_text(past: Past) -> str:
    """Explain the end of a generation: by the rank to blame, and by the message of another one if that has none."""
    bad = [end for end in past.ends if end.code not in (OK, STOPPED)] or past.ends
    first, *others = sorted(bad, key=lambda end: end.blame)
    says_why = first.blame == 0 or (first.error and not first.was_killed)
    said = [] if says_why else [end for end in others if end.error][:1]
    return "; ".join(map(end_text, [first, *said]))


def start_text(step: int, ranks: Slots, slots: int) -> str:
    """Describe the start of the next generation, on some of all slots."""
    where = ", ".join(f"{host}:{count}" for host, count in ranks.items())
    begin = f"resuming at step {step:,}" if step else "starting at the first step"
    count = sum(ranks.values())
    return f"{count} of {slots} slots left; {begin} on {count_text(count, 'rank')} ({where})"


class Printer:
    """Prints in a thread: a terminal that has been stopped must not keep the supervisor from its hosts."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)

    def line(self, stream: TextIO, text: str) -> None:
        """Print a line, soon; it is lost where nobody reads any more."""
        self._thread.submit(print, text, file=stream, flush=True)

    def say(self, text: str) -> None:
        """Print a line of the supervisor's own."""
        self.line(sys.stderr, f"supervise: {printable(text)}")

    def close(self) -> None:
        """Wait until all is printed."""
        self._thread.shutdown()


@dataclass(frozen=True, kw_only=True)
class SuperviseOptions:
    """User-set options of the supervisor."""

    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND", help="crossmedia train, or daily, with its arguments.")
    ]
    hosts: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:SLOTS,...", help="Hosts for the ranks, with their slots.", show_default="localhost:MAX_NP"
        ),
    ] = None
    min_np: Annotated[int, typer.Option(min=1, help="Fewest ranks; with fewer slots it waits.")] = 1
    max_np: Annotated[int | None, typer.Option(min=1, help="Most ranks.", show_default="all slots")] = None
    by: Annotated[By, typer.Option(help="How the ranks communicate.")] = By.HOROVOD
    ssh: Annotated[str, typer.Option(help="The command that reaches other hosts.")] = "ssh"
    max_restarts: Annotated[
        int,
        typer.Option("--max-restarts-without-progress", min=0, help="Restarts in a row without a newer checkpoint."),
    ] = 5
    backoff_s: Annotated[
        float, typer.Option(min=0, help="Before the first restart without progress; doubled up to 60.")
    ] = 5
    wait_for_hosts_s: Annotated[
        float, typer.Option(min=0, help="Give up after so long with fewer than --min-np slots.")
    ] = 600
    stop_grace_s: Annotated[
        float, typer.Option(min=0, help="For ranks to write a checkpoint when they are stopped.")
    ] = 300
    lease_s: Annotated[
        float, typer.Option(min=1, help="A host that does not hear from here for so long ends its ranks itself.")
    ] = 20

    def read_hosts(self) -> Slots:
        """Read where ranks may run. Raises ConfigError, also where there never can be enough slots."""
        if self.hosts is None and self.max_np is None:
            raise ConfigError(Problem.NO_HOSTS)
        hosts = parse_hosts(self.hosts or f"localhost:{self.max_np}")
        if self.max_np is not None and self.max_np < self.min_np:
            raise ConfigError(Problem.MAX_BELOW_MIN_RANKS, self.max_np, self.min_np)
        if (slots := sum(hosts.values())) < self.min_np:
            raise ConfigError(Problem.TOO_FEW_SLOTS, self.min_np, self.hosts, slots)
        return hosts


_PROGRAM = "crossmedia"
_MODULES = {"train": "trainer.main", "daily": "trainer.daily"}
_EXAMPLE = f"{_PROGRAM} train --set run.name=NAME"


@dataclass(frozen=True)
class TrainCommand:
    """`crossmedia train ARGUMENTS`, `crossmedia daily ARGUMENTS`, these by their modules, or a script that trains."""

    words: tuple[str, ...]
    folder: RunPath
    """Folder of the run or, with trainer.daily, of the days' runs."""
    is_daily: bool = False

    def newest_step(self) -> int:
        """Return the step of the run's newest checkpoint, 0 where it has none; of days, the sum over all days."""
        runs = day_folders(self.folder) if self.is_daily else [self.folder]
        return sum(checkpoints[-1].step for run in runs if (checkpoints := finished(run)))

    def start(self) -> list[str]:
        """Return the command line that begins the run or, where it has a checkpoint, continues it.

        A bare `python` is this one, and `crossmedia` is of this one: a service and ssh have other search paths than a
        terminal.
        """
        first, *words = self.words
        by_python = {"python": (), "python3": (), _PROGRAM: ("-m", _PROGRAM)}
        program = [sys.executable, *by_python[first]] if first in by_python else [first]
        return [*program, *words, *([] if self.is_daily else ["--set", "run.resume=auto"])]


def parse_command(words: Sequence[str]) -> TrainCommand:
    """Find out which run a command trains. Raises ConfigError where its settings are wrong, or not ours to restart."""
    name, arguments = _name_and_arguments(words)
    given = get_command(daily_app if name == "daily" else train_app).make_context(name, arguments).params
    config = load_config(given["file"], [*(given["settings"] or []), *(given["more"] or [])])
    if name == "daily":
        return TrainCommand(tuple(words), folder_of(config), is_daily=True)
    run = config.run
    if run.name is None:
        raise ConfigError(Problem.SUPERVISED_WITHOUT_NAME)
    if run.overwrite or run.resume not in (None, "latest", "auto"):
        raise ConfigError(Problem.SUPERVISED_RESUME)
    return TrainCommand(tuple(words), run_path(run.dir) / run.name)


def _name_and_arguments(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command, a script being train, and its arguments."""
    for place, (before, word) in enumerate(zip(["", *words], words, strict=False)):
        if Path(word).name in ("horovodrun", "torchrun"):
            raise ConfigError(Problem.LAUNCHER_SUPERVISED, word, _EXAMPLE)
        for name, module in _MODULES.items():
            if (before, word) == ("-m", module) or (Path(before).name, word) == (_PROGRAM, name):
                return name, [*words[place + 1 :]]
        if word.endswith(".py"):
            return "train", [*words[place + 1 :]]
    known = " or ".join(f"{_PROGRAM} {each}" for each in _MODULES)
    raise ConfigError(Problem.NOT_A_TRAINING_COMMAND, " ".join(words), known, _EXAMPLE)


@dataclass
class Supervisor:
    """The supervision of one run; `past`: the generations that are over.

    `stop` is set when a signal has come; then the ranks write a checkpoint, or end at once by a second one.
    """

    options: SuperviseOptions
    slots: Slots
    command: TrainCommand
    printer: Printer
    past: list[Past] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    stops_at_once: bool = False

    async def run(self) -> int:
        """Train to the end; returns the exit code. Raises UserError where the hosts or checkpoints cannot be read."""
        self._most = min(sum(self.slots.values()), self.options.max_np or sys.maxsize)
        self._news: asyncio.Queue[News] = asyncio.Queue()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_IGN:  # nohup
                continue
            asyncio.get_running_loop().add_signal_handler(number, self.on_signal)
        ssh = shlex.split(self.options.ssh)
        self._links = {host: Link(host, ssh, self.options.lease_s, self._news) for host in self.slots}
        try:
            return await self._generations()
        finally:
            for link in self._links.values():
                await link.close()

    def on_signal(self) -> None:
        """Let the training stop after a checkpoint or, by a second signal, at once."""
        if not self.stop.is_set():
            self.printer.say(
                f"stopping: the ranks may write a checkpoint, for {self.options.stop_grace_s:g} s (--stop-grace-s); "
                "a second signal ends them at once"
            )
        elif not self.stops_at_once:
            self.printer.say("stopping at once")
        self.stops_at_once = self.stop.is_set()
        self.stop.set()

    async def _generations(self) -> int:
        while True:
            hosts = await self._hosts()
            if hosts is None:
                return self._without_hosts()
            step = await self._newest_step()  # an earlier supervisor's ranks may have written one meanwhile
            self._drain()
            if any(self._links[host].hello is None for host in hosts):
                continue  # lost while the checkpoints were examined
            self.printer.say(start_text(step, hosts, self._most))
            if any(link.hello is None for link in self._links.values()):
                self.printer.say(f"without {self._troubles()}")
            self.past.append(await self._generation(hosts, step))
            code = exit_code(self.past[-1], self.stop.is_set())
            if code is not None:
                self.printer.say(self._last_words(code))
                return code
            self.printer.say(past_text(self.past[-1]))
            if (tries := without_progress(self.past)) > self.options.max_restarts:
                self.printer.say(
                    f"{tries} starts in a row came to no checkpoint after step {self.past[-1].step_after:,}; "
                    "giving up (--max-restarts-without-progress)"
                )
                return FAILED
            pause_s = back_off_s(self.past, self.options.backoff_s)
            if pause_s >= 1:
                self.printer.say(f"starting again in {pause_s:.0f} s")
            await self._pause(pause_s)

    async def _generation(self, hosts: Slots, step: int) -> Past:
        """Run one generation to its end."""
        links = {host: self._links[host] for host in hosts}
        generation = Generation(hosts, links, self._news, self.printer)
        with environments(self.options.by, hosts, reach_of_all(list(links.values()))) as variables:
            generation.start(self.command.start(), variables, len(self.past))
            while not generation.is_over:
                await generation.next_news(1.0)
                if self.stop.is_set():
                    generation.stop(0 if self.stops_at_once else self.options.stop_grace_s)
        return Past(step_before=step, step_after=await self._newest_step(), ends=tuple(generation.ends))

    async def _hosts(self) -> Slots | None:
        """Wait until enough hosts are available; None if a user stopped the wait, or it took too long."""
        start_s, settled_s, is_reported = time.monotonic(), float("inf"), False
        while (waited_s := time.monotonic() - start_s) < self.options.wait_for_hosts_s and not self.stop.is_set():
            self._drain()
            is_quiet = not any(link.may_have_ranks for link in self._links.values())
            available = {host: slots for host, slots in self.slots.items() if self._links[host].hello is not None}
            if is_quiet and (chosen := place(available, self.options.min_np, self._most)):
                settled_s = min(settled_s, waited_s + _SETTLE_S)
                if waited_s >= settled_s or sum(chosen.values()) == self._most:
                    return chosen
            elif is_quiet and not is_reported and waited_s > _SETTLE_S:
                is_reported = True
                self.printer.say(f"waiting for {count_text(self.options.min_np, 'slot')}: {self._troubles()}")
            await self._pause(0.1)
        return None

    def _without_hosts(self) -> int:
        if self.stop.is_set():
            self.printer.say("stopped; the same command continues the run")
            return STOPPED
        self.printer.say(
            f"fewer than --min-np {self.options.min_np} slots for {self.options.wait_for_hosts_s:g} s "
            f"(--wait-for-hosts-s): {self._troubles()}; giving up"
        )
        return FAILED

    def _troubles(self) -> str:
        away = [link for link in self._links.values() if link.hello is None]
        return "; ".join(f"{link.host}: {link.trouble or 'no answer yet'}" for link in away)

    def _drain(self) -> None:
        """Forget messages of hosts between two generations; what counts then is which of them are there."""
        while not self._news.empty():
            self._news.get_nowait()

    async def _newest_step(self) -> int:
        """Return the step to continue from; while the run's place cannot be read, wait as for hosts."""
        end_s = time.monotonic() + self.options.wait_for_hosts_s
        while True:
            try:
                return await asyncio.to_thread(self.command.newest_step)
            except (UserError, OSError) as failure:
                if isinstance(failure, UsageError) or time.monotonic() > end_s or self.stop.is_set():
                    raise
                self.printer.say(f"cannot read the checkpoints: {failure}; trying again")
                await self._pause(self.options.backoff_s)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), seconds)

    def _last_words(self, code: int) -> str:
        """Report the end of the supervision."""
        last = self.past[-1]
        after = f"after {count_text(len(self.past) - 1, 'restart')}, with step {last.step_after:,}"
        if code == 0:
            return f"done {after}"
        if code == STOPPED:
            return f"stopped {after}; the same command continues the run"
        return f"{past_text(last)}; not started again"


class Generation:
    """Ranks of one start. `ends`: how they ended, in that order."""

    def __init__(self, hosts: Slots, links: Mapping[str, Link], news: "asyncio.Queue[News]", printer: Printer) -> None:
        self._host_of = dict(enumerate(host for host, count in hosts.items() for _ in range(count)))
        self._links, self._news, self._printer = links, news, printer
        self._alive = set(self._host_of)
        self._killed: set[int] = set()
        self._last: dict[int, str] = {}  # of each rank's stderr: its last error, else its last line
        self._grace_s = self._kill_at = float("inf")
        self.ends: list[RankEnd] = []

    def start(self, command: Sequence[str], environments: Sequence[Variables], number: int) -> None:
        """Let the agents start the ranks, which find the `number` of the generation in their environment."""
        shared = {**inherited(os.environ), "PYTHONUNBUFFERED": "1", NUMBER: str(number)}
        folder = str(Path.cwd())
        for host, link in self._links.items():
            ranks = [rank for rank, name in self._host_of.items() if name == host]
            own = [{"rank": rank, "environment": environments[rank]} for rank in ranks]
            link.send({"do": "start", "command": list(command), "folder": folder, "environment": shared, "ranks": own})

    def stop(self, grace_s: float) -> None:
        """Ask all ranks, once, to write a checkpoint and end; those that have not after `grace_s` are killed."""
        if grace_s < self._grace_s:
            self._grace_s = grace_s
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
                self._end(news.what["rank"], news.what["code"], self._last.get(news.what["rank"]))

    def _end(self, rank: int, code: int | None, error: str | None) -> None:
        self._alive.discard(rank)
        end = RankEnd(rank=rank, host=self._host_of[rank], code=code, error=error, was_killed=rank in self._killed)
        self.ends.append(end)
        grace_s = END_GRACE_S if code in (OK, STOPPED) else FAILURE_GRACE_S
        self._kill_at = min(self._kill_at, time.monotonic() + grace_s)

    def _kill(self) -> None:
        """Kill living ranks; the second time, give up hosts that have not reported their end."""
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
        """Print a line of a rank; lines of rank 0 without a prefix."""
        rank, text = line["rank"], line["text"]
        is_word = text.strip() and not self._last.get(rank, "").startswith(_ERROR)
        if line["stream"] == "err" and (text.startswith(_ERROR) or is_word):
            self._last[rank] = text.strip().rstrip(":")
        stream = sys.stderr if line["stream"] == "err" else sys.stdout
        self._printer.line(stream, text if rank == 0 else f"[rank {rank}] {text}")


def inherited(environment: Mapping[str, str]) -> Variables:
    """Return the variables of this process that ranks on any host get."""
    return {name: value for name, value in environment.items() if not name.startswith(_OWN)}


@app.command(epilog=EXAMPLES)
@takes(SuperviseOptions)
def main(options: SuperviseOptions) -> None:
    """Train a run on several hosts, and start it again by itself when a rank or a host is lost."""
    slots, train = options.read_hosts(), parse_command(options.command)
    with contextlib.closing(Printer()) as printer:
        raise typer.Exit(asyncio.run(Supervisor(options, slots, train, printer).run()))


if __name__ == "__main__":
    run_app(app)
