"""Hosts: links to their agents, environments and the command of a rank."""

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import strftime
from typing import Any

from typer.main import get_command

from featurestore.console.commandline import CommandApp
from featurestore.published.paths import RunPath, run_path
from featurestore.storage.local import read_text
from featurestore.text import one_line
from trainer.config.config import Config, load_config
from trainer.errors import ConfigError
from trainer.files import checkpoints_of
from trainer.launch import By, Place, Variables, free_port, horovod_rendezvous, horovod_variables, torch_variables
from trainer.main import app, warm_settings
from trainer.runs.folder import finished, step_of
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


_MAIN, _DAILY = "trainer.main", "trainer.daily"
_EXAMPLE = f"python -m {_MAIN} --set run.name=NAME"


@dataclass(frozen=True)
class TrainCommand:
    """`python -m trainer.main ARGUMENTS`, or a script with the same arguments, and the run that it trains."""

    words: tuple[str, ...]
    folder: RunPath
    """The run's folder."""
    name_was_given: bool

    def newest_step(self) -> int:
        """Return the step of the run's newest checkpoint; 0 where it has none."""
        return _newest_step(self.folder)

    def start(self) -> list[str]:
        """Return the command line that begins the run or, where it has a checkpoint, continues it.

        A bare `python` is this one: a service and ssh have other search paths than a terminal.
        """
        name = [] if self.name_was_given else ["--set", f"run.name={self.folder.name}"]
        return [*self._words(), *name, "--set", "run.resume=auto"]

    def _words(self) -> list[str]:
        program = sys.executable if self.words[0] in ("python", "python3") else self.words[0]
        return [program, *self.words[1:]]


@dataclass(frozen=True)
class DaysCommand(TrainCommand):
    """`python -m trainer.daily ARGUMENTS`, which continues by itself: `folder` has a run for each day."""

    _before: dict[str, int] = field(default_factory=dict, compare=False)
    """Steps of the days before the newest one: they do not change any more."""

    def newest_step(self) -> int:
        """Return the steps of the newest checkpoints of all days, together."""
        from trainer.daily import day_folders

        steps = dict(self._before)
        for day in day_folders(self.folder):
            if day.name not in steps:
                steps[day.name] = _newest_step(day)
        self._before.update(sorted(steps.items())[:-1])
        return sum(steps.values())

    def start(self) -> list[str]:
        return self._words()


def parse_command(words: Sequence[str]) -> TrainCommand:
    """Find out which run a command trains. Raises ConfigError where its settings are wrong, or not ours to restart."""
    module, arguments = _module_and_arguments(words)
    if module == _DAILY:
        from trainer.daily import app as daily
        from trainer.daily import folder_of

        return DaysCommand(tuple(words), folder_of(_config_of(daily, module, arguments)), name_was_given=True)
    run = _config_of(app, module, arguments).run
    if run.resume not in (None, "latest", "auto"):
        raise ConfigError(
            f"run.resume={run.resume}: a supervised run continues from its newest checkpoint; leave it out"
        )
    if run.overwrite:
        raise ConfigError("run.overwrite=true would remove what a supervised run continues from; take another run.name")
    name = run.name or strftime("run-%Y%m%d-%H%M%S")
    return TrainCommand(tuple(words), run_path(run.dir) / name, name_was_given=run.name is not None)


def _config_of(command: CommandApp, module: str, arguments: Sequence[str]) -> Config:
    """Load the settings that the command is given. Raises ConfigError."""
    given = get_command(command).make_context(module, list(arguments)).params
    settings = [*(given["settings"] or []), *(given["more"] or [])]
    settings += warm_settings(given["warm_start"], given.get("warm_parts"))
    return load_config(given["file"], settings)


def _newest_step(run: RunPath) -> int:
    found = finished(checkpoints_of(run))
    return step_of(found[-1]) if found else 0


def _module_and_arguments(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the module, that of a script being trainer.main, and what follows it."""
    program = Path(words[0]).name
    if program in ("horovodrun", "torchrun"):
        raise ConfigError(f"{program} is not needed: trainer.supervise starts the ranks; write -- {_EXAMPLE}")
    for place, word in enumerate(words):
        if word.endswith(".py"):
            return _MAIN, words[place + 1 :]
        if word == "-m" and len(words) > place + 1:
            module = words[place + 1]
            if module not in (_MAIN, _DAILY):
                raise ConfigError(
                    f"-m {module}: what is supervised is trainer.main or trainer.daily; write -- {_EXAMPLE}"
                )
            return module, words[place + 2 :]
    raise ConfigError(f"'{' '.join(words)}' trains no run; write -- {_EXAMPLE}")
