"""Local files of one shard: its keys and its rows, ready to be mapped into memory, and a small seal.

They are named after the digest of the data files they were made from, so runs, ranks and other numbers of ranks share
one folder, and a new snapshot rebuilds only the shards that changed. Files of replaced shards stay; the folder may be
emptied whenever no run uses it.

The seal holds digests of both. That of the keys is checked at each opening. The rows may be larger than memory, so
their size alone is; but they are not waited for on their way to the disk either, which a power cut could use to leave
zeros. So after a restart of the machine, known by its boot id, they are read through once.
"""

import contextlib
import hashlib
import io
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from featurestore.errors import CorruptFileError, StorageError
from featurestore.keys import Int64Array, UInt64Array, shard_of_hash, splitmix64
from featurestore.shard import ShardReader
from featurestore.storage import Scratch

_CACHE_FORMAT = 1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CHUNK_BYTES = 8 << 20

Progress = Callable[[int, int], None]  # shards ready, shards in all


@dataclass(frozen=True)
class CachedShard:
    """The file of one shard's rows (none where M is 0), and the splitmix64 of its keys, ascending (M,)."""

    rows_path: Path
    hash_M: UInt64Array


class _Paths(NamedTuple):
    keys: Path
    rows: Path
    seal: Path


class _Seal(BaseModel):
    model_config = ConfigDict(extra="forbid")

    num_rows: int
    keys_xxh3_128: str
    rows_xxh3_128: str
    boot_id: str


def default_cache_dir() -> Path:
    """Where cache files go unless a folder is named: crossmedia/features below the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crossmedia" / "features"


def open_or_build(
    readers: Sequence[ShardReader], folder: Path, threads: int, progress: Progress | None = None
) -> list[CachedShard]:
    """The cached shards, in the order of `readers`. What is not there, or is not what was built, is built first.

    Safe with any number of processes in one folder: files appear whole, and equal names have equal content. Raises
    CorruptFileError where a data file of the store is damaged, StorageError where the folder cannot be written.
    """
    memory = threading.local()
    cached = []
    with ThreadPoolExecutor(threads, initializer=lambda: setattr(memory, "scratch", Scratch())) as pool:
        for shard in pool.map(lambda reader: _open_or_build(reader, folder, memory.scratch), readers):
            cached.append(shard)
            if progress is not None:
                progress(len(cached), len(readers))
    return cached


def append_rows(file: io.FileIO, rows_MD: npt.NDArray[np.generic]) -> None:
    """Write rows at the end of an unbuffered file."""
    if rows_MD.size == 0:
        return
    data = rows_MD.data.cast("B")
    with contextlib.suppress(OSError):  # a hint, worth a third of the time: not every file system has it
        os.posix_fallocate(file.fileno(), file.tell(), len(data))
    while len(data):  # a raw write may take a part
        data = data[file.write(data) :]


def _open_or_build(reader: ShardReader, folder: Path, scratch: Scratch) -> CachedShard:
    paths = _paths(reader, folder)
    if not reader.entries:
        return CachedShard(paths.rows, np.empty(0, np.uint64))
    try:
        return _open(reader, paths) or _build(reader, paths, scratch)
    except OSError as error:
        raise StorageError(f"cannot use the cache folder {folder}: {error}") from error


def _paths(reader: ShardReader, folder: Path) -> _Paths:
    made_from = [str(_CACHE_FORMAT), reader.info.digest, *(entry.sha256 for entry in reader.entries)]
    digest = hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:24]
    stem = f"shard-{reader.shard:04d}-{digest}"
    return _Paths(folder / f"{stem}.keys.npy", folder / f"{stem}.rows.bin", folder / f"{stem}.json")


def _open(reader: ShardReader, paths: _Paths) -> CachedShard | None:
    """None where a file is missing, cut short, or not what `_build` wrote."""
    try:
        seal = _Seal.model_validate_json(paths.seal.read_bytes())
        keys_M = np.load(paths.keys, allow_pickle=False)
        size = paths.rows.stat().st_size
    except (FileNotFoundError, ValidationError, ValueError, EOFError):
        return None
    whole = keys_M.dtype == np.int64 and keys_M.shape == (seal.num_rows,)
    if not whole or size != seal.num_rows * reader.info.row_bytes or _digest(keys_M) != seal.keys_xxh3_128:
        return None
    boot_id = _boot_id()
    if seal.boot_id != boot_id or not boot_id:
        if _digest_of_file(paths.rows) != seal.rows_xxh3_128:
            return None
        _publish_seal(paths, seal.model_copy(update={"boot_id": boot_id}))
    return CachedShard(paths.rows, splitmix64(keys_M))


def _build(reader: ShardReader, paths: _Paths, scratch: Scratch) -> CachedShard:
    paths.rows.parent.mkdir(parents=True, exist_ok=True)
    blocks: list[Int64Array] = [np.empty(0, np.int64)]
    rows_digest = xxhash.xxh3_128()
    with _appearing(paths.rows) as file:
        for keys_M, features_MD in reader.verified_blocks(scratch):
            blocks.append(keys_M.copy())
            append_rows(file, features_MD)
            rows_digest.update(features_MD.data)
        keys_M = np.concatenate(blocks)
        hash_M = splitmix64(keys_M)
        _check_order(hash_M, reader)
    with _appearing(paths.keys) as file:
        np.save(file, keys_M)
    _publish_seal(
        paths,
        _Seal(
            num_rows=len(keys_M),
            keys_xxh3_128=_digest(keys_M),
            rows_xxh3_128=rows_digest.hexdigest(),
            boot_id=_boot_id(),
        ),
    )
    return CachedShard(paths.rows, hash_M)


def _publish_seal(paths: _Paths, seal: _Seal) -> None:
    """The last of the three files: where it is, the others are complete."""
    with _appearing(paths.seal) as file:
        file.write(seal.model_dump_json().encode())


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[io.FileIO]:
    """A file to write that gets its name at the end of the block, and vanishes where the block raises."""
    temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        with temporary.open("xb", buffering=0) as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_order(hash_M: UInt64Array, reader: ShardReader) -> None:
    in_order = bool((hash_M[1:] > hash_M[:-1]).all())
    if not in_order or not bool((shard_of_hash(hash_M, reader.info.num_shards) == reader.shard).all()):
        raise CorruptFileError(
            f"the files of shard {reader.shard} of {reader.storage.url} are out of order or hold keys of other shards:"
            " run python -m featurestore verify"
        )


def _digest(keys_M: Int64Array) -> str:
    return xxhash.xxh3_128_hexdigest(keys_M.tobytes())


def _digest_of_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _boot_id() -> str:
    """Empty where the system has none; then rows are read through at each opening."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
