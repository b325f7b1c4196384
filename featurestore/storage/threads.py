"""Threads for requests: a pool that stops at the first error, and a property that lets them not wait for each other."""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Self, TypeVar, overload

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


class cached_property(Generic[ResultT]):  # noqa: N801 - it takes the place of functools'
    """A property that is computed when it is first asked for, and kept; no thread waits for another.

    Before Python 3.12 functools' has one lock for all instances of a class, and holds it while it computes: reads of
    shards by several threads came one after the other. Two threads that ask one instance at once compute it twice.
    """

    def __init__(self, compute: Callable[[Any], ResultT]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> ResultT: ...

    def __get__(self, instance: object | None, owner: type) -> Self | ResultT:
        if instance is None:
            return self
        result: ResultT = self._compute(instance)
        instance.__dict__[self._name] = result
        return result
