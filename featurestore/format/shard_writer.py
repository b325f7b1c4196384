"""Writer of a shard's files: block by block, so that they need not fit into memory, and checked before they count.

Letters of shapes: K rows of a block, D feature width.
"""

import hashlib
import uuid
from collections.abc import Iterable
from typing import IO, Any

import pyarrow as pa
import xxhash

from featurestore.errors import CorruptFileError, InvalidRowsError
from featurestore.format.datafile import (
    DELETED,
    KEY,
    Digest,
    damaged_message,
    encoder,
    matrix_of,
    numpy_column,
    row_group_rows,
)
from featurestore.format.statistics import Moments
from featurestore.keys import shard_of_hash, splitmix64
from featurestore.spec import FileEntry, FileKind, StoreInfo
from featurestore.storage.storage import Storage

_STATISTICS_SHARE = 4  # statistics are kept where the features take at least this many times their bytes
_CHUNK_BYTES = 8 << 20


def write_shard_file(
    storage: Storage, info: StoreInfo, shard: int, blocks: Iterable[pa.Table], kind: FileKind, based_on: int
) -> FileEntry:
    """Write rows of one shard as a new immutable file, with statistics in a second one.

    There are no statistics where they would be larger than a quarter of the rows' features. Over all blocks the rows
    are in the order of splitmix64, each key once.

    Both are read back and compared before the entry is returned. Nothing is visible before a commit names the entry.
    On a disk the memory of one block is needed, on an object store that of the file. Raises InvalidRowsError.
    """
    name = f"data/{shard:04d}/{uuid.uuid4().hex}"
    rows = _WrittenRows(info, shard)
    with storage.open_output(f"{name}.parquet") as output:
        hashed = HashedOutput(output)
        with encoder(hashed, info) as writer:
            for block in blocks:
                rows.add(block)
                writer.write_table(block, row_group_rows(info))
    sha256 = hashed.sha256.hexdigest()
    check_digest(storage, f"{name}.parquet", hashed.size_bytes, "sha256", sha256)
    statistics: dict[str, str] = {}
    if rows.count * info.row_bytes >= _STATISTICS_SHARE * rows.moments.size_bytes:
        path, data = f"{name}.stats.npy", rows.moments.to_bytes()
        storage.write_bytes(path, data)
        digest = hashlib.sha256(data).hexdigest()
        check_digest(storage, path, len(data), "sha256", digest)
        statistics = {"statistics_path": path, "statistics_sha256": digest}
    return FileEntry(
        path=f"{name}.parquet",
        bytes=hashed.size_bytes,
        rows=rows.count,
        num_deleted=rows.count - rows.moments.count,
        sha256=sha256,
        xxh3_128=hashed.xxh3_128.hexdigest(),
        kind=kind,
        info_digest=info.digest,
        based_on=based_on,
        **statistics,
    )


def check_digest(storage: Storage, path: str, size_bytes: int, algorithm: Digest, expected: str) -> None:
    """Read a file in pieces, and raise CorruptFileError where it is not what was written, or is missing."""
    digest = hashlib.sha256() if algorithm == "sha256" else xxhash.xxh3_128()
    try:
        if size_bytes <= _CHUNK_BYTES:  # one request
            digest.update(storage.read_bytes(path))
        else:
            with storage.open_input(path) as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
    except FileNotFoundError as error:
        raise CorruptFileError(f"{storage.full(path)} is missing") from error
    if digest.hexdigest() != expected:
        raise CorruptFileError(damaged_message(storage.full(path), algorithm))


class _WrittenRows:
    """Counts and moments of the rows written so far; refuses rows that are out of place."""

    def __init__(self, info: StoreInfo, shard: int) -> None:
        self.info, self.shard = info, shard
        self.count = 0
        self.moments = Moments.empty(info.dim)  # of the live rows
        self._last_hash: int = -1

    def add(self, block: pa.Table) -> None:
        keys_K, deleted_K = numpy_column(block, KEY), numpy_column(block, DELETED)
        hash_K = splitmix64(keys_K)
        strays = keys_K[shard_of_hash(hash_K, self.info.num_shards) != self.shard]
        if len(strays):
            raise InvalidRowsError(f"key {strays[0]} and {len(strays) - 1} more do not belong to shard {self.shard}")
        assert len(block) == 0 or int(hash_K[0]) > self._last_hash, "blocks out of order"
        assert bool((hash_K[1:] > hash_K[:-1]).all()), "rows out of order"
        features_KD = matrix_of(block, self.info)
        live = features_KD[~deleted_K] if deleted_K.any() else features_KD
        self.moments = self.moments.merged(Moments.of(live, self.info.dtype))
        self.count += len(block)
        self._last_hash = int(hash_K[-1]) if len(block) else self._last_hash


class HashedOutput:
    """A file to write, and the digests of what went into it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256, self.xxh3_128 = hashlib.sha256(), xxhash.xxh3_128()
        self.size_bytes = 0
        self.closed = False  # by the writer, which closes the file itself does not

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.xxh3_128.update(data)
        self.size_bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True
