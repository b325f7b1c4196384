"""Background tasks of seconds or minutes: each runs once, in a thread of the server, and reports its progress.

A page that needs one shows its progress and polls until the task is done.
"""

import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from threading import Event, Lock
from typing import Any, Generic, TypeVar

from explorer.data.cache import LruCache
from explorer.errors import ExplorerError
from explorer.problems import Problem

T = TypeVar("T")

KEPT_BYTES = 64_000_000
"""The results that are cached, those requested last, take as much memory together, or one takes more."""
_LEAST_BYTES = 1_000_000
"""What a task counts at least, so that they are few: a mapped result holds a file open."""
_RETRY_S = 60.0


class Task(Generic[T]):
    """One computation: waiting, running, done or failed."""

    def __init__(self, name: str = "") -> None:
        self.name = name
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
            self.error = ExplorerError(Problem.ENDING)
        except Exception as error:
            self.error = error
        finally:
            self.ended_s = time.monotonic()
            self._ended.set()

    @property
    def size_bytes(self) -> int:
        """The memory that the result takes, if it says so."""
        return _LEAST_BYTES + sum(getattr(result, "size_bytes", 0) for result in self._results)

    @property
    def is_stale(self) -> bool:
        """Return whether the task failed some time ago."""
        return self.is_ended and self.error is not None and time.monotonic() - self.ended_s > _RETRY_S


class Background:
    """All background tasks of a server, by name: two at a time, plus one at a time of the exclusive ones (`alone`)."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2, "explorer-background")
        self._alone = ThreadPoolExecutor(1, "explorer-alone")
        self._running: dict[str, Task[Any]] = {}
        self._ended: LruCache[Task[Any]] = LruCache(KEPT_BYTES, lambda task: task.size_bytes)
        self._lock = Lock()

    def task(self, name: str, work: Callable[[Task[T]], T], *, alone: bool = False) -> Task[T]:
        """Return the task of this name, starting it if it is new; a failed one is restarted after a minute.

        `name` must include everything that the result depends on. A large result has `size_bytes`. `alone`: never runs
        together with another such task.
        """
        with self._lock:
            known = self._running.get(name) or self._ended.peek(name)
            if known is not None and not known.is_stale:
                return known
            task = self._running[name] = Task[T](name)
        (self._alone if alone else self._threads).submit(self._run, task, work)
        return task

    def _run(self, task: Task[T], work: Callable[[Task[T]], T]) -> None:
        task.run(work)
        with self._lock:
            self._ended.put(task.name, self._running.pop(task.name))

    def close(self) -> None:
        """Tell running tasks to end, and wait for them."""
        with self._lock:
            for task in self._running.values():
                task.is_cancelled = True
        self._threads.shutdown(wait=True)
        self._alone.shutdown(wait=True)
