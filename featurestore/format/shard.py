"""Shards: the reader and the writer of the rows of one, and its rows as Arrow.

Letters of shapes: N rows of all files or of a batch, M live rows, K rows of a block or a file, D feature width.
"""

import hashlib
import uuid
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from featurestore.errors import CorruptFileError, InvalidRowsError
from featurestore.format import datafile
from featurestore.format.codec import Codec, Moments
from featurestore.format.datafile import DELETED, FEATURE, KEY, URI, check_collisions
from featurestore.keys import AnyArray, BoolArray, Int64Array, shard_of_hash, splitmix64
from featurestore.problems import Problem
from featurestore.spec import FileEntry, FileKind, StoreInfo
from featurestore.storage.storage import Storage, cached_property, digest_of


def newest_rows(keys_N: Int64Array) -> Int64Array:
    """Find the last row of each key among rows in order of age; the result is in the order of a shard, splitmix64."""
    hash_N = splitmix64(keys_N)
    order_N = np.argsort(hash_N, kind="stable")
    sorted_N = hash_N[order_N]
    is_last_N = np.ones(len(sorted_N), np.bool_)
    is_last_N[:-1] = sorted_N[1:] != sorted_N[:-1]
    return order_N[is_last_N]


def take_rows(table: pa.Table, index_M: Int64Array) -> pa.Table:
    """Return the rows at `index_M`; the table itself where that is all of them in order."""
    if len(index_M) == len(table) and np.array_equal(index_M, np.arange(len(table))):
        return table
    return table.take(index_M)


def read_moments(storage: Storage, entry: FileEntry) -> Moments | None:
    """Read the moments of a file's live rows; None if it has no statistics. Raises CorruptFileError."""
    if entry.statistics_path is None or entry.statistics_sha256 is None:
        return None
    try:
        data = datafile.read_verified(storage, entry.statistics_path, "sha256", entry.statistics_sha256)
    except FileNotFoundError as error:
        raise CorruptFileError(Problem.MISSING, storage.full(entry.statistics_path)) from error
    return Moments.from_bytes(data, entry.num_live, storage.full(entry.statistics_path))


class RowBlock(NamedTuple):
    """Some live rows of a shard: where they belong among all of them by splitmix64, (K,), keys, features (K, D)."""

    place_K: Int64Array
    keys_K: Int64Array
    features_KD: AnyArray


@dataclass(frozen=True)
class ShardReader:
    """The live rows of one shard, by splitmix64: for each key its newest row, unless that is a tombstone."""

    storage: Storage
    info: StoreInfo
    shard: int
    entries: Sequence[FileEntry]  # oldest first

    @cached_property
    def _columns(self) -> tuple[Int64Array, BoolArray]:
        """Keys, and which are tombstones, of the rows of all files one after the other, both (N,)."""
        if not self.entries:
            return np.empty(0, np.int64), np.empty(0, np.bool_)
        table = self._concatenated([KEY, DELETED])
        return datafile.numpy_column(table, KEY), datafile.numpy_column(table, DELETED)

    @cached_property
    def _live(self) -> tuple[Int64Array, Int64Array]:
        """Keys of the live rows, and their row numbers among the rows of all files, both (M,)."""
        keys_N, deleted_N = self._columns
        index_M = newest_rows(keys_N)
        index_M = index_M[~deleted_N[index_M]]
        return keys_N[index_M], index_M

    def keys(self) -> Int64Array:
        """Return the keys of the live rows (M,). Reads two small columns."""
        return self._live[0]

    def all_keys(self) -> Int64Array:
        """Return the keys of the rows of all files one after the other, tombstones too (N,)."""
        return self._columns[0]

    def live_rows(self) -> Int64Array:
        """Return the numbers of the live rows among the rows of all files one after the other, by splitmix64 (M,)."""
        return self._live[1]

    @property
    def num_rows(self) -> int:
        """Live rows; without any read where there is one file without tombstones."""
        if self.is_plain:
            return sum(entry.rows for entry in self.entries)
        return len(self._live[0])

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read columns (all by default) of the live rows."""
        if not self.entries:
            raise AssertionError(f"shard {self.shard} has no files")
        return take_rows(self._concatenated(columns), self._live[1])

    def live_tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Read columns of the live rows, a few megabytes at a time, file by file, the oldest first.

        Needs no more memory than that, and of more than one file that of all keys. Pages are checked, not the digests
        of whole files. Raises CorruptFileError.
        """
        live_N = np.ones(sum(entry.rows for entry in self.entries), np.bool_)
        if not self.is_plain:
            live_N[:] = False
            live_N[self._live[1]] = True
        start = 0
        for entry in self.entries:
            live_K = live_N[start : start + entry.rows]
            start += entry.rows
            if not live_K.any():
                continue
            with datafile.open_entry(self.storage, self.info, entry, streaming=True) as file:
                first = 0
                for table in file.blocks(columns):
                    here = live_K[first : first + len(table)]
                    first += len(table)
                    yield table if here.all() else table.filter(pa.array(here))

    def features(self, keys_U: Int64Array) -> tuple[AnyArray, BoolArray]:
        """Read the features of some keys, (U, D) in the storage dtype, and find which keys are there, (U,).

        Reads whole row groups around the rows asked for, and no more."""
        features_UD = np.zeros((len(keys_U), self.info.dim), self.info.storage_dtype)
        row_U = self._rows_of(keys_U)
        found_U = row_U >= 0
        asked_K, row_K = np.flatnonzero(found_U), row_U[found_U]
        file_start = 0
        for entry in self.entries:
            here_K = (row_K >= file_start) & (row_K < file_start + entry.rows)
            if here_K.any():
                with datafile.open_entry(self.storage, self.info, entry) as file:
                    features_UD[asked_K[here_K]] = _rows_of_groups(file, self.info, row_K[here_K] - file_start)
            file_start += entry.rows
        return features_UD, found_U

    def verified_blocks(self, memory: datafile.FileMemory | None = None) -> Generator[RowBlock, None, None]:
        """Read the live rows, some megabytes at a time; the digest of a file is checked before a row of it is given.

        In order where there is one file without tombstones, else file by file: the block's places say where its rows
        belong. Needs the memory of one file, taken from `memory`, and of all keys. A block is valid until the next one
        is asked for. Callers that share `memory` close the generator, as an unfinished one keeps it. Raises
        CorruptFileError.
        """
        if self.is_plain:
            for entry in self.entries:
                start = 0
                with datafile.open_entry(self.storage, self.info, entry, "xxh3_128", memory) as file:
                    for table in file.blocks([KEY, FEATURE]):
                        place_K = np.arange(start, start + len(table))
                        yield RowBlock(place_K, datafile.numpy_column(table, KEY), datafile.matrix_of(table, self.info))
                        start += len(table)
            return
        place_N = np.full(len(self._columns[0]), -1, np.int64)
        place_N[self._live[1]] = np.arange(len(self._live[1]))
        start = 0
        for entry in self.entries:
            yield from self._live_blocks(entry, start, place_N[start : start + entry.rows], memory)
            start += entry.rows

    def _live_blocks(
        self, entry: FileEntry, first: int, place_K: Int64Array, memory: datafile.FileMemory | None
    ) -> Iterator[RowBlock]:
        """Read the live rows of one file.

        Its rows begin at `first` of all files and belong at `place_K`, nowhere where that is -1."""
        keys_N, deleted_N = self._columns
        columns = [KEY, DELETED, FEATURE] if (place_K >= 0).any() else [KEY, DELETED]
        start = 0
        with datafile.open_entry(self.storage, self.info, entry, "xxh3_128", memory) as file:
            for table in file.blocks(columns):
                here = slice(first + start, first + start + len(table))
                keys_K = datafile.numpy_column(table, KEY)
                # What decided which rows live was read without the file's digest.
                same = np.array_equal(keys_K, keys_N[here])
                if not same or not np.array_equal(datafile.numpy_column(table, DELETED), deleted_N[here]):
                    raise CorruptFileError(Problem.CHANGED_WHILE_READ, file.path)
                block_place_K = place_K[start : start + len(table)]
                start += len(table)
                live_K = block_place_K >= 0
                if live_K.all():
                    yield RowBlock(block_place_K, keys_K, datafile.matrix_of(table, self.info))
                elif live_K.any():
                    yield RowBlock(block_place_K[live_K], keys_K[live_K], datafile.matrix_of(table, self.info)[live_K])

    def moments(self) -> Moments:
        """Return the moments of the live rows: from the statistics of a single file, else from the rows."""
        found = read_moments(self.storage, self.entries[0]) if self.entries and self.is_plain else None
        if found is not None:
            return found
        moments = Moments.empty(self.info.dim)
        for block in self.verified_blocks():
            moments = moments.merged(Moments.of(block.features_KD, self.info.dtype))
        return moments

    def contains(self, keys_U: Int64Array) -> BoolArray:
        """Return which keys have a live row, (U,). Reads two small columns."""
        return self._rows_of(keys_U) >= 0

    def uris(self, keys_U: Int64Array) -> tuple[Int64Array, list[str]]:
        """Return those of the keys that have a live row, in the order asked, and the uri of each."""
        row_U = self._rows_of(keys_U)
        row_K = row_U[row_U >= 0]
        if not len(row_K):
            return row_K, []
        return keys_U[row_U >= 0], datafile.text_column(take_rows(self._concatenated([URI]), row_K), URI)

    def check_uris(self, keys_N: Int64Array, uris: Sequence[str]) -> None:
        """Raise KeyCollisionError where one of the keys is here under another uri."""
        keys_K, mine = self.uris(keys_N)
        check_collisions(np.concatenate([keys_K, keys_N]), [*mine, *uris])

    @property
    def is_plain(self) -> bool:
        return len(self.entries) == 0 or (len(self.entries) == 1 and self.entries[0].num_deleted == 0)

    def _rows_of(self, keys_U: Int64Array) -> Int64Array:
        """Find the live rows of keys among the rows of all files, (U,); -1 for a key without one."""
        keys_M, index_M = self._live
        hash_M, hash_U = splitmix64(keys_M), splitmix64(keys_U)
        place_U = np.searchsorted(hash_M, hash_U)
        row_U = np.full(len(keys_U), -1, np.int64)
        inside_U = np.flatnonzero(place_U < len(hash_M))
        found_U = inside_U[hash_M[place_U[inside_U]] == hash_U[inside_U]]
        row_U[found_U] = index_M[place_U[found_U]]
        return row_U

    def _concatenated(self, columns: Sequence[str] | None) -> pa.Table:
        tables = []
        for entry in self.entries:
            with datafile.open_entry(self.storage, self.info, entry) as file:
                tables.append(file.read(columns))
        return pa.concat_tables(tables)


def _rows_of_groups(file: datafile.DataFile, info: StoreInfo, rows_K: Int64Array) -> AnyArray:
    starts = np.asarray(file.group_starts)
    group_K = np.searchsorted(starts, rows_K, side="right") - 1
    features_KD = np.empty((len(rows_K), info.dim), info.storage_dtype)
    for group in np.unique(group_K):
        here_K = group_K == group
        features_KD[here_K] = datafile.matrix_of(file.read([FEATURE], [int(group)]), info)[
            rows_K[here_K] - starts[group]
        ]
    return features_KD


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
        with datafile.encoder(hashed, info) as writer:
            for block in blocks:
                rows.add(block)
                writer.write_table(block, datafile.row_group_rows(info))
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


def check_digest(storage: Storage, path: str, size_bytes: int, algorithm: datafile.Digest, expected: str) -> None:
    """Read a file in pieces, and raise CorruptFileError if it is missing or damaged."""
    try:
        if size_bytes <= _CHUNK_BYTES:  # one request
            found = datafile.digest_of(storage.read_bytes(path), algorithm)
        else:
            found = digest_of(storage, path, hashlib.sha256 if algorithm == "sha256" else xxhash.xxh3_128)
    except FileNotFoundError as error:
        raise CorruptFileError(Problem.MISSING, storage.full(path)) from error
    if found != expected:
        raise CorruptFileError(Problem.DIGEST_DIFFERS, storage.full(path), algorithm)


class _WrittenRows:
    """Counts and moments of the rows written so far; refuses rows that are out of place."""

    def __init__(self, info: StoreInfo, shard: int) -> None:
        self.info, self.shard = info, shard
        self.count = 0
        self.moments = Moments.empty(info.dim)  # of the live rows
        self._last_hash: int = -1

    def add(self, block: pa.Table) -> None:
        keys_K, deleted_K = datafile.numpy_column(block, KEY), datafile.numpy_column(block, DELETED)
        hash_K = splitmix64(keys_K)
        strays = keys_K[shard_of_hash(hash_K, self.info.num_shards) != self.shard]
        if len(strays):
            raise InvalidRowsError(Problem.STRAY_KEYS, strays[0], len(strays) - 1, self.shard)
        assert len(block) == 0 or int(hash_K[0]) > self._last_hash, "blocks out of order"
        assert bool((hash_K[1:] > hash_K[:-1]).all()), "rows out of order"
        features_KD = datafile.matrix_of(block, self.info)
        live = features_KD[~deleted_K] if deleted_K.any() else features_KD
        self.moments = self.moments.merged(Moments.of(live, self.info.dtype))
        self.count += len(block)
        self._last_hash = int(hash_K[-1]) if len(block) else self._last_hash


class HashedOutput:
    """A file to write, and the digests of its content."""

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


LIVE_COLUMNS = [*datafile.METADATA_COLUMNS, FEATURE]


def live_schema(info: StoreInfo, columns: Sequence[str] | None = None, decode: bool = True) -> pa.Schema:
    """Return the columns of `live_batches`: LIVE_COLUMNS by default. Raises ValueError for a column of another name."""
    names = LIVE_COLUMNS if columns is None else list(columns)
    unknown = [name for name in names if name not in LIVE_COLUMNS]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(Problem.UNKNOWN_COLUMNS.of(names, ", ".join(LIVE_COLUMNS)))
    fields = {field.name: field for field in datafile.schema_of(info)}
    if decode:
        fields[FEATURE] = pa.field(FEATURE, pa.list_(pa.float32(), info.dim), nullable=False)
    return pa.schema([fields[name] for name in names])


def live_batches(
    reader: ShardReader, codec: Codec, columns: Sequence[str] | None = None, decode: bool = True
) -> Iterator[pa.RecordBatch]:
    """Read columns of the live rows of a shard, a few megabytes at a time, file by file, the oldest first.

    `decode` makes the features fixed-size lists of float32; else they are bytes as stored. Only the columns asked for
    are read, and of more than one file key and tombstones. Raises ValueError, CorruptFileError.
    """
    schema = live_schema(reader.info, columns, decode)
    for table in reader.live_tables(schema.names):
        arrays: list[Any] = table.columns
        if decode and FEATURE in schema.names:
            values_ND = codec.decode(datafile.matrix_of(table, reader.info))
            feature = pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(values_ND)), reader.info.dim)
            arrays[schema.names.index(FEATURE)] = feature
        yield from pa.Table.from_arrays(arrays, schema=schema).to_batches()
