"""Work ahead of its use, in threads: reading batches, and preparing the next one during the step of this one.

numpy, Arrow and Horovod let go of the interpreter for most of it. Where the threads of the step leave no core free, the
work ahead runs while the step waits for other ranks.
"""

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from trainer.samples.batch import Batch

Result = TypeVar("Result")

_LOWEST_PRIORITY = 19
_LATE, _TIMES = 0.2, 3  # of the time of a step; one after the other


class ReadAhead(Iterator[Batch]):
    """The same batches, read by a thread up to `depth` ahead (0: none); an error is raised where its batch would come.

    The thread begins at once, with the priority of who made it, not of who first asks for a batch; `close` ends it.
    """

    def __init__(self, batches: Iterator[Batch], depth: int) -> None:
        self._batches = batches
        self._pool = ThreadPoolExecutor(1, "read-samples") if depth else None
        self._coming = deque(self._pool.submit(next, batches) for _ in range(depth)) if self._pool else deque()

    def __next__(self) -> Batch:
        if self._pool is None:
            return next(self._batches)
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
        if self._pool is not None:
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
            if in_background and lateness.is_habit():
                pool.shutdown()  # ends with the call that it has begun: one after the other
                pool, in_background = ThreadPoolExecutor(1, "prepare"), False
            coming = pool.submit(prepare) if left else None
            yield partial(lateness.timed, current.result)
    finally:
        pool.shutdown()


class _Lateness:
    """Whether those who ask for results have to wait long, compared with the time from one question to the next."""

    def __init__(self) -> None:
        self._asked_s: float | None = None
        self._times_late = 0

    def timed(self, result: Callable[[], Result]) -> Result:
        """Wait for the result and return it."""
        start_s = time.perf_counter()
        value = result()
        if self._asked_s is not None:
            late = time.perf_counter() - start_s > _LATE * (start_s - self._asked_s)
            self._times_late = self._times_late + 1 if late else 0
        self._asked_s = start_s
        return value

    def is_habit(self) -> bool:
        """Tell whether the last results were all late."""
        return self._times_late >= _TIMES


def _step_back() -> None:
    """Gives this thread the lowest priority: whatever the step does goes first. Where that is refused, so be it."""
    if sys.platform == "linux":  # elsewhere priorities are those of processes
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
