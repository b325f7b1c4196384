"""What is measured: the variants, where and for how long each of them runs, and the figures that come of it."""

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.problems import Problem
from benchmarks.process import fuxictr_python, run_to_end
from benchmarks.report import Figure, Section
from benchmarks.timing import in_turns
from benchmarks.workload import Workload
from featurestore.errors import UserError

_CHECKED_LOSSES = 2
_LOSS_TOLERANCE = 2e-3


class DifferentLossesError(UserError):
    """Two variants that should be one model are not; their speeds cannot be compared."""


@dataclass(frozen=True)
class Outcome:
    """What one run of one variant did."""

    samples_per_s: float
    losses: list[float]
    report: Mapping[str, Any]


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
        self._run([*command, *self._set([*every, *length, *settings])])
        report = json.loads((self.scratch / name / "report.json").read_text())
        losses = _losses(self.scratch / name / "tensorboard")
        shutil.rmtree(self.scratch / name)
        return Outcome(report["samples_per_s"], losses, report)

    def peer(self, variant: str, steps: int, settings: Sequence[str] = (), python: str | None = None) -> Outcome:
        """Run a variant of benchmarks.train.peer, with the same settings."""
        out = self.scratch / f"{variant}.json"
        command = ["-m", "benchmarks.train.peer", variant, "--config", str(self.workload.config)]
        extra = ["--steps", str(steps), "--json", str(out), *self._set(settings)]
        self._run([*command, *extra], python)
        report = json.loads(out.read_text())
        out.unlink()
        return Outcome(report["samples_per_s"], report["losses"], report)

    def _set(self, settings: Sequence[str]) -> list[str]:
        return [word for each in (*self.workload.settings(self.ranks), *settings) for word in ("--set", each)]

    def _run(self, arguments: Sequence[str], python: str | None = None) -> None:
        """Run the ranks to their end. Raises RunFailedError."""
        command = [python or sys.executable, *arguments]
        if self.ranks > 1:
            horovodrun = str(Path(sys.executable).with_name("horovodrun"))
            command = [horovodrun, "-np", str(self.ranks), *command]
        run_to_end(command, self.scratch / "output.txt")


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
            values = (name, first_name, losses, first, worst, _LOSS_TOLERANCE)
            raise DifferentLossesError(Problem.DIFFERENT_LOSSES, *values)


_CHECKED_STEPS = 3
_SAME_MODEL = (("ours", "compute"), ("ours_2_ranks", "server"))
FUXICTR = ("fuxictr", "fuxictr_grouped")
COMPACT = "compact"
VARIANTS = (*_SAME_MODEL[0], "ours_large_batch", *_SAME_MODEL[1], *FUXICTR)


@dataclass(frozen=True)
class Bench:
    """What all sections share.

    `steps`: of a run of the trainer at one rank; slower variants make fewer. `dims`: numbers of a compact row.
    """

    workload: Workload
    scratch: Path
    rounds: int
    steps: int
    dims: int
    settings: Sequence[str]
    progress: Progress

    def launcher(self, ranks: int) -> Launcher:
        """Return what starts a number of ranks on this host."""
        return Launcher(self.workload, self.scratch, ranks)

    @property
    def steps_2_ranks(self) -> int:
        """The steps of the trainer on two ranks: as many samples as at one rank."""
        return max(3, self.steps // 2)

    def variants(self) -> dict[str, Run]:
        """Return all variants that take part in the rounds, by name."""
        one, two, few = self.launcher(1), self.launcher(2), max(3, self.steps // 3)
        large = [*self.workload.settings(2), *self.settings]
        runs: dict[str, Run] = {
            "ours": lambda: one.trainer("ours", self.steps, self.settings),
            "ours_large_batch": lambda: one.trainer("ours", self.steps_2_ranks, large),
            "compute": lambda: one.peer("compute", max(3, self.steps // 2), self.settings),
            "ours_2_ranks": lambda: two.trainer("ours", self.steps_2_ranks, self.settings),
            "server": lambda: two.peer("server", self.steps_2_ranks, self.settings),
        }
        if (python := fuxictr_python()).exists():
            runs |= {name: partial(one.peer, name, few, self.settings, python=str(python)) for name in FUXICTR}
        return runs


def measure(bench: Bench, only: Sequence[str]) -> list[Section]:
    """Measure all sections, or those of `only`, the headline first. Raises RunFailedError, DifferentLossesError."""
    chosen = {name: run for name, run in bench.variants().items() if not only or name in only}
    checked = _checked(bench, chosen)
    rounds = rounds_of(chosen, bench.rounds, bench.progress, "rounds")
    for same in _SAME_MODEL:
        check_losses(rounds.outcomes | checked, same)
    sections = [Section("samples per second", beside(rounds), rounds.grid())]
    if not only or COMPACT in only:
        sections.append(compact_section(bench))
    return [Section("headline", headline(rounds)), *sections]


def headline(rounds: Rounds) -> dict[str, Figure]:
    """Return the figures that have a target."""
    return {
        "step_vs_compute": rounds.ratio("compute", "ours"),
        "two_ranks_vs_one": rounds.ratio("ours_2_ranks", "ours"),
        "vs_store_in_server": rounds.ratio("ours_2_ranks", "server"),
        "vs_fuxictr": rounds.ratio("ours", "fuxictr"),
        "samples_per_s": rounds.speed("ours") if "ours" in rounds else None,
    }


def beside(rounds: Rounds) -> dict[str, Figure]:
    """Return what to read next to the headline: the same ratios under conditions that are less kind to us."""
    figures = {
        "two_ranks_vs_one_of_the_same_batch": rounds.ratio("ours_2_ranks", "ours_large_batch"),
        "vs_fuxictr_grouped": rounds.ratio("ours", "fuxictr_grouped"),
    }
    return {name: value for name, value in figures.items() if value is not None}


def compact_section(bench: Bench) -> Section:
    """Measure the trainer on compact rows over the full width, and over its own products and FuxiCTR on the same rows.

    What compact rows keep of GAUC is a table of stores (benchmarks/tables/beyond.yaml).
    """
    from featurestore.store import FeatureStore
    from featurestore.upkeep.remake import remake

    place = bench.workload.folder / f"features-{bench.dims}-bfloat16"
    report = remake(FeatureStore.open(bench.workload.store), place, dims=bench.dims, dtype="bfloat16")
    one, few, compact = bench.launcher(1), max(3, bench.steps // 2), [*bench.settings, f"data.store={place}"]
    runs: dict[str, Run] = {
        "full": partial(one.trainer, "full", bench.steps, bench.settings),
        "compact": partial(one.trainer, "compact", bench.steps, compact),
        "compute": partial(one.peer, "compute", few, compact),
    }
    if (python := fuxictr_python()).exists():
        runs |= {name: partial(one.peer, name, few, compact, python=str(python)) for name in FUXICTR}
    checked = one.trainer("check", _CHECKED_STEPS, [*compact, "train.log_every=1"])
    rounds = rounds_of(runs, bench.rounds, bench.progress, "compact rows")
    check_losses({**rounds.outcomes, "compact": [checked]}, ("compact", "compute"))
    figures: dict[str, Figure] = {
        "compact_vs_full": rounds.ratio("compact", "full"),
        "step_vs_compute_compact": rounds.ratio("compute", "compact"),
        "samples_per_s_compact": rounds.speed("compact"),
        "vs_fuxictr_compact": rounds.ratio("compact", "fuxictr"),
        "vs_fuxictr_compact_grouped": rounds.ratio("compact", "fuxictr_grouped"),
        "compact_bytes_share": report.row_bytes_share,
        "compact_files_share": report.bytes / report.source_bytes,
    }
    return Section(f"rows of {bench.dims} numbers", figures, rounds.grid(), prefix="compact_rows_")


def _checked(bench: Bench, chosen: Mapping[str, Run]) -> dict[str, list[Outcome]]:
    """Short runs of the trainer that log every loss; the first also builds the cache of the store."""
    every, checked = [*bench.settings, "train.log_every=1"], {}
    task = bench.progress.add_task("first losses, and the cache of the store", total=2)
    for name, ranks in (("ours", 1), ("ours_2_ranks", 2)):
        if ranks == 1 or any(other in chosen for other in _SAME_MODEL[1]):
            checked[name] = [bench.launcher(ranks).trainer("check", _CHECKED_STEPS, every)]
        bench.progress.advance(task)
    return checked
