"""The interface of launchers to a rank: variables, rendezvous, hosts and their agents; the launcher for Slurm.

crossmedia slurm -- COMMAND runs a command on the ranks of a Slurm job (docs/RANKS.md): srun starts this module again
for each rank, which finds its place in Slurm's variables and becomes the command.
"""

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from featurestore.console.commandline import CommandApp, run_app
from featurestore.errors import FAILED
from trainer.errors import ConfigError
from trainer.problems import Problem

Slots = Mapping[str, int]
"""Hosts by name, and how many ranks each has or may have. Ranks count from host to host."""
Variables = dict[str, str]
EXAMPLES = """Examples, as lines of a batch script:
  crossmedia slurm -- crossmedia train --config run.yaml --set run.name=both --set run.resume=auto
  crossmedia slurm --by torch -- crossmedia train

The job's --nodes and --ntasks-per-node are the ranks. Exit codes: the ranks' own; 1 where one has failed and srun has
ended the others; 2 for a mistake in the command line, or outside a Slurm job.
"""
_AS_RANK = "--as-rank"
_ENDED_BY_SLURM = (128 + signal.SIGTERM, 128 + signal.SIGKILL)
app = CommandApp(rich_markup_mode="markdown")
AGENT = Path(__file__).with_name("agent.py")
CONNECT_S = 10
_HOST = re.compile(r"(?P<name>[\w.@-]+)(?::(?P<count>\d+))?")
_LONGEST_LINE = 2**20
_START_S = 60.0
"""Seconds for Python to start on a busy host."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
LOOPBACK = "127.0.0.1"


class By(StrEnum):
    """The library that carries the collectives."""

    HOROVOD = "horovod"
    TORCH = "torch"


@contextmanager
def meeting(by: By, slots: Slots, address: str = "") -> Iterator[int]:
    """Yield the port at which ranks meet: rank 0 will listen there, by torch, or Horovod's rendezvous does here.

    That is Horovod's own server, which listens at `address` ("": this whole host): a key-value store over HTTP, without
    encryption or password.
    """
    if by == By.TORCH:
        yield free_port()
        return
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    server = RendezvousHTTPServer((address, 0), RendezvousHandler, 0)
    server.daemon_threads = True
    server.init(_assigned(slots))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


def variables_of(by: By, slots: Slots, host: str, local: int, address: str, port: int) -> Variables:
    """Return the variables of horovodrun or torchrun for rank number `local` of `host`; all meet on `address`:`port`.

    But for the interface between the hosts, which trainer.comm finds: it leads to that address.
    """
    names, counts = list(slots), list(slots.values())
    node = names.index(host)
    rank = sum(counts[:node]) + local
    if by == By.TORCH:
        found: dict[str, object] = {
            "RANK": rank,
            "WORLD_SIZE": sum(counts),
            "LOCAL_RANK": local,
            "LOCAL_WORLD_SIZE": counts[node],
            "GROUP_RANK": node,
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }
    else:
        from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars

        found = create_slot_env_vars(_assigned(slots)[rank]) | create_run_env_vars(address, [""], port)
    return {name: str(value) for name, value in found.items() if value != ""}


def _assigned(slots: Slots) -> list[Any]:
    """Return Horovod's description of each rank."""
    from horovod.runner.common.util.hosts import HostInfo, get_host_assignments

    ranks: list[Any] = get_host_assignments([HostInfo(*each) for each in slots.items()], 1)
    return ranks


@contextmanager
def ended(process: "subprocess.Popen[bytes]", patience_s: float = 30.0) -> Iterator[None]:
    """End a process after the block: by SIGTERM, at which horovodrun ends its ranks too, and later by SIGKILL."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """Return a port of this host on which nothing listens now."""
    with socket.socket() as bound:
        bound.bind(("", 0))
        return int(bound.getsockname()[1])


@app.command(epilog=EXAMPLES)
def main(
    command: Annotated[list[str], typer.Argument(help="Command of one rank, after --.")],
    by: Annotated[By, typer.Option(help="How the ranks communicate.")] = By.HOROVOD,
    requeue: Annotated[
        bool, typer.Option("--requeue", help="When SIGUSR1 has stopped the ranks, let Slurm run the job again.")
    ] = False,
) -> None:
    """Run a command on the ranks of this Slurm job: started by srun, without ssh, MPI or horovodrun.

    SIGTERM is passed to the ranks, which write a checkpoint and end. SIGUSR1 does the same: by it Slurm can say that
    the time of the job is nearly over (sbatch --signal=B:USR1@120).
    """
    slots = slots_of_job(os.environ)
    if by == By.TORCH and os.environ.get("SLURM_NODEID") != "0":
        raise ConfigError(Problem.TORCH_OUT_OF_BATCH)
    ranks = sum(slots.values())
    options = [f"--nodes={len(slots)}", f"--ntasks={ranks}", "--distribution=block", "--kill-on-bad-exit=1"]
    if cores := os.environ.get("SLURM_CPUS_PER_TASK"):  # srun does not take it from the job
        options.append(f"--cpus-per-task={cores}")
    with meeting(by, slots) as port:
        rank = [sys.executable, "-m", "trainer.launch", _AS_RANK, by.value, str(port)]
        code, signals = _run_step(["srun", *options, *rank, *command])
    if requeue and signal.SIGUSR1 in signals:
        code = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False).returncode
    raise typer.Exit(code)


def slots_of_job(slurm: Mapping[str, str]) -> Slots:
    """Return the ranks of the job's nodes by number; Slurm writes 2, 2, 2, 1 as 2(x3),1. Raises ConfigError."""
    if "SLURM_JOB_ID" not in slurm:
        raise ConfigError(Problem.NOT_A_SLURM_JOB)
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", each) for each in slurm.get("SLURM_TASKS_PER_NODE", "").split(",")]
    counts = [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
    if None in parts:
        raise ConfigError(Problem.JOB_WITHOUT_RANKS)
    return {str(node): count for node, count in enumerate(counts)}


def _run_step(words: list[str]) -> tuple[int, set[int]]:
    """Run srun to its end; return its exit code, and the signals that came here meanwhile and ended the ranks."""
    signals: set[int] = set()

    def stop(number: int, _: FrameType | None) -> None:
        signals.add(number)  # the ranks get SIGTERM, and not srun: it would kill them
        subprocess.run(["scancel", "--signal=TERM", os.environ["SLURM_JOB_ID"]], check=False, timeout=60)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)
    try:
        process = subprocess.Popen(words, process_group=0)  # a terminal's Ctrl-C reaches the ranks by `stop` alone
    except OSError as error:
        raise ConfigError(Problem.NO_SRUN, error.strerror) from error
    code = process.wait()
    if code in _ENDED_BY_SLURM and not signals:
        return FAILED, signals  # a rank has failed; srun has ended the others, and returns the highest of all codes
    return (code if code >= 0 else 128 - code), signals


def variables_in_job(by: By, slurm: Mapping[str, str], port: int) -> Variables:
    """Return the variables of this rank of a Slurm job; all meet on `port` of srun's node."""
    head, node, local = slurm["SLURM_LAUNCH_NODE_IPADDR"], slurm["SLURM_NODEID"], int(slurm["SLURM_LOCALID"])
    return variables_of(by, slots_of_job(slurm), node, local, head, port)


def _become(by: str, port: str, *command: str) -> None:
    """Replace this process by the command of a rank, with the rank's variables."""
    try:
        os.execvpe(command[0], command, {**os.environ, **variables_in_job(By(by), os.environ, int(port))})
    except OSError as error:
        sys.exit(f"error: {command[0]} cannot be run on {os.environ['SLURMD_NODENAME']}: {error.strerror}")


def parse_hosts(text: str) -> Slots:
    """Read hosts written as a:4,b:4; one without a number has one slot. Raises ConfigError."""
    found: dict[str, int] = {}
    for each in map(str.strip, text.split(",")):
        match = _HOST.fullmatch(each)
        count = int(match["count"] or 1) if match else 0
        if match is None or count == 0 or match["name"].startswith("-"):
            raise ConfigError(Problem.NOT_A_HOST, each)
        if match["name"] in found:
            raise ConfigError(Problem.HOST_TWICE, match["name"])
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


@dataclass(frozen=True)
class News:
    """A message from a host: an answer of its agent, or {"is": "lost", "why": ...}."""

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
        """Read the agent's messages until its end; one that says nothing for half of its lease is dropped."""
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


if __name__ == "__main__":
    _become(*sys.argv[2:]) if sys.argv[1:2] == [_AS_RANK] else run_app(app)
