"""Background tasks of seconds or minutes: each runs once, in a thread of the server, and reports its progress.

A page that needs one shows its progress and polls until the task is done.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from threading import Event, Lock
from typing import Generic, TypeVar

from explorer.errors import ExplorerError

T = TypeVar("T")

KEPT = 64
"""Number of cached results, those requested last."""
_RETRY_S = 60.0


class Task(Generic[T]):
    """One computation: waiting, running, done or failed."""

    def __init__(self) -> None:
        self.done, self.total = 0, 0
        """Progress; 0 of 0: unknown."""
        self.doing = "waits for other work to end"
        self._ended = Event()
        self.ended_s = 0.0
        self.error: Exception | None = None
        self._results: list[T] = []
        self.is_cancelled = False
        """Set when the server ends; long work checks it."""

    def tell(self, doing: str, done: int = 0, total: int = 0) -> None:
        """Report the current step and its progress. Raises CancelledError if the server is ending."""
        if self.is_cancelled:
            raise CancelledError
        self.doing, self.done, self.total = doing, done, total

    @property
    def is_ended(self) -> bool:
        """Return whether the task has ended, so that `result` returns at once."""
        return self._ended.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end, with a timeout; return whether the task has ended."""
        return self._ended.wait(timeout_s)

    def result(self) -> T:
        """Wait for the end and return the result. Raises what the computation raised."""
        self._ended.wait()
        if self.error is not None:
            raise self.error
        return self._results[0]

    def run(self, work: "Callable[[Task[T]], T]") -> None:
        """Do the work in this thread; its return value or error becomes the result."""
        try:
            self._results.append(work(self))
        except CancelledError:
            self.error = ExplorerError("the server is ending")
        except Exception as error:
            self.error = error
        finally:
            self.ended_s = time.monotonic()
            self._ended.set()

    @property
    def _is_stale(self) -> bool:
        return self.is_ended and self.error is not None and time.monotonic() - self.ended_s > _RETRY_S


class Background:
    """All background tasks of a server, by name: two at a time, plus one at a time of the exclusive ones (`alone`)."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2, "explorer-background")
        self._alone = ThreadPoolExecutor(1, "explorer-alone")
        self._tasks: OrderedDict[str, Task[object]] = OrderedDict()
        self._lock = Lock()

    def task(self, name: str, work: Callable[[Task[T]], T], *, alone: bool = False) -> Task[T]:
        """Return the task of this name, starting it if it is new; a failed one is restarted after a minute.

        `name` must include everything that the result depends on. `alone`: never runs together with another such task.
        """
        with self._lock:
            known = self._tasks.get(name)
            if known is not None and not known._is_stale:
                self._tasks.move_to_end(name)
                return known  # type: ignore[return-value]
            task: Task[T] = Task()
            self._tasks[name] = task  # type: ignore[assignment]
            ended = [each for each, other in self._tasks.items() if other.is_ended]
            for each in ended[: max(0, len(self._tasks) - KEPT)]:
                del self._tasks[each]
        (self._alone if alone else self._threads).submit(task.run, work)
        return task

    def close(self) -> None:
        """Tell running tasks to end, and wait for them."""
        with self._lock:
            for task in self._tasks.values():
                task.is_cancelled = True
        self._threads.shutdown(wait=True)
        self._alone.shutdown(wait=True)
