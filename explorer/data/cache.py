"""Caches for slow computations: values in memory, and tables as files in the explorer's cache folder."""

import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

import pyarrow as pa
from cachetools import LRUCache

from featurestore.console.files import replaced_file
from featurestore.lookup.cache import default_cache_dir
from featurestore.storage.local import claim

ValueT = TypeVar("ValueT")


class _Closing(LRUCache[Hashable, ValueT]):
    """Closes each value that it drops."""

    def __init__(self, most: int, size: Callable[[ValueT], int], close: Callable[[ValueT], object]) -> None:
        super().__init__(most, size)
        self._close = close

    def __delitem__(self, name: Hashable) -> None:
        value = self[name]
        super().__delitem__(name)
        self._close(value)


class LruCache(Generic[ValueT]):
    """Least recently used cache. A name must include everything that determines the value. Thread-safe."""

    def __init__(
        self,
        most: int,
        size: Callable[[ValueT], int] = lambda value: 1,
        close: Callable[[ValueT], object] = lambda value: None,
    ) -> None:
        """`most`: largest sum of the `size` of all values; the least recently used one is dropped first, by `close`.

        The value that was put last stays, whatever its size.
        """
        self._values = _Closing(most, lambda value: min(size(value), most), close)
        self._lock = Lock()
        self._gates: dict[Hashable, Lock] = {}

    def peek(self, name: Hashable) -> ValueT | None:
        """Return the value if it is cached, without waiting."""
        with self._lock:
            return self._values.get(name)

    def get(self, name: Hashable, make: Callable[[], ValueT]) -> ValueT:
        """Return the value; concurrent callers compute it once, unless `make` raises: an error is not cached."""
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
        with self._lock:
            self._values.pop(name, None)
            self._values[name] = value

    def discard(self, name: Hashable) -> None:
        """Drop a value, if it is cached."""
        with self._lock:
            self._values.pop(name, None)

    def clear(self) -> None:
        """Drop all values."""
        with self._lock:
            while self._values:
                self._values.popitem()


_ABOUT = b"explorer"


def digest_of(inputs: Any) -> str:
    """Digest values that JSON can hold: 24 hexadecimal digits."""
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]


def described(schema: pa.Schema, about: Any) -> pa.Schema:
    """Add what a cached table is about, which JSON can hold, to its schema."""
    return schema.with_metadata({_ABOUT: json.dumps(about)})


def about_of(table: pa.Table) -> Any:
    """Return what `described` added to the table's schema."""
    return json.loads((table.schema.metadata or {})[_ABOUT])


@dataclass(frozen=True)
class TableCache:
    """Tables of one kind as files in the explorer's cache folder; the `most` used last stay.

    A file is mapped into memory: only what is read of it is there.
    """

    prefix: str
    most: int

    def path(self, digest: str) -> Path:
        """Return the file of the table whose inputs have this digest. Raises StorageError."""
        return explorer_cache() / f"{self.prefix}{digest}.arrow"

    def get(self, digest: str, make: Callable[[], Iterable[pa.Table]]) -> pa.Table:
        """Read the table whose inputs have this digest, or make it, write it and read it.

        `make` gives its parts, at least one, with `described` schemas. Threads and processes make one table of a kind
        at a time; where `make` raises, no file is left. A damaged file is made again. Raises OSError, StorageError.
        """
        file = self.path(digest)
        found = self._read(file)
        return self._made(file, make) if found is None else found

    def _made(self, file: Path, make: Callable[[], Iterable[pa.Table]]) -> pa.Table:
        with (explorer_cache() / f"{self.prefix}lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (found := self._read(file)) is None:  # else another one has made it meanwhile
                with replaced_file(file) as part:
                    self._write(part, iter(make()))
                found = self._read(file)
                assert found is not None
                self._prune()
        return found

    def _read(self, file: Path) -> pa.Table | None:
        """Read a file; None if it is missing or damaged."""
        try:
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
            about_of(table)
        except FileNotFoundError:
            return None
        except (OSError, KeyError, ValueError, pa.ArrowException):
            file.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            os.utime(file)  # for `_prune`
        return table

    def _write(self, file: Path, parts: Iterator[pa.Table]) -> None:
        first = next(parts)
        with pa.OSFile(str(file), "wb") as out, pa.ipc.new_file(out, first.schema) as writer:
            for part in itertools.chain([first], parts):
                writer.write_table(part)

    def _prune(self) -> None:
        """Remove those used longest ago; those that are mapped stay valid."""
        found = explorer_cache().glob(f"{self.prefix}*.arrow")
        for old in sorted(found, key=lambda each: each.stat().st_mtime, reverse=True)[self.most :]:
            old.unlink(missing_ok=True)


def explorer_cache() -> Path:
    """Return the folder of the explorer's cached files, creating it private to this user.

    Raises StorageError.
    """
    folder = default_cache_dir().with_name("explorer")
    claim(folder)
    return folder
