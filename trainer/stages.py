"""The stages of a step: the threads that run some of them ahead, and how long each takes.

Each is timed on the thread that runs it. numpy, Arrow and Horovod let go of the interpreter for most of what runs
ahead. Where the threads of the step leave no core free, it runs while the step waits for other ranks.
"""

import contextlib
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, TypeVar, get_args

Item = TypeVar("Item")
Result = TypeVar("Result")

StageAhead = Literal[
    # Of a later step, in the thread that reads.
    "read",
    # Of step t + 1, in a thread during step t.
    "wait for samples",
    "unique",
    "exchange keys",
    "gather",
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
"""Purpose of a prepared batch."""

BATCHES_AHEAD = 2
_KEPT_STEPS = 1000
_LOWEST_PRIORITY = 19
_LATE, _TIMES = 0.2, 3  # of the time of a step; one after the other


class Stages:
    """Seconds of the stages of the last thousand training steps; each stage belongs to one thread."""

    def __init__(self) -> None:
        self._seconds: dict[Stage, deque[float]] = {}

    @contextlib.contextmanager
    def timed(self, stage: Stage, kind: Kind = "step") -> Iterator[None]:
        """Time the block as one run of the stage, unless it is of an evaluation."""
        start_s = time.perf_counter()
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
        """Count the time that a step of `seconds`, without the wait for its batch, took beyond its stages."""
        others = {*AHEAD, WAIT, _REST}
        named_s = sum(series[-1] for stage, series in self._seconds.items() if stage not in others)
        self.add(_REST, max(0.0, seconds - named_s))

    def last_ms(self) -> dict[Stage, float]:
        """Return the milliseconds of each stage's newest run."""
        return {stage: 1e3 * seconds[-1] for stage, seconds in self._seconds.items()}

    def medians_ms(self) -> dict[Stage, float]:
        """Return the median milliseconds of each stage, without its first run, in the order of a step."""
        known = [stage for stage in Stage.__args__ if stage in self._seconds]  # type: ignore[attr-defined]
        return {
            stage: 1e3 * statistics.median(list(self._seconds[stage])[1:] or self._seconds[stage]) for stage in known
        }


class StageSequence:
    """Stages one after the other, perhaps in several functions; `switch` ends one and begins the next, if any."""

    def __init__(self, stages: Stages, stage: Stage) -> None:
        self._stages = stages
        self._running: Stage | None = stage
        self._start_s = time.perf_counter()

    def switch(self, stage: Stage | None) -> None:
        """End the running stage and begin `stage`."""
        now_s = time.perf_counter()
        if self._running is not None:
            self._stages.add(self._running, now_s - self._start_s)
        self._running, self._start_s = stage, now_s


class ReadAhead(Iterator[Item]):
    """The same batches, read by a thread up to `depth` ahead; an error is raised where its batch would come.

    The thread begins at once, with the priority of who made it, not of who first asks for a batch; `close` ends it.
    """

    def __init__(self, batches: Iterator[Item], depth: int = BATCHES_AHEAD) -> None:
        self._batches = batches
        self._pool = ThreadPoolExecutor(1, "read-samples")
        self._coming = deque(self._pool.submit(next, batches) for _ in range(depth))

    def __next__(self) -> Item:
        if not self._coming:
            raise StopIteration
        try:
            batch = self._coming.popleft().result()
        except BaseException:  # StopIteration among them
            self.close()
            raise
        self._coming.append(self._pool.submit(next, self._batches))
        return batch

    def close(self) -> None:
        """End the thread; no more batches come. Safe to call twice."""
        self._coming.clear()
        self._pool.shutdown(cancel_futures=True)


def prepare_ahead(
    count: int, prepare: Callable[[], Result], *, in_background: bool = True
) -> Generator[Callable[[], Result], None, None]:
    """Call `prepare` `count` times in a thread, a call ahead; gives functions that wait for each result, or raise.

    Call n + 1 begins when result n is asked for. So ranks that ask equally often prepare equally often, and collectives
    in `prepare` meet: who has one result has begun the next one, and closing the iterator waits for that.

    `in_background`: at the lowest priority, for work that takes less time than the step beside it. Where results are
    late again and again, because other processes keep the cores busy, a thread of normal priority takes over.
    """
    pool = ThreadPoolExecutor(1, "prepare", initializer=_step_back if in_background else None)
    lateness = _Lateness()
    try:
        coming = pool.submit(prepare) if count else None
        for left in range(count - 1, -1, -1):
            assert coming is not None
            current = coming
            if in_background and lateness.times_late >= _TIMES:
                pool.shutdown()  # ends with the call that it has begun: one after the other
                pool, in_background = ThreadPoolExecutor(1, "prepare"), False
            coming = pool.submit(prepare) if left else None
            yield partial(lateness.timed, current.result)
    finally:
        pool.shutdown()


class _Lateness:
    """Measurement of whether callers wait long for results, compared with the time from one call to the next."""

    def __init__(self) -> None:
        self._asked_s: float | None = None
        self.times_late = 0
        """Number of the last results in a row that were late."""

    def timed(self, result: Callable[[], Result]) -> Result:
        """Wait for the result and return it."""
        start_s = time.perf_counter()
        value = result()
        if self._asked_s is not None:
            late = time.perf_counter() - start_s > _LATE * (start_s - self._asked_s)
            self.times_late = self.times_late + 1 if late else 0
        self._asked_s = start_s
        return value


def _step_back() -> None:
    """Lowers this thread's priority below the step's, as far as the system allows."""
    if sys.platform == "linux":  # elsewhere priorities are those of processes
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
