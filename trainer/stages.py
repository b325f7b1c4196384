"""The named stages of a step, timed on the thread that runs them, and named in a profiler's trace."""

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

from torch.profiler import record_function

Item = TypeVar("Item")

StageAhead = Literal[
    # Of a later step, in the thread that reads.
    "read",
    # Of step t + 1, in a thread during step t.
    "wait for samples",
    "unique",
    "exchange keys",
    "gather",
    "exchange signatures",
    "compare images",
]
Stage = Literal[
    StageAhead,
    # Of step t itself.
    "wait for the next batch",
    "embed images",
    "exchange vectors",
    "worker forward",
    "worker backward",
    "exchange gradients",
    "embed backward",
    "wait for the loss",
    "update id rows",
    "reduce gradients",
    "update dense",
    "rest",
]
AHEAD: tuple[Stage, ...] = get_args(StageAhead)
WAIT: Stage = "wait for the next batch"
_REST: Stage = "rest"

Kind = Literal["step", "eval"]
"""Of what a batch is prepared for."""

_KEPT_STEPS = 1000


class Stages:
    """Seconds of the stages of the last thousand training steps; each stage belongs to one thread."""

    def __init__(self) -> None:
        self._seconds: dict[Stage, deque[float]] = {}

    @contextmanager
    def timed(self, stage: Stage, kind: Kind = "step") -> Iterator[None]:
        """Time the block as one run of the stage; in an evaluation it only gets its name in the trace."""
        start_s = time.perf_counter()
        with record_function(stage):
            yield
        if kind == "step":
            self.add(stage, time.perf_counter() - start_s)

    def each(self, stage: Stage, items: Iterator[Item], kind: Kind = "step") -> Iterator[Item]:
        """Yield the items; to get each of them is one run of the stage."""
        with contextlib.suppress(StopIteration):
            while True:
                with self.timed(stage, kind):
                    item = next(items)
                yield item

    def add(self, stage: Stage, seconds: float) -> None:
        """Count a run of the stage."""
        self._seconds.setdefault(stage, deque(maxlen=_KEPT_STEPS)).append(seconds)

    def add_rest(self, seconds: float) -> None:
        """Count what a step that took `seconds`, without the wait for its batch, took beyond its stages."""
        others = {*AHEAD, WAIT, _REST}
        named_s = sum(series[-1] for stage, series in self._seconds.items() if stage not in others)
        self.add(_REST, max(0.0, seconds - named_s))

    def begin(self, stage: Stage) -> "StageSequence":
        """Begin a stage that ends where the next one begins, perhaps in another function."""
        return StageSequence(self, stage)

    def last_ms(self) -> dict[Stage, float]:
        """Return the milliseconds of each stage's newest run."""
        return {stage: 1e3 * seconds[-1] for stage, seconds in self._seconds.items()}

    def medians_ms(self) -> dict[Stage, float]:
        """Return the median milliseconds of each stage, without its first run, in the order of a step."""
        known = [stage for stage in Stage.__args__ if stage in self._seconds]  # type: ignore[attr-defined]
        return {
            stage: 1e3 * statistics.median(list(self._seconds[stage])[1:] or self._seconds[stage]) for stage in known
        }

    def step_spread(self) -> float:
        """Return a step's deviation over its median, from the median deviation: a rare slow step does not count."""
        own = [seconds for stage, seconds in self._seconds.items() if stage not in AHEAD]
        steps_s: list[float] = [sum(each) for each in zip(*own, strict=False)][1:]
        if not steps_s:
            return 0.0
        middle_s = statistics.median(steps_s)
        return 1.4826 * statistics.median(abs(each - middle_s) for each in steps_s) / middle_s


class StageSequence:
    """Stages one after the other; `switch` ends one and begins the next, None ends the last."""

    def __init__(self, stages: Stages, stage: Stage) -> None:
        self._stages = stages
        self._running: tuple[Stage, float, record_function] | None = None
        self.switch(stage)

    def switch(self, stage: Stage | None) -> None:
        """End the running stage and begin `stage`."""
        if self._running is not None:
            name, start_s, record = self._running
            record.__exit__(None, None, None)
            self._stages.add(name, time.perf_counter() - start_s)
            self._running = None
        if stage is not None:
            self._running = (stage, time.perf_counter(), record_function(stage))
            self._running[2].__enter__()  # type: ignore[no-untyped-call]
