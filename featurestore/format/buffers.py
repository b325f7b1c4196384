"""Memory for the contents of whole files, shared by threads and never more than a limit."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class FileMemory:
    """Buffers that are lent, one for each file being read, and used again.

    Fresh memory would cost the kernel as much as the reading itself. All buffers together, lent or idle, stay within
    `limit_bytes`, whatever the number of threads; a thread that finds no room waits until another gives a buffer back.
    A single buffer larger than the limit is lent when no other is.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.peak_bytes = 0  # the most that was ever held
        self._idle: list[bytearray] = []
        self._held_bytes = 0
        self._num_lent = 0
        self._changed = threading.Condition()

    @contextmanager
    def borrow(self, size_bytes: int) -> Iterator[memoryview]:
        """Lend a view of `size_bytes`, with any content; nothing may look into it after the block."""
        buffer = self._take(size_bytes)
        try:
            yield memoryview(buffer)[:size_bytes]
        finally:
            with self._changed:
                self._idle.append(buffer)
                self._num_lent -= 1
                self._changed.notify_all()

    def _take(self, size_bytes: int) -> bytearray:
        with self._changed:
            while True:
                fitting = [buffer for buffer in self._idle if len(buffer) >= size_bytes]
                if fitting:
                    buffer = min(fitting, key=len)
                    self._idle.remove(buffer)
                    self._num_lent += 1
                    return buffer
                self._drop_idle(size_bytes)
                if self._held_bytes + size_bytes <= self.limit_bytes or not self._num_lent:
                    buffer = bytearray(size_bytes)  # may raise MemoryError: nothing is counted yet
                    self._held_bytes += size_bytes
                    self.peak_bytes = max(self.peak_bytes, self._held_bytes)
                    self._num_lent += 1
                    return buffer
                self._changed.wait()

    def _drop_idle(self, size_bytes: int) -> None:
        """Drop the largest of the idle buffers, all too small, for its successor, and others where the limit asks."""
        self._idle.sort(key=len)
        keep = max(0, len(self._idle) - 1)
        while self._idle and (len(self._idle) > keep or self._held_bytes + size_bytes > self.limit_bytes):
            self._held_bytes -= len(self._idle.pop())
