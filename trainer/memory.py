"""Memory of a process that trains for long: freed blocks are kept, long-lived objects are let alone."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of mallopt(3)
_LARGEST_KEPT = 32 << 20  # more glibc does not allow
_KEPT_IN_ALL = 512 << 20


def keep_freed_memory() -> None:
    """Keeps freed blocks of up to 32 MB, half a gigabyte in all, for the next allocation.

    By default glibc hands large blocks back at once, and each step has the kernel find and clear the same pages anew:
    a tenth of the time of E's forward and backward. Nothing happens where the C library is another one.
    """
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT_IN_ALL)


@contextlib.contextmanager
def objects_frozen() -> Iterator[None]:
    """Within the block Python's garbage collector passes over the objects that are there now.

    To look at all that the imported libraries hold takes a fifth of a second. The collector does so once in a while, on
    each rank at a moment of its own, and all ranks wait.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
