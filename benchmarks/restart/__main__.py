"""Measure what a loss costs a supervised run: seconds until its next step, and steps that are taken again.

    python -m benchmarks.restart [--json FILE]

Two hosts on this machine, one rank each. SIGKILL for a rank, for the agent of a host with its rank, and for the
supervisor, which is started again at once; SIGSTOP for a rank, which run.deadline_s finds. Seconds are those from the
signal to the end of the first step after it; most of them are the start of Python, torch and the run.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import psutil
import typer

from benchmarks.report import Figure, JsonPath, Section, write_sections
from benchmarks.workload import Knobs, Workload, make
from featurestore.console.commandline import CommandApp, run_app
from featurestore.console.output import progress_bars
from trainer.errors import TrainerError
from trainer.supervise.hosts import AGENT

KNOBS = Knobs(images=2_000, dim=64, steps=1_000, test_samples=300, behaviors=10, users=2_000, shards=8, row_group=100)
WORKER, STEPS_FILE = Path(__file__).with_name("worker.py"), "STEPS_FILE"
CHECKPOINT_EVERY, DEADLINE_S, WAIT_S = 50, 10, 300.0
KINDS = ("rank", "host", "supervisor", "stopped_rank")

app = CommandApp(report=True, failures=(OSError,))


@app.command()
def main(
    json_file: JsonPath = None,
    folder: Annotated[Path, typer.Option("--dir", help="Of the workload, which is kept.")] = Path("data/bench/restart"),
    kills: Annotated[int, typer.Option(help="Of each kind.", min=1)] = 3,
) -> None:
    """Kill parts of a supervised run; prints seconds until the next step, and steps taken again."""
    with progress_bars() as progress, tempfile.TemporaryDirectory() as scratch:
        workload = make(folder, replace(KNOBS, samples_per_rank=64), progress)
        task = progress.add_task("kill", total=len(KINDS) * kills)
        found: dict[str, list[Loss]] = {kind: [] for kind in KINDS}
        with supervised(workload, Path(scratch)) as run:
            for _ in range(kills):
                for kind in KINDS:
                    found[kind].append(run.lose(kind))
                    progress.advance(task)
    grid = {kind: summary(losses) for kind, losses in found.items()}
    figures = {"kills": kills, "checkpoint_every_steps": CHECKPOINT_EVERY, "deadline_s": DEADLINE_S}
    write_sections([Section("What a loss costs a run of two ranks", figures=figures, grid=grid)], json_file)


@dataclass(frozen=True)
class Loss:
    """What one kill has cost."""

    seconds: float
    steps: int


def summary(losses: list[Loss]) -> Mapping[str, Figure]:
    """Return the figures of one kind of kill."""
    seconds = [each.seconds for each in losses]
    return {
        "median_s_to_next_step": statistics.median(seconds),
        "most_s_to_next_step": max(seconds),
        "median_steps_again": statistics.median(each.steps for each in losses),
    }


class SupervisedRun:
    """A run whose ranks write the time of each step."""

    def __init__(self, workload: Workload, scratch: Path) -> None:
        self._file, self._log = scratch / "steps.txt", scratch / "log.txt"
        self._draw = random.Random(0)
        changes = {
            "train.epochs": 10_000,
            "train.checkpoint_every": CHECKPOINT_EVERY,
            "run.dir": scratch,
            "run.name": "run",
            "run.threads": 1,
            "run.deadline_s": DEADLINE_S,
        }
        settings = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
        supervise = [sys.executable, "-m", "trainer.supervise", "--hosts", "localhost:1,127.0.0.1:1"]
        self._command = [*supervise, "--", sys.executable, str(WORKER), "--config", str(workload.config), *settings]
        self._process = self._start()

    def lose(self, kind: str) -> Loss:
        """Kill something of that kind at a random moment between two checkpoints, and wait for the next step."""
        enough = CHECKPOINT_EVERY + self._draw.randrange(CHECKPOINT_EVERY)
        self.wait(lambda: len(self._steps(self.starts())) > enough)
        starts = self.starts()
        victim = self._victim(kind)
        start_s = time.time()
        victim.send_signal(signal.SIGSTOP if kind == "stopped_rank" else signal.SIGKILL)
        if kind == "supervisor":
            self._process.wait()
            self._process = self._start()
        self.wait(lambda: bool(self._steps(starts + 1, last=False)))
        again = self._steps(starts + 1, last=False)[0]
        return Loss(again[0] - start_s, self._steps(starts)[-1][1] - again[1] + 1)

    def close(self) -> None:
        """End the supervisor and, with it, the ranks."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        self._process.kill()

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            variables = {**os.environ, STEPS_FILE: str(self._file), "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(self._command, env=variables, stdout=log, stderr=log)

    def _victim(self, kind: str) -> psutil.Process:
        if kind == "supervisor":
            return psutil.Process(self._process.pid)
        script = str(AGENT if kind == "host" else WORKER)
        below = psutil.Process(self._process.pid).children(recursive=True)
        return self._draw.choice([each for each in below if each.cmdline()[1:2] == [script]])

    def wait(self, until: Callable[[], bool]) -> None:
        """Wait until something is so. Raises TrainerError where the supervisor ends meanwhile, or it takes too long."""
        end_s = time.monotonic() + WAIT_S
        while not until():
            if self._process.poll() is not None or time.monotonic() > end_s:
                raise TrainerError(f"the supervised run did not continue:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.01)

    def _lines(self) -> list[list[str]]:
        return [line.split() for line in self._file.read_text().splitlines()] if self._file.exists() else []

    def starts(self) -> int:
        """Count the starts of rank 0 that have come to a step, or will."""
        return sum(step == "0" for _, step in self._lines())

    def _steps(self, start: int, *, last: bool = True) -> list[tuple[float, int]]:
        """List second and number of each step after that many starts; if `last`, until the next start."""
        found: list[tuple[float, int]] = []
        starts = 0
        for seconds, step in self._lines():
            starts += step == "0"
            if step != "0" and (starts == start or (starts > start and not last)):
                found.append((float(seconds), int(step)))
        return found


@contextmanager
def supervised(workload: Workload, scratch: Path) -> Iterator[SupervisedRun]:
    """Start a run, and end it with the block."""
    run = SupervisedRun(workload, scratch)
    try:
        run.wait(lambda: run.starts() == 1)
        yield run
    finally:
        run.close()


if __name__ == "__main__":
    run_app(app)
