"""Runs of the trainer and of its peers as processes of their own: commands, what they wrote, the memory they took."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.workload import Workload
from featurestore.errors import UserError

_POLL_S = 0.25


class RunFailedError(UserError):
    """A process of a variant failed; the text has its last lines."""


@dataclass(frozen=True)
class Outcome:
    """What one run of one variant did."""

    samples_per_s: float
    losses: list[float]
    report: Mapping[str, Any]
    resident_bytes: list[int] = field(default_factory=list)
    """Of the largest rank, in the order of time."""


@dataclass(frozen=True)
class Launcher:
    """Starts ranks. `prefix`: what `horovodrun -np P` is called by, where the ranks do not all stand on this host."""

    workload: Workload
    scratch: Path
    ranks: int = 1
    prefix: Sequence[str] = ()
    environment: Mapping[str, str] | None = None

    def trainer(self, name: str, steps: int, settings: Sequence[str] = ()) -> Outcome:
        """`python -m trainer.main` on the real files; no checkpoint but the last. Losses: those that are logged."""
        every = [f"run.name={name}", "run.overwrite=true", f"run.dir={self.scratch}"]
        length = [f"train.max_steps={steps}", "train.epochs=1000", "train.checkpoint_every=null"]
        command = ["-m", "trainer.main", "--config", str(self.workload.config)]
        resident = self._run([*command, *self._set([*every, *length, *settings])])
        report = json.loads((self.scratch / name / "report.json").read_text())
        losses = _losses(self.scratch / name / "tensorboard")
        shutil.rmtree(self.scratch / name)
        return Outcome(report["samples_per_s"], losses, report, resident)

    def peer(self, variant: str, steps: int, settings: Sequence[str] = (), python: str | None = None) -> Outcome:
        """A variant of benchmarks.train.peer, with the same settings."""
        out = self.scratch / f"{variant}.json"
        command = ["-m", "benchmarks.train.peer", variant, "--config", str(self.workload.config)]
        extra = ["--steps", str(steps), "--json", str(out), *self._set(settings)]
        resident = self._run([*command, *extra], python)
        report = json.loads(out.read_text())
        out.unlink()
        return Outcome(report["samples_per_s"], report["losses"], report, resident)

    def _set(self, settings: Sequence[str]) -> list[str]:
        return [word for each in (*self.workload.settings(self.ranks), *settings) for word in ("--set", each)]

    def _run(self, arguments: Sequence[str], python: str | None = None) -> list[int]:
        """Runs the ranks to their end; resident bytes of the largest. Raises RunFailedError."""
        command = [*self.prefix, python or sys.executable, *arguments]
        if self.ranks > 1 and not self.prefix:
            horovodrun = str(Path(sys.executable).with_name("horovodrun"))
            command = [horovodrun, "-np", str(self.ranks), *command]
        log = self.scratch / "output.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=self.environment)
            with _ended(process), _watched(process.pid) as resident:
                code = process.wait()
        if code:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise RunFailedError(f"{' '.join(command)}\nended with {code}:\n{tail}")
        return resident


@contextmanager
def _ended(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """The process is gone behind the block, also after Ctrl-C; horovodrun ends its ranks at SIGTERM."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


@contextmanager
def _watched(pid: int) -> Iterator[list[int]]:
    """Resident bytes of the largest process below `pid`, itself included, four times a second."""
    sizes: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_S):
            try:
                root = psutil.Process(pid)
                sizes.append(max(_resident(each) for each in (root, *root.children(recursive=True))))
            except psutil.NoSuchProcess:
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield sizes
    finally:
        ended.set()
        watcher.join()


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _losses(folder: Path) -> list[float]:
    """The losses that TensorBoard's files of a run have: of the steps that were logged, none in a short run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    logged = "train/loss" in events.Tags()["scalars"]
    return [float(event.value) for event in events.Scalars("train/loss")] if logged else []
