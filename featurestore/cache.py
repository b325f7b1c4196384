"""Local files of one shard: its keys and its rows, ready to be mapped into memory.

They are named after the digest of the data files they were made from, so runs, ranks and other numbers of ranks share
one folder, and a new snapshot rebuilds only the shards that changed. Files of replaced shards stay; the folder may be
emptied whenever no run uses it.
"""

import hashlib
import io
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featurestore.errors import CorruptFileError, StorageError
from featurestore.keys import Int64Array, UInt64Array, shard_of_hash, splitmix64
from featurestore.shard import ShardReader

_CACHE_FORMAT = 1


@dataclass(frozen=True)
class CachedShard:
    """The file of one shard's rows (none where M is 0), and the splitmix64 of its keys, ascending (M,)."""

    rows_path: Path
    hash_M: UInt64Array


def default_cache_dir() -> Path:
    """Where cache files go unless a folder is named: crossmedia/features below the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crossmedia" / "features"


def open_or_build(reader: ShardReader, folder: Path) -> CachedShard:
    """The cached shard; built first where it is not there, or has another size than it must have.

    Safe with any number of processes in one folder: files appear whole, and equal names have equal content. Raises
    CorruptFileError where a data file of the store is damaged, StorageError where the folder cannot be written.
    """
    keys_path, rows_path = _paths(reader, folder)
    if not reader.entries:
        return CachedShard(rows_path, np.empty(0, np.uint64))
    try:
        return _open(reader, keys_path, rows_path) or _build(reader, keys_path, rows_path)
    except OSError as error:
        raise StorageError(f"cannot use the cache folder {folder}: {error}") from error


def _paths(reader: ShardReader, folder: Path) -> tuple[Path, Path]:
    made_from = [str(_CACHE_FORMAT), reader.info.digest, *(entry.sha256 for entry in reader.entries)]
    digest = hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:24]
    stem = f"shard-{reader.shard:04d}-{digest}"
    return folder / f"{stem}.keys.npy", folder / f"{stem}.rows.bin"


def _open(reader: ShardReader, keys_path: Path, rows_path: Path) -> CachedShard | None:
    """None where a file is missing, cut short, or not what `_build` writes."""
    try:
        keys_M = np.load(keys_path, allow_pickle=False)
        size = rows_path.stat().st_size
    except (FileNotFoundError, ValueError, EOFError):
        return None
    if keys_M.ndim != 1 or keys_M.dtype != np.int64 or size != len(keys_M) * reader.info.row_bytes:
        return None
    hash_M = splitmix64(keys_M)
    return CachedShard(rows_path, hash_M) if _belong(hash_M, reader) else None


def _build(reader: ShardReader, keys_path: Path, rows_path: Path) -> CachedShard:
    keys_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = keys_path.parent / f".tmp-{uuid.uuid4().hex}"
    blocks: list[Int64Array] = [np.empty(0, np.int64)]
    try:
        with temporary.open("xb", buffering=0) as file:
            for keys_M, features_MD in reader.verified_blocks():
                blocks.append(keys_M)
                _write_all(file, features_MD.data.cast("B") if len(keys_M) else memoryview(b""))
        keys_M = np.concatenate(blocks)
        hash_M = splitmix64(keys_M)
        if not _belong(hash_M, reader):
            raise CorruptFileError(
                f"the files of shard {reader.shard} of {reader.storage.url} are out of order or hold keys of other"
                " shards: run python -m featurestore verify"
            )
        temporary.replace(rows_path)
        with temporary.open("xb") as file:
            np.save(file, keys_M)
        temporary.replace(keys_path)  # last: where the keys are, the rows are complete
    finally:
        temporary.unlink(missing_ok=True)
    return CachedShard(rows_path, hash_M)


def _write_all(file: io.FileIO, data: memoryview) -> None:
    while len(data):  # a raw write may take a part
        data = data[file.write(data) :]


def _belong(hash_M: UInt64Array, reader: ShardReader) -> bool:
    in_order = bool((hash_M[1:] > hash_M[:-1]).all())
    return in_order and bool((shard_of_hash(hash_M, reader.info.num_shards) == reader.shard).all())
