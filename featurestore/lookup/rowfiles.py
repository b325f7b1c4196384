"""Files of rows mapped into memory, and rows copied out of them.

Letters of shapes: U rows asked, C of them in a piece, D feature width.

numpy gathers from one matrix at the speed of memory; from one array per file it would need a copy more. The kernel maps
each file at its own place in a reserved range; nothing is read until a row is touched.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.keys import AnyArray, Int64Array
from featurestore.problems import Problem
from featurestore.spec import StoreInfo

_TOUCHED_BYTES = 1024  # rows narrower than this are copied a third faster without `_touch_and_take`
_MEMORY_SHARE = 0.5  # of the machine's; larger files are read from the disk as their rows are asked for
_SMALL_BYTES = 1 << 20  # below this a second thread costs more than it gives
_PAGE_BYTES = 4096
_GATHER_ROWS = 1024
_HUGE_PAGE = 2 << 20  # files that begin on one can be mapped with few entries
_LARGEST_STEP = 64 << 20
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22  # Linux 5.14; older kernels refuse it, and the pages are mapped at first touch
_MAP_FAILED = ctypes.c_void_p(-1).value


class RowFiles:
    """The rows of several files in one read-only matrix, (all rows and gaps, D): file i begins at `first_rows[i]`.

    The rows between files are unmapped. Rows may be taken in several threads at once.
    """

    def __init__(
        self, paths: Sequence[Path], num_rows: Sequence[int], dim: int, dtype: np.dtype[Any], threads: int
    ) -> None:
        """Map files of `num_rows[i]` rows of `dim` numbers each; `threads` copy rows. Raises OSError."""
        self.matrix, self.first_rows = map_rows(paths, num_rows, dim, dtype)
        self.spans = [(first, first + count) for first, count in zip(self.first_rows, num_rows, strict=True)]
        """The first row of each file, and the row after its last."""
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lookup")
        row_bytes = dim * dtype.itemsize
        self._take = _touch_and_take if row_bytes >= _TOUCHED_BYTES else _take
        if sum(num_rows) * row_bytes <= _MEMORY_SHARE * physical_memory_bytes():
            list(self._pool.map(populate, [self.matrix[first:end] for first, end in self.spans]))

    def take(self, row_U: Int64Array, out_UD: AnyArray) -> None:
        """Copy the rows at these places, all inside a file."""
        pieces = self._threads if out_UD.nbytes > _SMALL_BYTES else 1
        size = -(-len(row_U) // pieces) if len(row_U) else 1
        spans = [slice(start, start + size) for start in range(0, len(row_U), size)]
        work = [(self.matrix, row_U[span], out_UD[span]) for span in spans]
        if len(work) > 1:
            list(self._pool.map(lambda arguments: self._take(*arguments), work))
        elif work:
            self._take(*work[0])

    def close(self) -> None:
        """End the threads and close the files."""
        self._pool.shutdown()
        self.matrix = np.empty((0, self.matrix.shape[1]), self.matrix.dtype)


def output_for(info: StoreInfo, count: int, out: AnyArray | None) -> AnyArray:
    """Return `out`, or new memory for `count` rows of a store. Raises ValueError where `out` does not fit."""
    shape = (count, info.dim)
    if out is None:
        return np.empty(shape, info.storage_dtype)
    if out.shape != shape or out.dtype != info.storage_dtype or not out.flags.carray:
        wanted = f"{shape} {info.storage_dtype}, contiguous and writable"
        raise ValueError(Problem.OUT_DOES_NOT_FIT.of(out.shape, out.dtype, wanted))
    return out


def _take(matrix: AnyArray, row_U: Int64Array, out_UD: AnyArray) -> None:
    """Copy the rows at these places."""
    # mode="raise" would gather into a buffer first; the rows are inside by construction.
    np.take(matrix, row_U, axis=0, out=out_UD, mode="clip")


def _touch_and_take(matrix: AnyArray, row_U: Int64Array, out_UD: AnyArray) -> None:
    """Copy wide rows at these places.

    One number of each page is read first, for many rows at once: the processor then waits for the address translations
    of many pages together instead of one after the other. A fifth to a half faster on files mapped by small pages;
    where the kernel maps them by huge ones, translations are few, and it costs 7 %."""
    flat, dim = matrix.reshape(-1), matrix.shape[1]
    for start in range(0, len(row_U), _GATHER_ROWS):
        row_C = row_U[start : start + _GATHER_ROWS]
        first_C = row_C * dim
        for offset in range(0, dim, max(1, _PAGE_BYTES // matrix.itemsize)):
            flat.take(first_C + offset, mode="clip")
        _take(matrix, row_C, out_UD[start : start + _GATHER_ROWS])


def map_rows(
    paths: Sequence[Path], num_rows: Sequence[int], dim: int, dtype: np.dtype[Any]
) -> tuple[AnyArray, list[int]]:
    """Map files of `num_rows[i]` rows of `dim` numbers each; return their matrix, and the first row of each file.

    The range is released when the last array that looks into it is gone. Raises OSError. The sizes must have been
    checked: touching a row beyond the end of a file ends the process.
    """
    row_bytes = dim * dtype.itemsize
    step = lcm(row_bytes, _HUGE_PAGE)  # a file begins on a page and on a row
    if step > _LARGEST_STEP:  # odd widths would leave gaps of gigabytes
        step = lcm(row_bytes, mmap.PAGESIZE)
    starts = [0]
    for rows in num_rows:
        starts.append(starts[-1] + -(-rows * row_bytes // step) * step)
    if starts[-1] == 0:
        return np.empty((0, dim), dtype), [0] * len(paths)
    reserved = starts[-1] + _HUGE_PAGE
    base = _mmap(None, reserved, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    address = -(-base // _HUGE_PAGE) * _HUGE_PAGE
    memory = (ctypes.c_char * starts[-1]).from_address(address)
    weakref.finalize(memory, _munmap, base, reserved)
    for path, rows, start in zip(paths, num_rows, starts, strict=False):
        if rows:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                _mmap(address + start, rows * row_bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor)
            finally:
                os.close(descriptor)
    matrix = np.frombuffer(memoryview(memory), dtype=dtype).reshape(-1, dim)
    matrix.flags.writeable = False
    return matrix, [start // row_bytes for start in starts[:-1]]


def populate(matrix: AnyArray) -> None:
    """Enter the pages of a stretch of rows that lies in one file, so that later reads do not stop for each of them."""
    address = matrix.ctypes.data
    begin = address // mmap.PAGESIZE * mmap.PAGESIZE
    size = address + matrix.nbytes - begin
    for advice in (_MADV_HUGEPAGE, _MADV_POPULATE_READ):  # hints: what the kernel does not know it refuses
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice)


def physical_memory_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    return libc


def _mmap(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    result = _libc().mmap(address, size, protection, flags, descriptor, 0)
    if result is None or result == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, f"mmap of {size} bytes: {os.strerror(error)}")
    return int(result)


def _munmap(address: int, size: int) -> None:
    _libc().munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
