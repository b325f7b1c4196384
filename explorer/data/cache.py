"""What takes long to compute is kept: values in memory, and files in the explorer's folder of local copies."""

import shutil
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from featurestore.lookup.cache import default_cache_dir
from featurestore.storage.local import claim

ValueT = TypeVar("ValueT")


class LruCache(Generic[ValueT]):
    """Values by name, those used last. A name says all that decides the value. For several threads."""

    def __init__(self, most: int, size: Callable[[ValueT], int] = lambda value: 1) -> None:
        """`most`: sum of the `size` of all values; the one unused for longest goes first."""
        self._most, self._size, self._lock = most, size, Lock()
        self._values: OrderedDict[Hashable, ValueT] = OrderedDict()
        self._gates: dict[Hashable, Lock] = {}
        self.size = 0
        """The sum for the values that are there."""

    def peek(self, name: Hashable) -> ValueT | None:
        """Return the value where it is there, without waiting."""
        with self._lock:
            if name in self._values:
                self._values.move_to_end(name)
            return self._values.get(name)

    def get(self, name: Hashable, make: Callable[[], ValueT]) -> ValueT:
        """Return the value, made once for all who ask where it is not there; an error of `make` is not kept."""
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
        """Keep a value."""
        with self._lock:
            if (before := self._values.pop(name, None)) is not None:
                self.size -= self._size(before)
            self._values[name] = value
            self.size += self._size(value)
            while self.size > self._most:
                _, oldest = self._values.popitem(last=False)
                self.size -= self._size(oldest)


def explorer_cache() -> Path:
    """Return the folder of what the explorer computes and keeps, which is made for this user alone.

    Raises StorageError.
    """
    folder = default_cache_dir().with_name("explorer")
    claim(folder)
    return folder


def prune(folder: Path, pattern: str, most: int) -> None:
    """Remove the files or folders of a pattern, but for the `most` used last; who has one mapped keeps it."""
    for old in sorted(folder.glob(pattern), key=lambda each: each.stat().st_mtime, reverse=True)[most:]:
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)
