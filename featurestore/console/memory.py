"""How much of the memory that it has freed a server keeps: it runs for weeks beside other programs."""

import contextlib
import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MOST_ARENAS = -1, -3, -8  # numbers of mallopt(3)
_ARROW_POOL = "ARROW_DEFAULT_MEMORY_POOL"


def bound_freed_memory(largest_kept: int) -> None:
    """Keep freed blocks of up to `largest_kept` bytes, and hardly more than these in all, for the next allocation.

    Call it before other threads start. By default glibc keeps what each thread has freed, and so does Arrow's own pool:
    Arrow takes memory from glibc then, unless the environment names a pool. Does nothing with another C library.
    """
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        libc.mallopt(_MMAP_THRESHOLD, largest_kept)
        libc.mallopt(_TRIM_THRESHOLD, largest_kept)
        libc.mallopt(_MOST_ARENAS, 2)
        if _ARROW_POOL not in os.environ:
            import pyarrow as pa

            pa.set_memory_pool(pa.system_memory_pool())


def return_freed_memory() -> None:
    """Return freed memory to the system, also whole pages between blocks that are in use; takes some milliseconds."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
