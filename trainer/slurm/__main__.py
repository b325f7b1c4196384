"""python -m trainer.slurm -- COMMAND: run a command on the ranks of this Slurm job."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from featurestore.console.commandline import CommandApp, run_app, say_error
from featurestore.errors import FAILED
from trainer.errors import ConfigError
from trainer.launch import By, free_port, horovod_rendezvous
from trainer.slurm.allocation import Allocation, find_allocation

EXAMPLES = """
Examples, as lines of a batch script:

    python -m trainer.slurm -- python -m trainer.main --set data.store=s3://bucket/features --set run.resume=auto

    python -m trainer.slurm --by torch -- python -m trainer.main

The job's --nodes and --ntasks-per-node are the ranks. Exit codes: the ranks' own; 1 where one has failed and srun has
ended the others; 2 for a mistake in the command line, or where this is no job of Slurm.
"""
NODE = "SLURMD_NODENAME"
"""Of the node on which a batch script runs; not set under salloc, which runs on the host it was typed on."""

_ENDED_BY_SLURM = (128 + signal.SIGTERM, 128 + signal.SIGKILL)

app = CommandApp(rich_markup_mode="markdown")


@app.command(epilog=EXAMPLES)
def main(
    command: Annotated[list[str], typer.Argument(help="Command of one rank, after --.")],
    by: Annotated[By, typer.Option(help="What the ranks speak to each other by.")] = By.HOROVOD,
    srun: Annotated[str, typer.Option(metavar="OPTIONS", help='More options of srun, as "--cpu-bind=cores".')] = "",
    requeue: Annotated[
        bool, typer.Option("--requeue", help="When SIGUSR1 has stopped the ranks, let Slurm run the job again.")
    ] = False,
) -> None:
    """Run a command on the ranks of this Slurm job: started by srun, without ssh, MPI or horovodrun.

    SIGTERM is passed to the ranks, which write a checkpoint and end. SIGUSR1 does the same: by it Slurm can say that
    the time of the job is nearly over (sbatch --signal=B:USR1@120).
    """
    try:
        more = shlex.split(srun)
    except ValueError as error:
        raise typer.BadParameter(f"{srun}: {error}", param_hint="--srun") from error
    job = find_allocation(os.environ)
    with _meeting_point(by, job) as port:
        step = _Step(_command_line(by, job, port, more, command))
        code = step.run()
    if requeue and step.time_is_over:
        code = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False).returncode
    raise typer.Exit(code)


def _command_line(by: By, job: Allocation, port: int, more: list[str], command: list[str]) -> list[str]:
    """Return the line that starts the ranks. One that fails ends all others: they would wait for it in vain."""
    options = [f"--nodes={len(job.nodes)}", f"--ntasks={job.size}", "--distribution=block", "--kill-on-bad-exit=1"]
    if cores := os.environ.get("SLURM_CPUS_PER_TASK"):  # srun does not take it from the job
        options.append(f"--cpus-per-task={cores}")
    ranks = ",".join(map(str, job.ranks))
    rank = [sys.executable, "-m", "trainer.slurm.rank", by.value, str(port), ranks]
    return ["srun", *options, *more, *rank, *command]


class _Step:
    """The ranks, as one process: srun. A signal that this process gets while it runs ends them in order."""

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._stopped = False
        self.time_is_over = False
        """Whether SIGUSR1 came."""

    def run(self) -> int:
        """Run the ranks to their end; returns their exit code."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._stop)
        try:
            # A group of its own: a terminal's Ctrl-C goes to the ranks by way of us, once.
            process = subprocess.Popen(self._words, process_group=0)
        except OSError as error:
            raise ConfigError(f"srun cannot be run: {error.strerror}; are Slurm's commands on PATH?") from error
        code = process.wait()
        if code in _ENDED_BY_SLURM and not self._stopped:
            return FAILED  # one rank has failed, srun has ended the others and returns the highest of all codes
        return code if code >= 0 else 128 - code

    def _stop(self, number: int, _: FrameType | None) -> None:
        """Send SIGTERM to the ranks, and not to srun: that would kill them."""
        self.time_is_over |= number == signal.SIGUSR1
        self._stopped = True
        subprocess.run(["scancel", "--signal=TERM", os.environ["SLURM_JOB_ID"]], check=False, timeout=60)


@contextmanager
def _meeting_point(by: By, job: Allocation) -> Iterator[int]:
    """Yield the port of this host where the ranks find each other; for Horovod, its server is there until the end."""
    if by == By.TORCH:
        if os.environ.get(NODE) != job.nodes[0]:
            say_error("with --by torch, rank 0 is where the others meet: run this in a batch script (sbatch)")
            raise typer.Exit(2)
        yield free_port()
    else:
        with horovod_rendezvous(job.nodes, job.ranks) as port:
            yield port


if __name__ == "__main__":
    run_app(app)
