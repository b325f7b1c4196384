"""Timing of variants against each other on a machine that is never quite still."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from rich.progress import Progress


@dataclass(frozen=True)
class Timings:
    """Seconds of every timed round of each variant."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median of the rounds of one variant."""
        return statistics.median(self.seconds[name])

    def speedup(self, name: str, over: str) -> float:
        """Compute how many times as fast `name` is as `over`, by medians."""
        return self.median(over) / self.median(name)


def in_turns(names: Iterable[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield a round's number and each name, round by round.

    So a slow moment hits all alike; every second round is in reverse, so that none always follows the same other.
    """
    order = list(names)
    for round_ in range(rounds):
        yield from ((round_, name) for name in order[:: -1 if round_ % 2 else 1])


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    progress: Progress,
    title: str,
    before_each: Callable[[], object] | None = None,
) -> Timings:
    """Time each variant `rounds` times, in turns, and once before to warm up.

    `before_each` runs, untimed, before every single run: to draw new keys, or to empty a folder.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    task = progress.add_task(title, total=(rounds + 1) * len(variants))
    for round_, name in in_turns(variants, rounds + 1):
        if before_each is not None:
            before_each()
        gc.collect(0)
        start = time.perf_counter()
        result = variants[name]()
        elapsed = time.perf_counter() - start
        del result
        if round_:
            seconds[name].append(elapsed)
        progress.advance(task)
    return Timings(seconds)
