"""The first lookup after a restart: nothing of the files is in memory.

The page cache of each one's files is dropped (posix_fadvise after fsync, which leaves only pages that no process maps)
and mincore tells what is left: more than `_LEFT_SHARE` of it (a folder in memory, say) and there are no figures. Timed
are opening and the first lookup. A partition reads its rows in one go as it opens, which the disk does fastest, and
serves from memory ever after; the others read around each row as it is asked for. The disk of a virtual machine may
have a cache of its own, below this one, that nobody here can empty.
"""

import ctypes
import gc
import mmap
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.report import Figure, Section
from benchmarks.store.data import Bench, Held, check_equal
from benchmarks.store.peers import Peer

_LEFT_SHARE = 0.01


def cold_figures(bench: Bench, held: Held, peers: Mapping[str, Peer]) -> Section:
    """Measure opening and first lookup of each, medians of a few rounds, in one thread."""
    rng = np.random.default_rng(bench.seed + 3)
    out_UD = np.zeros((bench.num_keys, held.matrix_ND.shape[1]), held.matrix_ND.dtype)
    opened: dict[str, list[float]] = {name: [] for name in peers}
    looked_up: dict[str, list[float]] = {name: [] for name in peers}
    left = 0.0
    rounds = max(1, bench.rounds // 20)
    for _ in bench.progress.track(range(rounds), description="cold lookups"):
        for name, peer in peers.items():
            index_U = rng.integers(0, bench.num_rows, bench.num_keys)
            left = max(left, drop_page_cache(peer.folder))
            start = time.perf_counter()
            peer.open(threads=1)
            middle = time.perf_counter()
            peer.lookup(index_U, out_UD)
            end = time.perf_counter()
            check_equal(out_UD, held.matrix_ND[index_U], f"{name}, cold,")
            peer.close()
            opened[name].append(middle - start)
            looked_up[name].append(end - middle)
    dtype = held.store.info.dtype
    suffix = "" if dtype == "bfloat16" else f"_{dtype}"
    title = f"opening and first lookup of {bench.num_keys:,} keys, cold, {dtype}"
    is_cold = left <= _LEFT_SHARE
    grid: dict[str, dict[str, Figure]] = {}
    for name in peers:
        open_s, lookup_s = statistics.median(opened[name]), statistics.median(looked_up[name])
        cells = {"open_s": open_s, "lookup_s": lookup_s, "rows_per_s": bench.num_keys / (open_s + lookup_s)}
        grid[name] = {column: value if is_cold else None for column, value in cells.items()}
    return Section(title, {f"cold_share_left_in_memory{suffix}": left}, grid, prefix=f"cold{suffix}_")


def drop_page_cache(folder: Path) -> float:
    """Have the kernel forget the content of all files below `folder`; the share of their pages still in memory."""
    gc.collect()  # arrays that look into a mapped file keep its pages
    resident = pages = 0
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size:
            descriptor = os.open(path, os.O_RDWR)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
            counts = resident_pages(path)
            resident, pages = resident + counts[0], pages + counts[1]
    return resident / pages if pages else 0.0


def resident_pages(path: Path) -> tuple[int, int]:
    """Count the pages of a file, and those of them that are in memory."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        count = -(-len(mapped) // mmap.PAGESIZE)
        flags = np.zeros(count, np.uint8)
        start = ctypes.c_char.from_buffer(mapped)  # an address can only be had of memory that could be written
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), ctypes.c_void_p(flags.ctypes.data)
        )
        del start
        if result:
            raise OSError(ctypes.get_errno(), f"mincore of {path}")
        return int(np.count_nonzero(flags & 1)), count
