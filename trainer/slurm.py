"""crossmedia slurm -- COMMAND: run a command on the ranks of this Slurm job (docs/RANKS.md).

srun starts this module again for each rank, which finds its place in Slurm's variables and becomes the command.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from types import FrameType
from typing import Annotated

import typer

from featurestore.console.commandline import CommandApp, run_app
from featurestore.errors import FAILED
from trainer import launch
from trainer.errors import ConfigError

EXAMPLES = """
Examples, as lines of a batch script:

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
    by: Annotated[launch.By, typer.Option(help="What the ranks speak to each other by.")] = launch.By.HOROVOD,
    requeue: Annotated[
        bool, typer.Option("--requeue", help="When SIGUSR1 has stopped the ranks, let Slurm run the job again.")
    ] = False,
) -> None:
    """Run a command on the ranks of this Slurm job: started by srun, without ssh, MPI or horovodrun.

    SIGTERM is passed to the ranks, which write a checkpoint and end. SIGUSR1 does the same: by it Slurm can say that
    the time of the job is nearly over (sbatch --signal=B:USR1@120).
    """
    counts = ranks_of_nodes(os.environ)
    if by == launch.By.TORCH and os.environ.get("SLURM_NODEID") != "0":
        raise ConfigError("with --by torch, rank 0 is where the others meet: run this in a batch script (sbatch)")
    options = [f"--nodes={len(counts)}", f"--ntasks={sum(counts)}", "--distribution=block", "--kill-on-bad-exit=1"]
    if cores := os.environ.get("SLURM_CPUS_PER_TASK"):  # srun does not take it from the job
        options.append(f"--cpus-per-task={cores}")
    nodes = [str(node) for node in range(len(counts))]
    with nullcontext(launch.free_port()) if by == launch.By.TORCH else launch.horovod_rendezvous(nodes, counts) as port:
        rank = [sys.executable, "-m", "trainer.slurm", _AS_RANK, by.value, str(port)]
        code, signals = _run_step(["srun", *options, *rank, *command])
    if requeue and signal.SIGUSR1 in signals:
        code = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False).returncode
    raise typer.Exit(code)


def ranks_of_nodes(slurm: Mapping[str, str]) -> list[int]:
    """Return the number of ranks of each node of the job; Slurm writes 2, 2, 2, 1 as 2(x3),1. Raises ConfigError."""
    if "SLURM_JOB_ID" not in slurm:
        raise ConfigError("this is not a Slurm job: SLURM_JOB_ID is not set; sbatch deploy/slurm/train.sbatch is one")
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", each) for each in slurm.get("SLURM_TASKS_PER_NODE", "").split(",")]
    counts = [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
    if None in parts:
        raise ConfigError("the job does not say how many ranks a node has; add --ntasks-per-node=N to sbatch")
    return counts


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


def variables_of(by: launch.By, slurm: Mapping[str, str], port: int) -> launch.Variables:
    """Return the variables of Horovod's or torch's launcher for this rank; all meet on `port` of srun's node."""
    head, node = slurm["SLURM_LAUNCH_NODE_IPADDR"], slurm["SLURM_NODEID"]
    place = launch.Place(ranks_of_nodes(slurm), int(node), int(slurm["SLURM_LOCALID"]))
    interface = launch.interface_towards(head)
    if by == launch.By.TORCH:
        return launch.torch_variables(place, head, port, interface)
    return launch.horovod_variables(place, node, head, port, interface)


def _become(by: str, port: str, *command: str) -> None:
    """Replace this process by the command of a rank, with the rank's variables."""
    try:
        os.execvpe(command[0], command, {**os.environ, **variables_of(launch.By(by), os.environ, int(port))})
    except OSError as error:
        sys.exit(f"error: {command[0]} cannot be run on {os.environ['SLURMD_NODENAME']}: {error.strerror}")


if __name__ == "__main__":
    _become(*sys.argv[2:]) if sys.argv[1:2] == [_AS_RANK] else run_app(app)
