"""Runs of the trainer and of its peers as processes of their own: commands, what they wrote, the memory they took."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.process import run_to_end
from benchmarks.workload import Workload


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
        """Run `python -m trainer.main` on the real files; no checkpoint but the last. Losses: those that are logged."""
        every = [f"run.name={name}", "run.overwrite=true", f"run.dir={self.scratch}"]
        length = [f"train.max_steps={steps}", "train.epochs=1000", "train.checkpoint_every=null"]
        command = ["-m", "trainer.main", "--config", str(self.workload.config)]
        resident = self._run([*command, *self._set([*every, *length, *settings])])
        report = json.loads((self.scratch / name / "report.json").read_text())
        losses = _losses(self.scratch / name / "tensorboard")
        shutil.rmtree(self.scratch / name)
        return Outcome(report["samples_per_s"], losses, report, resident)

    def peer(self, variant: str, steps: int, settings: Sequence[str] = (), python: str | None = None) -> Outcome:
        """Run a variant of benchmarks.train.peer, with the same settings."""
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
        memory = run_to_end(command, self.scratch / "output.txt", self.environment)
        return [each.largest_resident for each in memory]


def _losses(folder: Path) -> list[float]:
    """The losses that TensorBoard's files of a run have: of the steps that were logged, none in a short run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    logged = "train/loss" in events.Tags()["scalars"]
    return [float(event.value) for event in events.Scalars("train/loss")] if logged else []
