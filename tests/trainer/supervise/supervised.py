"""Runs under trainer.supervise that note every step, processes of them to kill, and what must be so at their end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from featurestore.console.commandline import run_app
from tests.ranks import ROOT, environment
from tests.trainer.checkpoints import steps_of
from tests.trainer.runs.resumed.legs import Leg, read_leg
from tests.trainer.runs.resumed.mortal import note_steps
from trainer.launch import AGENT
from trainer.main import app
from trainer.supervise import NUMBER

WORKER = Path(__file__)
"""`trainer.main` as a script: ranks write what they do in each step into NOTES/<generation>."""
NOTES, PAUSE_S = "NOTES", "PAUSE_S"
"""Variables of ranks. With PAUSE_S, each step takes so long at least."""
TWO_HOSTS = ("--hosts", "localhost:1,127.0.0.1:1")
"""Two hosts on one machine: each has an agent of its own."""
QUICK = ("--backoff-s", "0.1", "--lease-s", "60")
KINDS = {"rank": WORKER, "agent": AGENT}
TIMEOUT_S = 240.0
LOOK_S, LOOK_AT_PROCESSES_S = 0.05, 0.5
"""Between two looks while a test waits; to find processes is many times the work."""


@dataclass
class Supervised:
    """A run below `folder`, supervised once or several times."""

    folder: Path
    settings: list[str]
    options: Sequence[str] = TWO_HOSTS
    program: Sequence[object] = (WORKER,)
    name: str = "run"
    starts: int = 0
    seen: set[psutil.Process] = field(default_factory=set)
    """Every process that was ever looked at: none of them may be left."""

    @property
    def run(self) -> Path:
        return self.folder / self.name

    @property
    def log(self) -> Path:
        return self.folder / f"log-{self.starts}.txt"

    def command(self) -> list[str]:
        chosen = [word for setting in self.settings for word in ("--set", setting)]
        supervise = [sys.executable, "-m", "trainer.supervise", *QUICK, *self.options]
        return [*supervise, "--", sys.executable, *map(str, self.program), *chosen]

    def start(self, **variables: str) -> "subprocess.Popen[bytes]":
        """Start the supervisor; what it and the ranks print goes to `log`, what ranks do in steps to notes."""
        notes = self.next_notes()
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self.command(), cwd=ROOT, env={**environment(), **notes, **variables}, stdout=log, stderr=log
            )

    def next_notes(self) -> dict[str, str]:
        """Variables by which the ranks of the next start know where to write."""
        self.starts += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        return {NOTES: str(self.folder / f"notes-{self.starts}")}

    def end(self, process: "subprocess.Popen[bytes]", code: int = 0, timeout_s: float = TIMEOUT_S) -> str:
        """Wait for the supervisor's end and for that of all its processes; return what was printed."""
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(self.log.read_text()) from None
        assert process.returncode == code, self.log.read_text()
        _, alive = psutil.wait_procs(self.seen, timeout=30)
        assert alive == [], self.log.read_text()
        return self.log.read_text()

    def processes(self, process: "subprocess.Popen[bytes]", script: Path = WORKER) -> list[psutil.Process]:
        """The ranks (WORKER), in their order, or agents (AGENT) below the supervisor."""
        found: dict[int, psutil.Process] = {}
        for each in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended
                self.seen.add(each)
                if str(script) in each.cmdline()[1:3]:  # an agent has -P before it
                    variables = each.environ()
                    found[int(variables.get("HOROVOD_RANK", variables.get("RANK", len(found))))] = each
        return [found[rank] for rank in sorted(found)]

    def victims(self, process: "subprocess.Popen[bytes]", kind: str, count: int = 1) -> list[psutil.Process]:
        """Wait for so many processes of a kind: rank, agent or supervisor; the first rank that starts may be any."""
        if kind == "supervisor":
            return [psutil.Process(process.pid)]
        end_s = time.monotonic() + TIMEOUT_S
        while len(found := self.processes(process, KINDS[kind])) < count:
            assert process.poll() is None and time.monotonic() < end_s, self.log.read_text()
            time.sleep(LOOK_AT_PROCESSES_S)
        return found

    def newest_step(self) -> int:
        return max(steps_of(self.run), default=0)

    def wait(self, process: "subprocess.Popen[bytes]", until: Callable[[], bool]) -> None:
        """Wait until something is so, while the supervisor lives."""
        start_s = looked_s = time.monotonic()
        while not until():
            now_s = time.monotonic()
            assert process.poll() is None and now_s < start_s + TIMEOUT_S, self.log.read_text()
            if now_s > looked_s + LOOK_AT_PROCESSES_S:
                looked_s = now_s
                self.processes(process)
            time.sleep(LOOK_S)

    def wait_for_step(self, process: "subprocess.Popen[bytes]", step: int) -> None:
        """Wait until ranks have taken a step, and there is a checkpoint if there has to be one by then."""
        self.wait(process, lambda: self.newest_step() >= step)

    def legs(self) -> list[Leg]:
        """The generations of all starts that have come to a step, in their order."""
        found = []
        for start in range(1, self.starts + 1):
            notes = self.folder / f"notes-{start}"
            for folder in sorted(notes.glob("*"), key=lambda path: int(path.name)):
                sizes = [int(path.stem.rpartition("-")[2]) for path in folder.iterdir()]  # none yet at the very start
                assert len(set(sizes)) <= 1
                if sizes and len(sizes) == sizes[0] and (leg := read_leg(folder, sizes[0])).samples:
                    found.append(leg)
        return found


def kill(process: psutil.Process, number: int = signal.SIGKILL) -> None:
    """Send a signal, whether or not the process is still there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


if __name__ == "__main__":
    note_steps(Path(os.environ[NOTES]) / os.environ[NUMBER], pause_s=float(os.environ.get(PAUSE_S, "0")))
    run_app(app)
