"""Caches for slow computations: values in memory, and files in the explorer's cache folder."""

import shutil
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from featurestore.lookup.cache import default_cache_dir
from featurestore.storage.local import claim

ValueT = TypeVar("ValueT")


class LruCache(Generic[ValueT]):
    """Least recently used cache. A name must include everything that determines the value. Thread-safe."""

    def __init__(
        self,
        most: int,
        size: Callable[[ValueT], int] = lambda value: 1,
        close: Callable[[ValueT], object] = lambda value: None,
    ) -> None:
        """`most`: largest sum of the `size` of all values; the least recently used one is dropped first, by `close`."""
        self._most, self._size, self._close, self._lock = most, size, close, Lock()
        self._values: OrderedDict[Hashable, ValueT] = OrderedDict()
        self._gates: dict[Hashable, Lock] = {}
        self.size = 0
        """The sum of the sizes of the cached values."""

    def peek(self, name: Hashable) -> ValueT | None:
        """Return the value if it is cached, without waiting."""
        with self._lock:
            if name in self._values:
                self._values.move_to_end(name)
            return self._values.get(name)

    def get(self, name: Hashable, make: Callable[[], ValueT]) -> ValueT:
        """Return the value; concurrent callers compute it once. An error of `make` is not cached."""
        if (found := self.peek(name)) is not None:
            return found
        with self._lock:
            gate = self._gates.setdefault(name, Lock())
        with gate:
            try:
                if (found := self.peek(name)) is None:
                    found = make()
                    self.put(name, found)
                return found
            finally:
                with self._lock:
                    self._gates.pop(name, None)

    def put(self, name: Hashable, value: ValueT) -> None:
        """Cache a value."""
        self.discard(name)
        dropped = []
        with self._lock:
            self._values[name] = value
            self.size += self._size(value)
            while self.size > self._most:
                dropped.append(self._values.popitem(last=False)[1])
                self.size -= self._size(dropped[-1])
        for each in dropped:
            self._close(each)

    def discard(self, name: Hashable) -> None:
        """Drop a value, if it is cached."""
        with self._lock:
            dropped = self._values.pop(name, None)
            if dropped is None:
                return
            self.size -= self._size(dropped)
        self._close(dropped)

    def clear(self) -> None:
        """Drop all values."""
        for name in list(self._values):
            self.discard(name)


@dataclass(frozen=True)
class FileCache:
    """Files, or folders, of one kind in the explorer's cache folder; the `most` used last stay."""

    prefix: str
    suffix: str
    most: int

    def path(self, digest: str) -> Path:
        """Return the place of what has this digest of its inputs. Raises StorageError."""
        return explorer_cache() / f"{self.prefix}{digest}{self.suffix}"

    def prune(self) -> None:
        """Remove those used longest ago; existing memory maps stay valid."""
        found = explorer_cache().glob(f"{self.prefix}*{self.suffix}")
        for old in sorted(found, key=lambda each: each.stat().st_mtime, reverse=True)[self.most :]:
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)


def explorer_cache() -> Path:
    """Return the folder of the explorer's cached files, creating it private to this user.

    Raises StorageError.
    """
    folder = default_cache_dir().with_name("explorer")
    claim(folder)
    return folder
