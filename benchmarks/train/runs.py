"""Runs of the trainer and of its peers as processes of their own, and rounds of them.

Of the rounds: medians, spread, and the proof that all of them trained the same model.
"""

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.process import run_to_end
from benchmarks.report import Figure
from benchmarks.timing import in_turns
from benchmarks.workload import Workload
from featurestore.errors import UserError

_CHECKED_LOSSES = 2  # "store in worker" has no more batches on its disk
_LOSS_TOLERANCE = 2e-3


class DifferentLossesError(UserError):
    """Two variants that should be one model are not; their speeds cannot be compared."""


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
    """Starts a number of ranks on this host."""

    workload: Workload
    scratch: Path
    ranks: int

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
        command = [python or sys.executable, *arguments]
        if self.ranks > 1:
            horovodrun = str(Path(sys.executable).with_name("horovodrun"))
            command = [horovodrun, "-np", str(self.ranks), *command]
        memory = run_to_end(command, self.scratch / "output.txt")
        return [each.largest_resident for each in memory]


def _losses(folder: Path) -> list[float]:
    """The losses that TensorBoard's files of a run have: of the steps that were logged, none in a short run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    logged = "train/loss" in events.Tags()["scalars"]
    return [float(event.value) for event in events.Scalars("train/loss")] if logged else []


Run = Callable[[], Outcome]


@dataclass(frozen=True)
class Rounds:
    """The outcomes of every variant, round by round."""

    outcomes: dict[str, list[Outcome]]

    def __contains__(self, name: object) -> bool:
        return name in self.outcomes

    def speed(self, name: str) -> float:
        """Compute samples per second: the median over rounds."""
        return statistics.median(each.samples_per_s for each in self.outcomes[name])

    def ratio(self, name: str, over: str) -> float | None:
        """Compute how many times as fast `name` is as `over`; None where one of them was not run."""
        return self.speed(name) / self.speed(over) if name in self and over in self else None

    def grid(self) -> dict[str, dict[str, Figure]]:
        """Return the median, slowest and fastest round of each variant."""
        return {
            name: {
                "samples_per_s": self.speed(name),
                "slowest": min(each.samples_per_s for each in outcomes),
                "fastest": max(each.samples_per_s for each in outcomes),
            }
            for name, outcomes in self.outcomes.items()
        }


def rounds_of(variants: Mapping[str, Run], rounds: int, progress: Progress, title: str) -> Rounds:
    """Run every variant once a round, in turns."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in variants}
    task = progress.add_task(title, total=rounds * len(variants))
    for _, name in in_turns(variants, rounds):
        progress.update(task, description=f"{title}: {name}")
        outcomes[name].append(variants[name]())
        progress.advance(task)
    progress.update(task, description=title)
    return Rounds({name: runs for name, runs in outcomes.items() if runs})


def check_losses(outcomes: Mapping[str, Sequence[Outcome]], same: Sequence[str]) -> None:
    """Check that the variants `same`, if they ran, had the same first losses. Raises DifferentLossesError.

    They differ by bfloat16's rounding and by the order of sums alone; Adam makes that a little larger with each step.
    """
    found = [(name, each.losses[:_CHECKED_LOSSES]) for name in same for each in outcomes.get(name, ())]
    for name, losses in found:
        first_name, first = found[0]
        worst = max(abs(mine - theirs) for mine, theirs in zip(losses, first, strict=False))
        if not worst <= _LOSS_TOLERANCE:  # also where it is not a number
            raise DifferentLossesError(
                f"{name} and {first_name} do not train the same model: their first losses are {losses} and {first}, "
                f"{worst:.2g} apart where {_LOSS_TOLERANCE} is allowed; no figure is reported"
            )
