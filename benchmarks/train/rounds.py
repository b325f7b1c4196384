"""Rounds of all variants, and what is made of them: medians, spread, and the proof that all trained the same model."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.progress import Progress

from benchmarks.report import Figure
from benchmarks.train.launch import Outcome
from featurestore.errors import UserError

Run = Callable[[], Outcome]

_CHECKED_LOSSES = 2  # "store in worker" has no more batches on its disk
_LOSS_TOLERANCE = 2e-3


class DifferentLossesError(UserError):
    """Two variants that should be one model are not; their speeds cannot be compared."""


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


def interleaved(variants: Mapping[str, Run], rounds: int, progress: Progress, title: str) -> Rounds:
    """Run every variant once a round, every second round in reverse, so that a slow moment hits all alike."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in variants}
    task = progress.add_task(title, total=rounds * len(variants))
    for round_ in range(rounds):
        for name, run in list(variants.items())[:: -1 if round_ % 2 else 1]:
            progress.update(task, description=f"{title}: {name}")
            outcomes[name].append(run())
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
