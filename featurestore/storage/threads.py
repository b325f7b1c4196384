"""Work on many things in a few threads, and report how far it is."""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Progress = Callable[[int, int], None]  # things done, things in all
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def in_threads(
    work: Callable[[ItemT], ResultT], items: Collection[ItemT], threads: int, progress: Progress | None = None
) -> Iterator[ResultT]:
    """Yield the result of `work` for each of `items`, in their order; `progress` is called after each.

    All items wait in a queue, and results until they are asked for. An error of one ends it: what waits is not begun.
    """
    with ThreadPoolExecutor(threads) as pool:
        for done, result in enumerate(pool.map(work, items), start=1):
            yield result
            if progress is not None:
                progress(done, len(items))
