"""Local files of one shard: its keys and its rows, ready to be mapped into memory, and a small seal.

They are named `shard-SHARD-STORE-DIGEST`, after the digest of the data files they were made from, so runs, ranks and
other numbers of ranks share one folder, and a new snapshot rebuilds only the shards that changed. The folder may be
emptied whenever no run uses it. So that a store that is refreshed daily does not fill the disk, opening a partition
removes

- files of the same store and shard with another digest (another snapshot's) that nobody has opened for a day;
- files of any store that nobody has opened for 30 days (a seal's time is that of its last opening, to the hour);
- what a build that was killed has left, after a day.

Runs that have the files open keep them: on Linux a mapped file lives on without its name. A run that still needs them
later builds them again.

The seal holds digests of both, and of the data files that they were made from. Keys are checked at each opening. Rows
may be larger than memory, so they are read through when they may have changed: at the first opening after a restart of
the machine, known by its boot id (they are not waited for on their way to the disk, which a power cut could use to
leave zeros), and where the file has changed since its last check, by its inode and modification time. A bit that the
disk itself flips later is found by the next restart.

The folder belongs to one user (`featurestore.storage.local`). Who can write files as that user is trusted.
"""

import contextlib
import hashlib
import io
import os
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from featurestore.errors import CorruptFileError, StorageError
from featurestore.format.codec import read_npy
from featurestore.format.datafile import FileMemory
from featurestore.format.shard import RowBlock, ShardReader
from featurestore.keys import AnyArray, Int64Array, UInt64Array, shard_of_hash, splitmix64
from featurestore.problems import Problem
from featurestore.storage.local import TEMPORARY, claim, is_private, open_private, open_regular
from featurestore.storage.storage import Progress, in_threads

SUFFIXES = (".keys.npy", ".rows.bin", ".json")
SEAL = ".json"
SAMPLES, RUNS = "samples", "runs"  # folders of the trainer
_DAY_S = 24 * 3600.0
_UNUSED_S = 30 * _DAY_S
_TOUCH_S = 3600.0
_CACHE_FORMAT = 3
STEM_DIGITS = 24  # of `made_from`, in a file's name
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MEMORY_BYTES = 256 << 20
_FILL_BYTES = 4 << 20


@dataclass(frozen=True)
class CachedShard:
    """The file of one shard's rows (none where M is 0), and the splitmix64 of its keys, ascending (M,)."""

    rows_path: Path
    hash_M: UInt64Array


class _Paths(NamedTuple):
    keys: Path
    rows: Path
    seal: Path


class CacheSeal(BaseModel):
    """Digests of the two files of `_build`, and of their sources."""

    model_config = ConfigDict(extra="forbid")

    made_from: str  # sha256 over the digests of the data files, in the manifest's order
    num_rows: int
    row_bytes: int
    keys_xxh3_128: str
    rows_xxh3_128: str
    rows_identity: str  # of the file whose digest was checked
    boot_id: str  # of the machine's run in which that was


def default_cache_dir() -> Path:
    """Return where cache files go unless a folder is named: crossmedia/features below the user's cache folder."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise StorageError(Problem.NO_HOME_FOLDER) from None
    return folder / "crossmedia" / "features"


def open_or_build(
    readers: Sequence[ShardReader], folder: Path, threads: int, progress: Progress | None = None
) -> list[CachedShard]:
    """Open the cached shards, in the order of `readers`; build missing or damaged ones first.

    Safe with any number of processes in one folder: files appear whole, and equal names have equal content. All
    threads together hold no more of the data files than 256 MB, or the largest file where that is more. Raises
    CorruptFileError where a data file of the store is damaged, StorageError where the folder cannot be written, or
    others may write into it.
    """
    if any(reader.entries for reader in readers):
        claim(folder)
    largest = max((entry.bytes for reader in readers for entry in reader.entries), default=0)
    memory = FileMemory(max(largest, _MEMORY_BYTES))
    cached = list(in_threads(lambda reader: _open_or_build(reader, folder, memory), readers, threads, progress))
    prune(folder, {_stem(reader) for reader in readers if reader.entries})
    return cached


def append_rows(file: io.FileIO, rows_MD: AnyArray) -> None:
    """Write rows at the end of an unbuffered file."""
    if rows_MD.size == 0:
        return
    data = rows_MD.data.cast("B")
    with contextlib.suppress(OSError):  # a hint, worth a third of the time: not every file system has it
        os.posix_fallocate(file.fileno(), file.tell(), len(data))
    while len(data):  # a raw write may take a part
        data = data[file.write(data) :]


def _open_or_build(reader: ShardReader, folder: Path, memory: FileMemory) -> CachedShard:
    paths = _paths(reader, folder)
    if not reader.entries:
        return CachedShard(paths.rows, np.empty(0, np.uint64))
    try:
        return _open(reader, paths) or _build(reader, paths, memory)
    except OSError as error:
        raise StorageError(Problem.CANNOT_USE_CACHE, folder, error) from error


def _paths(reader: ShardReader, folder: Path) -> _Paths:
    return _Paths(*(folder / f"{_stem(reader)}{suffix}" for suffix in SUFFIXES))


def _stem(reader: ShardReader) -> str:
    """Name the files of a shard by shard, store and content."""
    return f"shard-{reader.shard:04d}-{reader.info.store_id[:8] or 'none'}-{_made_from(reader)[:STEM_DIGITS]}"


def _made_from(reader: ShardReader) -> str:
    parts = [str(_CACHE_FORMAT), reader.info.digest, *(entry.sha256 for entry in reader.entries)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _open(reader: ShardReader, paths: _Paths) -> CachedShard | None:
    """Open the files; None if one is missing, truncated, changed since `_build`, or not private to this user."""
    try:
        _touch(paths.seal)
        if not all(is_private(path.lstat()) for path in paths):
            return None
        seal = CacheSeal.model_validate_json(paths.seal.read_bytes())
        keys_file = paths.keys.read_bytes()
        size, identity = paths.rows.stat().st_size, _identity(paths.rows)
    except (FileNotFoundError, ValidationError):
        return None
    whole = xxhash.xxh3_128_hexdigest(keys_file) == seal.keys_xxh3_128  # before numpy looks into it
    if not whole or seal.made_from != _made_from(reader) or size != seal.num_rows * reader.info.row_bytes:
        return None
    keys_M: Int64Array = read_npy(keys_file)
    boot_id = current_boot()
    if (seal.boot_id, seal.rows_identity) != (boot_id, identity) or not boot_id:
        if digest_of_file(paths.rows) != seal.rows_xxh3_128:
            return None
        _publish_seal(paths, seal.model_copy(update={"boot_id": boot_id, "rows_identity": identity}))
    return CachedShard(paths.rows, splitmix64(keys_M))


def _identity(path: Path) -> str:
    """Return the state of a file, which changes with every write, and unlike its time cannot be set back."""
    found = path.stat()
    return f"{found.st_ino} {found.st_ctime_ns}"


def _build(reader: ShardReader, paths: _Paths, memory: FileMemory) -> CachedShard:
    reader = replace(reader)  # what it keeps of the keys goes with the build
    with _appearing(paths.rows) as file:
        write = _append if reader.is_plain else _place
        # Closed also where the disk is full: the error would keep the memory that the blocks have borrowed.
        with contextlib.closing(reader.verified_blocks(memory)) as blocks:
            keys_M, rows_digest = write(file, reader, blocks)
        hash_M = splitmix64(keys_M)
        is_own_M = shard_of_hash(hash_M, reader.info.num_shards) == reader.shard
        if not is_own_M.all() or not (hash_M[1:] > hash_M[:-1]).all():
            raise CorruptFileError(Problem.SHARD_OUT_OF_ORDER, reader.shard, reader.storage.url)
    keys_file = io.BytesIO()
    np.save(keys_file, keys_M)
    with _appearing(paths.keys) as file:
        _write_at(file, keys_file.getbuffer(), 0)
    _publish_seal(
        paths,
        CacheSeal(
            made_from=_made_from(reader),
            num_rows=len(keys_M),
            row_bytes=reader.info.row_bytes,
            keys_xxh3_128=xxhash.xxh3_128_hexdigest(keys_file.getbuffer()),
            rows_xxh3_128=rows_digest,
            rows_identity=_identity(paths.rows),
            boot_id=current_boot(),
        ),
    )
    return CachedShard(paths.rows, hash_M)


def _append(file: io.FileIO, reader: ShardReader, blocks: Iterator[RowBlock]) -> tuple[Int64Array, str]:
    """Write blocks that come in order; return all keys (M,), and the digest of the rows."""
    keys: list[Int64Array] = [np.empty(0, np.int64)]
    digest = xxhash.xxh3_128()
    for block in blocks:
        keys.append(block.keys_K.copy())
        append_rows(file, block.features_KD)
        digest.update(block.features_KD.data)
    return np.concatenate(keys), digest.hexdigest()


def _place(file: io.FileIO, reader: ShardReader, blocks: Iterator[RowBlock]) -> tuple[Int64Array, str]:
    """Write each row of the blocks to its place; return all keys (M,), and the digest of the rows."""
    num_rows, row_bytes = reader.num_rows, reader.info.row_bytes
    keys_M = np.empty(num_rows, np.int64)
    num_written = 0
    _fill(file, num_rows * row_bytes)
    for block in blocks:
        keys_M[block.place_K] = block.keys_K
        num_written += len(block.keys_K)
        data = np.ascontiguousarray(block.features_KD).data.cast("B")
        breaks = np.flatnonzero(np.diff(block.place_K) != 1) + 1  # neighbours in the file are written together
        starts, ends = [0, *breaks.tolist()], [*breaks.tolist(), len(block.place_K)]
        for start, end, place in zip(starts, ends, block.place_K[starts].tolist(), strict=True):
            _write_at(file, data[start * row_bytes : end * row_bytes], place * row_bytes)
    assert num_written == num_rows
    return keys_M, digest_of_file(Path(file.name))


def _fill(file: io.FileIO, size: int) -> None:
    """Write zeros in large pieces.

    The kernel keeps what it gets at once in large pages, where lookups are faster, and rows written one by one in small
    ones."""
    zeros = np.zeros((1, min(size, _FILL_BYTES)), np.uint8)
    for start in range(0, size, _FILL_BYTES):
        append_rows(file, zeros[:, : size - start])


def _write_at(file: io.FileIO, data: memoryview, offset: int) -> None:
    while len(data):  # a raw write may take a part
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written


def _publish_seal(paths: _Paths, seal: CacheSeal) -> None:
    """Write the last of the three files: where it is, the others are complete."""
    with _appearing(paths.seal) as file:
        file.write(seal.model_dump_json().encode())


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[io.FileIO]:
    """Open a file that gets its name at the end of the block, and vanishes where the block raises."""
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        with io.FileIO(temporary, "x", opener=open_private) as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def digest_of_file(path: Path) -> str:
    """Return the xxh3-128 of a file, hexadecimal. Raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def current_boot() -> str:
    """Return the id of this run of the machine, empty where it has none: then rows are read through at each opening."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _touch(seal: Path) -> None:
    """Note that the files of a seal are opened. Raises FileNotFoundError where it is gone."""
    if time.time() - seal.stat().st_mtime > _TOUCH_S:
        try:
            os.utime(seal)
        except FileNotFoundError:
            raise
        except OSError:  # a disk that may only be read
            return


def prune(folder: Path, opened: Collection[str]) -> None:
    """Remove old files, except those of the `opened` stems. One listing; files that cannot be removed stay."""
    slots = {_slot(stem) for stem in opened}
    now_s = time.time()
    with contextlib.suppress(OSError):
        ages = {}
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):  # another rank has removed it meanwhile
                ages[entry.name] = now_s - entry.stat().st_mtime
        for name, age_s in ages.items():
            stem = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), "")
            if name.startswith(TEMPORARY) or (stem and f"{stem}{SEAL}" not in ages):
                if age_s > _DAY_S and stem not in opened:
                    _unlink(folder / name)
            elif name.endswith(SEAL) and stem not in opened:
                limit_s = _DAY_S if _slot(stem) in slots else _UNUSED_S
                if age_s > limit_s:
                    _remove(folder, stem, limit_s)


def _slot(stem: str) -> str:
    """Return shard and store of a stem."""
    return stem.rpartition("-")[0]


def _remove(folder: Path, stem: str, limit_s: float) -> None:
    """Remove the files of a stem, the seal first: without it nobody opens the others."""
    seal, aside = folder / f"{stem}{SEAL}", folder / f"{TEMPORARY}{uuid.uuid4().hex}"
    with contextlib.suppress(OSError):
        seal.rename(aside)
        if time.time() - aside.stat().st_mtime < limit_s:  # opened since the listing
            aside.rename(seal)
            return
        for suffix in SUFFIXES[:-1]:
            _unlink(folder / f"{stem}{suffix}")
        _unlink(aside)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
