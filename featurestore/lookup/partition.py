"""One rank's partition of a snapshot: rows in memory or mapped, found by a hash index.

Letters of shapes: M rows or hashes held, U keys or hashes asked, C of them in a piece, D feature width.

numpy gathers from one matrix at the speed of memory; from one array per file it would need a copy more. The kernel maps
each file at its own place in a reserved range; nothing is read until a row is touched.
"""

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from featurestore.errors import FeatureStoreError, MissingKeysError, StorageError
from featurestore.keys import Int64Array, UInt64Array, owned_shards, sampled, shard_of, shard_of_hash, splitmix64
from featurestore.lookup.cache import CachedShard, default_cache_dir, open_or_build
from featurestore.published.channels import VersionName
from featurestore.snapshot import Snapshot, SnapshotId, missing_message
from featurestore.spec import MissingPolicy, StoreInfo
from featurestore.storage.threads import Progress
from featurestore.store import FeatureStore
from featurestore.text import DType

_MAX_THREADS = 4
_PAGE_BYTES = 4096
_GATHER_ROWS = 1024
_TOUCHED_BYTES = 1024  # rows narrower than this are copied a third faster without `_touch_and_take`
_MEMORY_SHARE = 0.5  # of the machine's; a larger partition is read from the disk as its rows are asked for
_SMALL_BYTES = 1 << 20  # below this a second thread costs more than it gives


@dataclass(frozen=True)
class Lookup:
    """Features in the order asked, (U, D) in numpy's dtype of the store, and which keys have none, (U,) bool."""

    features_UD: npt.NDArray[Any]
    missing_U: npt.NDArray[np.bool_]


class FeaturePartition:
    """The rows of the shards that one rank owns. Lookups may run in several threads at once."""

    def __init__(
        self,
        snapshot: Snapshot,
        shards: Sequence[int],
        cached: Sequence[CachedShard],
        missing: MissingPolicy,
        threads: int,
        owner: str,
    ) -> None:
        """Use `load`. `shards` are those held, ascending, `cached` their files; `owner` is for messages."""
        self.info: StoreInfo = snapshot.info
        self.codec = snapshot.codec
        self.snapshot_version = snapshot.version
        self.snapshot_id = SnapshotId.of(snapshot)
        self.missing_policy = missing
        self.missing_count = 0
        self._hidden_share, self._hidden_seed = 0.0, 0
        self._owner = owner
        self._owned_S = np.zeros(self.info.num_shards, np.bool_)
        self._owned_S[list(shards)] = True
        self._owns_all = bool(self._owned_S.all())
        self._where = f"snapshot {snapshot.version} of {snapshot.storage.url}"
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lookup")
        self._lock = threading.Lock()
        self._closed = False
        counts = [len(shard.hash_M) for shard in cached]
        self._index = HashIndex(shards, [shard.hash_M for shard in cached], self.info.num_shards)
        mapped = map_rows([shard.rows_path for shard in cached], counts, self.dim, self.info.storage_dtype)
        self._matrix = mapped.matrix
        self._spans = [(first, first + count) for first, count in zip(mapped.first_rows, counts, strict=True)]
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64) if counts else np.empty(0, np.int64)
        self._gap_S = np.zeros(self.info.num_shards, np.int64)  # from the place of a hash to the row in the matrix
        self._gap_S[list(shards)] = np.asarray(mapped.first_rows) - starts
        size_bytes = self.num_rows * self.info.row_bytes
        self._has_gaps = bool(self._gap_S.any())
        self._touch_first = self.info.row_bytes >= _TOUCHED_BYTES
        if size_bytes <= _MEMORY_SHARE * physical_memory_bytes():
            list(self._pool.map(populate, [self._matrix[first:end] for first, end in self._spans]))
            if self._touch_first:
                self._touch_first = 2 * huge_page_bytes(self._matrix, size_bytes) < size_bytes

    @classmethod
    def load(
        cls,
        store_or_url: FeatureStore | str | os.PathLike[str],
        rank: int = 0,
        num_ranks: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
        missing: MissingPolicy = "error",
        threads: int | None = None,
        version: VersionName | None = None,
        progress: Progress | None = None,
    ) -> "FeaturePartition":
        """Open the shards of `rank`, of the newest snapshot or of `version`; missing local files are built.

        `version` is a number, or the name of a channel, which is looked up once.

        `threads` build and look up; by default up to 4 build, and half of the cores but no more than 4 look up: copying
        rows is bound by memory, and other ranks want theirs. A build holds 256 MB of data files, or the largest one,
        and each thread a few blocks and the keys of a shard. Removes what nobody has opened for a while from the folder
        (`featurestore.lookup.cache`). Raises what opening a store raises, and CorruptFileError for a damaged data file.
        """
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank={rank} is not in [0, num_ranks={num_ranks})")
        if missing not in get_args(MissingPolicy):
            raise ValueError(f"missing={missing!r} is none of {', '.join(get_args(MissingPolicy))}")
        store = store_or_url if isinstance(store_or_url, FeatureStore) else FeatureStore.open(store_or_url)
        snapshot = store.snapshot(version)
        folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        cores = len(os.sched_getaffinity(0))
        build_threads = threads or min(_MAX_THREADS, cores)
        owner = f"rank {rank} of {num_ranks}"
        held = owned_shards(store.info.num_shards, rank, num_ranks)
        cached = open_or_build([snapshot.shard_reader(shard) for shard in held], folder, build_threads, progress)
        try:
            return cls(snapshot, held, cached, missing, threads or max(1, min(_MAX_THREADS, cores // 2)), owner)
        except OSError as error:
            raise StorageError(f"cannot map the cache files in {folder}: {error}") from error

    @property
    def dim(self) -> int:
        """Width of a feature."""
        return self.info.dim

    @property
    def dtype(self) -> DType:
        """The store's dtype; bfloat16 rows come as their bits in uint16."""
        return self.info.dtype

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return len(self._index)

    def owns(self, keys_U: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return which keys belong to the shards of this rank, whether they have a feature or not, (U,)."""
        return self._owned_S[shard_of(keys_U, self.info.num_shards)]

    def contains(self, keys_U: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return which keys have a feature among the rows of this rank, (U,); none is read, and hidden ones count."""
        hash_U = splitmix64(keys_U)
        if self.num_rows == 0:
            return np.zeros(len(hash_U), np.bool_)
        place_U = self._index.places(hash_U, shard_of_hash(hash_U, self.info.num_shards))
        return np.asarray(self.owns(keys_U) & (self._index.hash_M[place_U] == hash_U))

    def hide(self, share: float, seed: int = 0) -> None:
        """Hide the features of a share of all keys (`featurestore.keys.sampled`) from lookups; 0 ends it.

        For experiments: what is a model worth when images are missing? Needs the policy zeros or learned; ValueError.
        """
        if share and self.missing_policy == "error":
            raise ValueError("keys can be hidden under missing=zeros or learned, not under error")
        sampled([], share, seed)
        self._hidden_share, self._hidden_seed = share, seed

    def __enter__(self) -> "FeaturePartition":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and let go of the files."""
        self._closed = True
        self._pool.shutdown()
        self._matrix = np.empty((0, self.dim), self.info.storage_dtype)

    def lookup(self, keys_U: npt.ArrayLike, out: npt.NDArray[Any] | None = None) -> Lookup:
        """Return the features of `keys_U` in the order asked.

        Written into `out` (U, D) where it is given: faster, as new memory costs as much as the rows. A key without a
        feature: the policy `error` raises MissingKeysError; `zeros` and `learned` give a row of zeros and a mask, and
        add to `missing_count`. A key of a shard that this rank does not own raises MissingKeysError.
        """
        row_U, missing_U = self._rows_of(keys_U)
        features_UD = output_for(self.info, len(row_U), out)
        self._gather(row_U, missing_U, features_UD)
        return Lookup(features_UD, missing_U)

    def lookup_blocks(self, keys_U: npt.ArrayLike, block_rows: int) -> Iterator[Lookup]:
        """Look up `block_rows` keys at a time, in memory that the next block uses again.

        For a caller that makes something else of the rows while they are in the processor's cache. What it raises comes
        before the first block.
        """
        row_U, missing_U = self._rows_of(keys_U)
        memory = output_for(self.info, min(block_rows, len(row_U)), None)
        for start in range(0, len(row_U), block_rows):
            block = slice(start, start + block_rows)
            features_CD = memory[: len(row_U[block])]
            self._gather(row_U[block], missing_U[block], features_CD)
            yield Lookup(features_CD, missing_U[block])

    def rows(self, block_rows: int) -> Iterator[npt.NDArray[Any]]:
        """Yield all rows held, as they are stored, in the order of `places`; up to `block_rows` at a time."""
        for first, end in self._spans:
            for start in range(first, end, block_rows):
                yield self._matrix[start : min(end, start + block_rows)]

    def find(self, keys_U: npt.ArrayLike) -> Int64Array:
        """Return what `places` does, for a caller that looks the rows up itself.

        Keys without a feature are counted, or raise MissingKeysError, as in `lookup`."""
        place_U, missing_U, _ = self._noted(keys_U)
        return np.where(missing_U, -1, place_U)

    def places(self, keys_U: npt.ArrayLike) -> Int64Array:
        """Return a number of its own for each key, in [0, num_rows), (U,); -1 for a key without a feature.

        The same for as long as the partition is open. A key of another rank's shard raises MissingKeysError.
        """
        place_U, missing_U, _ = self._find(keys_U)
        return np.where(missing_U, -1, place_U)

    def _find(self, keys_U: npt.ArrayLike) -> tuple[Int64Array, npt.NDArray[np.bool_], Int64Array]:
        """Return the place of each key among the hashes held, whether there is none, and its shard, (U,) each."""
        hash_U = splitmix64(keys_U)
        shard_U = shard_of_hash(hash_U, self.info.num_shards)
        if not self._owns_all:
            self._check_owned(np.asarray(keys_U), shard_U)
        if self.num_rows == 0:
            return np.zeros(len(hash_U), np.int64), np.ones(len(hash_U), np.bool_), shard_U
        place_U = self._index.places(hash_U, shard_U)
        missing_U = self._index.hash_M.take(place_U) != hash_U
        if self._hidden_share:
            missing_U |= sampled(keys_U, self._hidden_share, self._hidden_seed)
        return place_U, missing_U, shard_U

    def _rows_of(self, keys_U: npt.ArrayLike) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
        """Return each key's row in the matrix, and whether there is none, (U,) each; counts or raises the missing."""
        place_U, missing_U, shard_U = self._noted(keys_U)
        return place_U + self._gap_S[shard_U] if self._has_gaps else place_U, missing_U

    def _noted(self, keys_U: npt.ArrayLike) -> tuple[Int64Array, npt.NDArray[np.bool_], Int64Array]:
        """Do what `_find` does; count or raise the missing."""
        if self._closed:
            raise FeatureStoreError("the partition is closed")
        found = self._find(keys_U)
        if found[1].any():
            self._note_missing(np.asarray(keys_U), found[1])
        return found

    def _gather(self, row_U: Int64Array, missing_U: npt.NDArray[np.bool_], out_UD: npt.NDArray[Any]) -> None:
        if self.num_rows == 0:
            out_UD[:] = 0
            return
        any_missing = missing_U.any()
        if any_missing:  # any mapped row will do; it is zeroed below
            row_U = np.where(missing_U, 0, row_U)
        pieces = self._threads if out_UD.nbytes > _SMALL_BYTES else 1
        size = -(-len(row_U) // pieces) if len(row_U) else 1
        spans = [slice(start, start + size) for start in range(0, len(row_U), size)]
        take = _touch_and_take if self._touch_first else _take
        work = [(self._matrix, row_U[span], out_UD[span]) for span in spans]
        if len(work) > 1:
            list(self._pool.map(lambda arguments: take(*arguments), work))
        elif work:
            take(*work[0])
        if any_missing:
            out_UD[missing_U] = 0

    def _check_owned(self, keys_U: Int64Array, shard_U: Int64Array) -> None:
        strange_U = ~self._owned_S[shard_U]
        if strange_U.any():
            key, shard = keys_U.reshape(-1)[strange_U][0], shard_U[strange_U][0]
            raise MissingKeysError(
                f"{int(strange_U.sum())} of the keys asked belong to shards that {self._owner} does not own: key {key}"
                f" belongs to shard {shard}. Ask the owner (featurestore.keys.owner_of)."
            )

    def _note_missing(self, keys_U: Int64Array, missing_U: npt.NDArray[np.bool_]) -> None:
        if self.missing_policy == "error":
            raise MissingKeysError(missing_message(keys_U.reshape(-1)[missing_U], self._where))
        with self._lock:
            self.missing_count += int(missing_U.sum())


def output_for(info: StoreInfo, count: int, out: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    """Return `out`, or new memory for `count` rows of a store. Raises ValueError where `out` does not fit."""
    shape = (count, info.dim)
    if out is None:
        return np.empty(shape, info.storage_dtype)
    if out.shape != shape or out.dtype != info.storage_dtype or not out.flags.carray:
        wanted = f"{shape} {info.storage_dtype}, contiguous and writable"
        raise ValueError(f"out is {out.shape} {out.dtype}, it must be {wanted}")
    return out


def _take(matrix: npt.NDArray[Any], row_U: Int64Array, out_UD: npt.NDArray[Any]) -> None:
    """Copy the rows at these places."""
    # mode="raise" would gather into a buffer first; the rows are inside by construction.
    np.take(matrix, row_U, axis=0, out=out_UD, mode="clip")


def _touch_and_take(matrix: npt.NDArray[Any], row_U: Int64Array, out_UD: npt.NDArray[Any]) -> None:
    """Copy the rows at these places, faster where pages are small.

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


class HashIndex:
    """The splitmix64 hashes of ascending shards, one shard after the other, which is ascending too: `hash_M`.

    splitmix64 spreads keys evenly, so of as many buckets as there are keys each begins a step or two before whatever
    is in it. A table says where; that is three to four times as fast as a binary search in sorted order, and takes 4 to
    8 bytes a row. All buckets of a shard are equally wide, and shards that are not held have none.
    """

    def __init__(self, shards: Sequence[int], hashes: Sequence[UInt64Array], num_shards: int) -> None:
        """`hashes[i]` are those of `shards[i]`, ascending."""
        # After the last one comes a number that no hash exceeds, so that no walk leaves the array.
        self._walked: UInt64Array = np.concatenate([*hashes, np.array([2**64 - 1], np.uint64)])
        self.hash_M = self._walked[:-1]
        most = max((len(each) for each in hashes), default=0)
        self._bits = max(1, (most - 1).bit_length())  # of the hash, after those that name the shard
        self._shard_bits = num_shards.bit_length() - 1
        self._is_whole = len(shards) == num_shards
        self._first_bucket_S = np.zeros(num_shards, np.int64)
        self._first_bucket_S[list(shards)] = np.arange(len(shards)) << self._bits
        self._begin = np.empty(max(1, len(shards)) << self._bits, np.int32 if len(self.hash_M) < 2**31 else np.int64)
        start = 0
        for number, each in enumerate(hashes):
            counts = np.bincount(self._bucket(each), minlength=1 << self._bits)
            self._begin[number << self._bits :][: len(counts)] = start + np.cumsum(counts) - counts
            start += len(each)

    def __len__(self) -> int:
        return len(self.hash_M)

    def places(self, hash_U: UInt64Array, shard_U: Int64Array) -> Int64Array:
        """Return the only place where each hash may be, (U,) inside [0, M); M is not 0. `shard_U` are held shards."""
        place_U: Int64Array = self._begin.take(self._numbers(hash_U, shard_U)).astype(np.int64)
        behind = (self._walked.take(place_U) < hash_U).nonzero()[0]
        while len(behind):
            place_U[behind] += 1
            behind = behind[self._walked.take(place_U.take(behind)) < hash_U.take(behind)]
        np.minimum(place_U, len(self) - 1, out=place_U)
        return place_U

    def _numbers(self, hash_U: UInt64Array, shard_U: Int64Array) -> Int64Array:
        """Return the number of the bucket of each hash: of a whole index its top bits, which name the shard first."""
        if self._is_whole:
            return (hash_U >> np.uint64(64 - self._shard_bits - self._bits)).view(np.int64)
        return self._first_bucket_S[shard_U] + self._bucket(hash_U)

    def _bucket(self, hash_N: UInt64Array) -> Int64Array:
        """Return the bucket within the shard."""
        bucket_N: UInt64Array = (hash_N << np.uint64(self._shard_bits)) >> np.uint64(64 - self._bits)
        return bucket_N.view(np.int64)


_HUGE_PAGE = 2 << 20  # files that begin on one can be mapped with few entries
_LARGEST_STEP = 64 << 20
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22  # Linux 5.14; older kernels refuse it, and the pages are mapped at first touch
_SMAPS = Path("/proc/self/smaps")
_MAP_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True)
class MappedRows:
    """A read-only matrix over files of rows. File i begins at row `first_rows[i]`; the rows between files are unmapped.

    The range is released when the last array that looks into it is gone.
    """

    matrix: npt.NDArray[Any]  # (all rows and gaps, dim)
    first_rows: list[int]


def map_rows(paths: Sequence[Path], num_rows: Sequence[int], dim: int, dtype: np.dtype[Any]) -> MappedRows:
    """Map files of `num_rows[i]` rows of `dim` numbers each. Raises OSError.

    The sizes must have been checked: touching a row beyond the end of a file ends the process.
    """
    row_bytes = dim * dtype.itemsize
    step = lcm(row_bytes, _HUGE_PAGE)  # a file begins on a page and on a row
    if step > _LARGEST_STEP:  # odd widths would leave gaps of gigabytes
        step = lcm(row_bytes, mmap.PAGESIZE)
    starts = [0]
    for rows in num_rows:
        starts.append(starts[-1] + -(-rows * row_bytes // step) * step)
    if starts[-1] == 0:
        return MappedRows(np.empty((0, dim), dtype), [0] * len(paths))
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
    return MappedRows(matrix, [start // row_bytes for start in starts[:-1]])


def populate(matrix: npt.NDArray[Any]) -> None:
    """Enter the pages of a stretch of rows that lies in one file, so that later reads do not stop for each of them."""
    address = matrix.ctypes.data
    begin = address // mmap.PAGESIZE * mmap.PAGESIZE
    size = address + matrix.nbytes - begin
    for advice in (_MADV_HUGEPAGE, _MADV_POPULATE_READ):  # hints: what the kernel does not know it refuses
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice)


def huge_page_bytes(matrix: npt.NDArray[Any], size_bytes: int) -> int:
    """Return how many of the `size_bytes` of an array over mapped files are in huge pages; 0 where nobody says.

    Fewer than one huge page has are in none: the system, which is slow to answer, is not asked.
    """
    if size_bytes < _HUGE_PAGE:
        return 0
    begin = matrix.ctypes.data
    try:
        with _SMAPS.open() as lines:
            return sum_huge_pages(lines, begin, begin + matrix.nbytes)
    except OSError:
        return 0


def sum_huge_pages(smaps: Iterable[str], begin: int, end: int) -> int:
    """Add up the bytes of files mapped by huge pages in the address ranges of /proc/PID/smaps inside [begin, end)."""
    total, inside = 0, False
    for line in smaps:
        name, *values = line.split()
        if not name.endswith(":"):  # the first line of a range: 7f1a00000000-7f1a40000000 r--s ...
            first, _, last = name.partition("-")
            inside = begin <= int(first, 16) and int(last, 16) <= end
            if int(first, 16) >= end:
                break
        elif inside and name == "FilePmdMapped:":
            total += int(values[0]) * 1024
    return total


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
