"""Memory of a machine and of a process that trains for long: freed blocks are kept, long-lived objects let alone."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of mallopt(3)
_LARGEST_KEPT = 32 << 20  # more glibc does not allow
_KEPT_IN_ALL = 512 << 20
_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
    """Return the memory that processes of this machine can still take, swap and the limits of a container included.

    None where the system does not say.
    """
    known = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = (line.split(":") for line in _MEMINFO.read_text().splitlines())
        found = {name: int(value.split()[0]) << 10 for name, value in lines}
        known.append(found["MemAvailable"] + found["SwapFree"])
    return min([*known, *_limits()], default=None)


def _limits() -> Iterator[int]:
    """Return the limits of the control groups (version 2) that this process is in: in a container its own alone."""
    with contextlib.suppress(OSError):
        group = _GROUPS / _GROUP.read_text().strip().rpartition(":")[2].lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(_GROUPS):
                with contextlib.suppress(OSError, ValueError):  # "max", or no such file
                    yield int((folder / "memory.max").read_text())


def keep_freed_memory() -> None:
    """Keep freed blocks of up to 32 MB, half a gigabyte in all, for the next allocation.

    By default glibc hands large blocks back at once, and each step has the kernel find and clear the same pages anew:
    a tenth of the time of E's forward and backward. Nothing happens where the C library is another one.
    """
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT_IN_ALL)


@contextlib.contextmanager
def objects_frozen() -> Iterator[None]:
    """Let Python's garbage collector pass over the objects that are there now, within the block.

    To look at all that the imported libraries hold takes a fifth of a second. The collector does so once in a while, on
    each rank at a moment of its own, and all ranks wait. Nothing happens where the process has frozen objects already:
    the one who did it lets go of them.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
