"""Check of data files: is each what was committed, and do those of a shard agree? The rows' part of `verify`.

Letters of shapes: N rows of a file, M live rows of several files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurestore.errors import CorruptFileError, StorageError
from featurestore.format.buffers import FileMemory
from featurestore.format.datafile import (
    DELETED,
    KEY,
    URI,
    DataFile,
    matrix_of,
    numpy_column,
    open_entry,
    schema_of,
    text_column,
)
from featurestore.format.rows import finite_rows
from featurestore.keys import Int64Array, keys_of_uris, shard_of_hash, splitmix64
from featurestore.spec import FileEntry, StoreInfo
from featurestore.storage.storage import Storage


@dataclass(frozen=True)
class FileKeys:
    """What is compared of each row of a file: key, xxh3-64 of its uri, whether it is a tombstone, all (N,)."""

    keys_N: Int64Array
    uri_hash_N: Int64Array
    deleted_N: npt.NDArray[np.bool_]


def check_file(
    storage: Storage, info: StoreInfo, shard: int, entry: FileEntry, memory: FileMemory
) -> tuple[list[str], FileKeys | None]:
    """List what is wrong with a data file, and return its keys, none where it cannot be read.

    Size, sha256, page checksums, columns, row counts, order, duplicates, membership, values. Reads the whole file once;
    needs its size, from `memory`, and a block. Raises StorageError, except for a broken sector of a local disk.
    """
    path = storage.full(entry.path)
    if entry.info_digest != info.digest:
        return [f"{path} belongs to a store of another kind: its info_digest is not that of store.json"], None
    blocks, num_infinite = [], 0
    try:
        with open_entry(storage, info, entry, "sha256", memory) as file:
            for block in file.blocks(schema_of(info).names):
                num_infinite += int(np.count_nonzero(~finite_rows(matrix_of(block, info), info.dtype)))
                blocks.append(_keys_of(block))
    except CorruptFileError as error:
        return [str(error)], None
    keys = _joined(blocks)
    found = list(_broken_promises(keys, info, shard, entry))
    if num_infinite:
        found.append(f"holds {num_infinite} features that are not finite")
    return [f"{path} {promise}" for promise in found], keys


def collisions(files: Sequence[FileKeys]) -> Int64Array:
    """Return keys that get another uri while they live, in files of one shard, oldest first; deleted keys are free."""
    keys_M, uri_M = np.empty(0, np.int64), np.empty(0, np.int64)  # live rows, by key
    broken = []
    for file in files:
        is_live_N = ~file.deleted_N
        new_M, place_M = np.unique(file.keys_N[is_live_N], return_index=True)
        new_uri_M = file.uri_hash_N[is_live_N][place_M]
        common, mine, theirs = np.intersect1d(keys_M, new_M, assume_unique=True, return_indices=True)
        broken.append(common[uri_M[mine] != new_uri_M[theirs]])
        stays_M = ~np.isin(keys_M, file.keys_N)
        keys_M, uri_M = np.append(keys_M[stays_M], new_M), np.append(uri_M[stays_M], new_uri_M)
    return np.unique(np.concatenate([np.empty(0, np.int64), *broken]))


def readable_keys(storage: Storage, info: StoreInfo, shard: int, entry: FileEntry) -> tuple[FileKeys, list[str]]:
    """Read the keys that can still be read of a damaged file, and uris (empty where those cannot).

    Row groups whose pages do not fit their checksums are left out. Nothing at all where the file is gone, its footer is
    broken, or it is another file than the one that was committed: of another size, other rows, or with keys of other
    shards."""
    found, uris = [], []
    try:
        if storage.size(entry.path) != entry.bytes:
            return _joined([]), []
        with storage.open_input(entry.path) as source:
            file = DataFile(source, info, storage.full(entry.path))
            if file.num_rows != entry.rows:
                return _joined([]), []
            for group in range(len(file.group_starts) - 1):
                table = _readable_group(file, group)
                if table is not None:
                    found.append(_keys_of(table))
                    uris += text_column(table, URI)
    except (CorruptFileError, StorageError, FileNotFoundError):
        pass  # what was read before is good
    keys = _joined(found)
    if (shard_of_hash(splitmix64(keys.keys_N), info.num_shards) != shard).any():
        return _joined([]), []
    return keys, uris


def _joined(parts: Sequence[FileKeys]) -> FileKeys:
    return FileKeys(
        np.concatenate([np.empty(0, np.int64), *(each.keys_N for each in parts)]),
        np.concatenate([np.empty(0, np.int64), *(each.uri_hash_N for each in parts)]),
        np.concatenate([np.empty(0, np.bool_), *(each.deleted_N for each in parts)]),
    )


def _readable_group(file: DataFile, group: int) -> pa.Table | None:
    try:
        table = file.read([KEY], [group])
    except CorruptFileError:
        return None
    columns: dict[str, Any] = {
        URI: pa.array([""] * len(table), pa.string()),
        DELETED: pa.array(np.zeros(len(table), np.bool_)),
    }
    for name in columns:
        try:
            columns[name] = file.read([name], [group])[name]
        except CorruptFileError:
            continue
    columns[KEY] = table[KEY]
    return pa.table(columns)


def _keys_of(table: pa.Table) -> FileKeys:
    keys_N, deleted_N = numpy_column(table, KEY), numpy_column(table, DELETED)
    return FileKeys(keys_N.copy(), keys_of_uris(text_column(table, URI)), deleted_N.copy())


def _broken_promises(keys: FileKeys, info: StoreInfo, shard: int, entry: FileEntry) -> Iterator[str]:
    hash_N = splitmix64(keys.keys_N)
    if len(np.unique(hash_N)) != len(hash_N):
        yield "holds a key twice"
    elif (hash_N[1:] < hash_N[:-1]).any():
        yield "is not in the order of splitmix64"
    strays = int((shard_of_hash(hash_N, info.num_shards) != shard).sum())
    if strays:
        yield f"holds {strays} keys that do not belong to shard {shard}"
    num_deleted = int(np.count_nonzero(keys.deleted_N))
    if num_deleted != entry.num_deleted:
        yield f"has {num_deleted} tombstones instead of {entry.num_deleted}"
