"""Where the time of a step goes: named stages, timed on whatever thread they run, and named in a profiler's trace."""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch.profiler import record_function

Stage = Literal[
    # Of step t + 1, in a thread beside step t.
    "read",
    "unique",
    "exchange keys",
    "gather",
    # Of step t itself.
    "wait for the next batch",
    "embed images",
    "exchange vectors",
    "worker forward",
    "worker backward",
    "exchange gradients",
    "embed backward",
    "update id rows",
    "reduce gradients",
    "update dense",
]
AHEAD: tuple[Stage, ...] = ("read", "unique", "exchange keys", "gather")
WAIT: Stage = "wait for the next batch"

_KEPT_STEPS = 1000


class Stages:
    """Seconds of the stages of the last thousand steps; each stage belongs to one thread."""

    def __init__(self) -> None:
        self._seconds: dict[Stage, deque[float]] = {}

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """The block is one run of the stage."""
        start_s = time.perf_counter()
        with record_function(stage):
            yield
        self.add(stage, time.perf_counter() - start_s)

    def add(self, stage: Stage, seconds: float) -> None:
        """A run of the stage that was timed elsewhere."""
        self._seconds.setdefault(stage, deque(maxlen=_KEPT_STEPS)).append(seconds)

    def last_ms(self) -> dict[Stage, float]:
        """Milliseconds of each stage's newest run."""
        return {stage: 1e3 * seconds[-1] for stage, seconds in self._seconds.items()}

    def medians_ms(self) -> dict[Stage, float]:
        """Median milliseconds of each stage, without its first run, in the order of a step."""
        known = [stage for stage in Stage.__args__ if stage in self._seconds]  # type: ignore[attr-defined]
        return {
            stage: 1e3 * statistics.median(list(self._seconds[stage])[1:] or self._seconds[stage]) for stage in known
        }
