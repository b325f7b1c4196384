"""The interface of launchers to a rank: variables and rendezvous; ending a started process; the launcher for Slurm.

crossmedia slurm -- COMMAND runs a command on the ranks of a Slurm job (docs/RANKS.md): srun starts this module again
for each rank, which finds its place in Slurm's variables and becomes the command.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from types import FrameType
from typing import Annotated, Any

import typer

from featurestore.console.commandline import CommandApp, run_app
from featurestore.errors import FAILED
from trainer.errors import ConfigError


class By(StrEnum):
    """What carries the collectives."""

    HOROVOD = "horovod"
    TORCH = "torch"


Slots = Mapping[str, int]
"""Hosts by name, and how many ranks each has or may have. Ranks count from host to host."""
Variables = dict[str, str]


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
    """Return what horovodrun or torchrun sets for rank number `local` of `host`; all meet on `port` of `address`.

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
    """Give Horovod's description of each rank."""
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


EXAMPLES = """Examples, as lines of a batch script:
  crossmedia slurm -- crossmedia train --config run.yaml --set run.name=both --set run.resume=auto
  crossmedia slurm --by torch -- crossmedia train

The job's --nodes and --ntasks-per-node are the ranks. Exit codes: the ranks' own; 1 where one has failed and srun has
ended the others; 2 for a mistake in the command line, or outside a Slurm job.
"""
_AS_RANK = "--as-rank"
_ENDED_BY_SLURM = (128 + signal.SIGTERM, 128 + signal.SIGKILL)

app = CommandApp(rich_markup_mode="markdown")


@app.command(epilog=EXAMPLES)
def main(
    command: Annotated[list[str], typer.Argument(help="Command of one rank, after --.")],
    by: Annotated[By, typer.Option(help="What the ranks speak to each other by.")] = By.HOROVOD,
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
        raise ConfigError("with --by torch, rank 0 is where the others meet: run this in a batch script (sbatch)")
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
        raise ConfigError("this is not a Slurm job: SLURM_JOB_ID is not set; sbatch deploy/slurm/train.sbatch is one")
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", each) for each in slurm.get("SLURM_TASKS_PER_NODE", "").split(",")]
    counts = [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
    if None in parts:
        raise ConfigError("the job does not say how many ranks a node has; add --ntasks-per-node=N to sbatch")
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
        raise ConfigError(f"srun cannot be run: {error.strerror}; are Slurm's commands on PATH?") from error
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


if __name__ == "__main__":
    _become(*sys.argv[2:]) if sys.argv[1:2] == [_AS_RANK] else run_app(app)
