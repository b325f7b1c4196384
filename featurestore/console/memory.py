"""Settings of the memory that a process keeps after it has freed it."""

import contextlib
import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MOST_ARENAS = -1, -3, -8  # numbers of mallopt(3)
_ARROW_POOL = "ARROW_DEFAULT_MEMORY_POOL"
_LARGEST_KEPT = 32 << 20  # more glibc does not allow
_KEPT_IN_ALL = 512 << 20


def keep_freed_memory(largest_kept: int = _LARGEST_KEPT, in_all: int = _KEPT_IN_ALL) -> None:
    """Keep freed blocks of up to `largest_kept` bytes, and `in_all` bytes of them, for the next allocation.

    By default glibc returns large blocks at once, and in each step of a training the kernel finds and clears the same
    pages again: a tenth of the time of E's forward and backward. So much is for a process that does nothing else: a
    server would keep what each of its threads has freed. Does nothing with another C library.
    """
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        libc.mallopt(_MMAP_THRESHOLD, largest_kept)
        libc.mallopt(_TRIM_THRESHOLD, in_all)


def bound_freed_memory(largest_kept: int) -> None:
    """Keep freed blocks of up to `largest_kept` bytes, and hardly more than these in all: for servers.

    They run for weeks beside other programs. Call it before other threads start. By default glibc keeps what each
    thread has freed, and so does Arrow's own pool: Arrow takes memory from glibc then, unless the environment names a
    pool. Does nothing with another C library.
    """
    keep_freed_memory(largest_kept, largest_kept)
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_MOST_ARENAS, 2)
        if _ARROW_POOL not in os.environ:
            import pyarrow as pa

            pa.set_memory_pool(pa.system_memory_pool())


def return_freed_memory() -> None:
    """Return freed memory to the system, also whole pages between blocks that are in use; takes some milliseconds."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
