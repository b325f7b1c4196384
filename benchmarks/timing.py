"""Timing of variants against each other on a machine that is never quite still."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.progress import Progress


@dataclass(frozen=True)
class Timings:
    """Seconds of every timed round of each variant.

    Two ways to make one figure of them. The median fits work that is short and does the same in each round, such as
    lookups. For work of seconds that allocates much memory take the fastest round: what disturbs it (other processes, a
    host that first has to find the pages of a virtual machine) only ever adds time, as the documentation of `timeit`
    says of its own repeats. And it does not add to both sides alike: a page costs a build of 6 us a row as much as one
    of 27 us a row, so a ratio of medians says how disturbed the run was, the ratio of fastest rounds how fast the code.
    """

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median of the rounds of one variant."""
        return statistics.median(self.seconds[name])

    def fastest(self, name: str) -> float:
        """Return the fastest round of one variant."""
        return min(self.seconds[name])

    def speedup(self, name: str, over: str) -> float:
        """Compute how many times as fast `name` is as `over`, by medians."""
        return self.median(over) / self.median(name)

    def fastest_speedup(self, name: str, over: str) -> float:
        """Compute how many times as fast `name` is as `over`, by fastest rounds."""
        return self.fastest(over) / self.fastest(name)


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    progress: Progress,
    title: str,
    before_each: Callable[[], object] | None = None,
) -> Timings:
    """Time each variant `rounds` times, all of them in every round.

    Every round runs each of them once, so that a slow moment hits all alike; every second round in reverse, so that
    none always follows the same other.

    `before_each` runs, untimed, before every single run: to draw new keys, or to empty a folder. One round warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    task = progress.add_task(title, total=rounds + 1)
    for round_ in range(rounds + 1):
        for name, run in list(variants.items())[:: -1 if round_ % 2 else 1]:
            if before_each is not None:
                before_each()
            gc.collect(0)
            start = time.perf_counter()
            result = run()
            elapsed = time.perf_counter() - start
            del result
            if round_:
                seconds[name].append(elapsed)
        progress.advance(task)
    return Timings(seconds)
