"""Rows of features in memory, and the data files that hold them: Parquet, whose bytes are read without a copy.

The feature is one FIXED_LEN_BYTE_ARRAY column: an Arrow buffer of it is the matrix, and it reads many times faster than
a list column. Every page has a checksum, and every read verifies it, except where the digest of the whole file has just
been verified: that covers the pages, and what lies between them.
"""

import contextlib
import hashlib
import io
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import ValidationError

from featurestore import errors
from featurestore.keys import AnyArray, BoolArray, Float32Array, FloatArray, Int32Array, Int64Array, keys_of_uris
from featurestore.problems import Problem
from featurestore.spec import STORAGE_DTYPES, FileEntry, StoreInfo
from featurestore.storage.storage import Storage
from featurestore.text import DType

DIGEST_DTYPE = np.dtype("V16")
_NO_DIGEST = bytes(16)
KEY, URI, DELETED, FEATURE = "key", "uri", "deleted", "feature"
METADATA_COLUMNS = [KEY, URI, "content_digest", "source_tag", "width", "height"]
ROW_GROUP_BYTES = 8 << 20
_SMALL_BYTES = 1 << 20
BLOCK_BYTES = 2 << 20  # in the processor's cache when it is used, and one huge page when it is written to a file
_METADATA_BYTES = 128  # of the other columns of a row, roughly
Digest = Literal["sha256", "xxh3_128"]
Check = Literal["size", "sha256", "xxh3_128"]
_INFO, _STORE_ID = b"featurestore.info", b"featurestore.store_id"


@dataclass(frozen=True)
class FeatureRows:
    """N rows of a store, features as it keeps them: bfloat16 as its bits in uint16.

    `FeatureStore.put` and `stage_part` take features in float32 too, for a store of any dtype.
    """

    keys_N: Int64Array
    uris: list[str]
    features_ND: AnyArray
    content_digest_N: AnyArray  # 16 bytes each: xxh3-128 of the image's bytes
    source_tag: list[str]  # etag, or size and time of the source
    width_N: Int32Array
    height_N: Int32Array
    deleted_N: BoolArray

    @classmethod
    def of(
        cls,
        uris: Sequence[str],
        features_ND: AnyArray,
        *,
        keys: npt.ArrayLike | None = None,
        content_digests: Sequence[bytes] | None = None,
        source_tags: Iterable[str] | None = None,
        widths: npt.ArrayLike | None = None,
        heights: npt.ArrayLike | None = None,
    ) -> "FeatureRows":
        """Make live rows from plain values; keys default to those of the uris, everything else to empty."""
        count = len(uris)
        digests = content_digests if content_digests is not None else [_NO_DIGEST] * count
        if wrong := [digest for digest in digests if len(digest) != 16]:
            raise errors.InvalidRowsError(Problem.WRONG_DIGEST_LENGTH, len(wrong[0]))
        return cls(
            keys_N=keys_of_uris(uris) if keys is None else np.asarray(keys, dtype=np.int64),
            uris=list(uris),
            features_ND=features_ND,
            content_digest_N=np.frombuffer(b"".join(digests), DIGEST_DTYPE),
            source_tag=list(source_tags) if source_tags is not None else [""] * count,
            width_N=np.zeros(count, np.int32) if widths is None else np.asarray(widths, np.int32),
            height_N=np.zeros(count, np.int32) if heights is None else np.asarray(heights, np.int32),
            deleted_N=np.zeros(count, np.bool_),
        )

    @classmethod
    def tombstones(cls, keys: npt.ArrayLike, info: StoreInfo) -> "FeatureRows":
        """Make rows that remove `keys` from the store."""
        keys_N = np.asarray(keys, dtype=np.int64)
        blank = cls.of([""] * len(keys_N), np.zeros((len(keys_N), info.dim), info.storage_dtype), keys=keys_N)
        return cls(**{**blank.__dict__, "deleted_N": np.ones(len(keys_N), np.bool_)})

    def __len__(self) -> int:
        return len(self.keys_N)

    def take(self, index_M: AnyArray) -> "FeatureRows":
        """Return the rows at `index_M`, in that order."""
        taken: dict[str, Any] = {name: getattr(self, name)[index_M] for name in self.__dict__ if name[-1].isupper()}
        taken |= {name: [getattr(self, name)[i] for i in index_M] for name in ("uris", "source_tag")}
        return FeatureRows(**taken)

    def validate(self, info: StoreInfo) -> None:
        """Raise InvalidRowsError unless a store of `info` may hold these rows; KeyCollisionError: two uris, one key."""
        count = len(self.keys_N)
        lengths = {name: len(value) for name, value in self.__dict__.items()}
        if set(lengths.values()) != {count}:
            raise errors.InvalidRowsError(Problem.UNEQUAL_COLUMNS, lengths)
        if self.features_ND.shape != (count, info.dim):
            raise errors.InvalidRowsError(Problem.WRONG_FEATURE_SHAPE, self.features_ND.shape, count, info.dim)
        if self.features_ND.dtype != info.storage_dtype:
            found = self.features_ND.dtype
            raise errors.InvalidRowsError(Problem.WRONG_FEATURE_DTYPE, found, info.dtype, info.storage_dtype)
        finite_N = finite_rows(self.features_ND, info.dtype)
        if not finite_N.all():
            first = int(np.flatnonzero(~finite_N)[0])
            counts, row = (count - int(finite_N.sum()), count), (self.keys_N[first], self.uris[first])
            raise errors.InvalidRowsError(Problem.FEATURES_NOT_FINITE, *counts, info.dtype, *row)
        live_M = np.flatnonzero(~self.deleted_N)
        check_collisions(self.keys_N[live_M], [self.uris[i] for i in live_M])


def check_collisions(keys_N: Int64Array, uris: Sequence[str]) -> None:
    """Raise KeyCollisionError where one key comes with two uris."""
    order_N = np.argsort(keys_N, kind="stable")
    sorted_N = keys_N[order_N]
    for place in np.flatnonzero(sorted_N[1:] == sorted_N[:-1]):
        first, second = uris[order_N[place]], uris[order_N[place + 1]]
        if first != second:
            raise errors.KeyCollisionError(Problem.KEY_OF_TWO_URIS, sorted_N[place], first, second)


def to_bits(values: FloatArray, dtype: DType) -> AnyArray:
    """Return `values` as a store of `dtype` keeps them: for bfloat16 its bits as uint16, rounded to nearest even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):  # an overflow becomes inf, which validate refuses
            return values.astype(STORAGE_DTYPES[dtype], copy=False)
    single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    is_nan = np.isnan(single)
    if is_nan.any():  # adding to the bits of a NaN may carry into the sign
        rounded[is_nan] = 0x7FC0
    return rounded


def to_float32(bits: AnyArray, dtype: DType) -> Float32Array:
    """Return the values behind `to_bits`, as float32; exact."""
    if dtype != "bfloat16":
        return bits.astype(np.float32, copy=False)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def finite_rows(features_ND: AnyArray, dtype: DType) -> BoolArray:
    """Return which stored rows are free of NaN and infinity, (N,)."""
    if dtype == "bfloat16":  # not finite: all bits of the exponent are set
        exponent = np.uint16(0x7F80)
        return np.asarray(((features_ND & exponent) != exponent).all(axis=1))
    return np.asarray(np.isfinite(features_ND).all(axis=1))


class FileMemory:
    """Buffers that are lent, one for each file being read, and used again.

    Fresh memory would cost the kernel as much as the reading itself. All buffers together, lent or idle, stay within
    `limit_bytes`, whatever the number of threads; a thread that finds no room waits until another gives a buffer back.
    A single buffer larger than the limit is lent when no other is.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.peak_bytes = 0  # the most that was ever held
        self._idle: list[bytearray] = []
        self._held_bytes = 0
        self._num_lent = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def borrow(self, size_bytes: int) -> Iterator[memoryview]:
        """Lend a view of `size_bytes`, with any content; nothing may look into it after the block."""
        buffer = self._take(size_bytes)
        try:
            yield memoryview(buffer)[:size_bytes]
        finally:
            with self._changed:
                self._idle.append(buffer)
                self._num_lent -= 1
                self._changed.notify_all()

    def _take(self, size_bytes: int) -> bytearray:
        with self._changed:
            while True:
                fitting = [buffer for buffer in self._idle if len(buffer) >= size_bytes]
                if fitting:
                    buffer = min(fitting, key=len)
                    self._idle.remove(buffer)
                    self._num_lent += 1
                    return buffer
                self._drop_idle(size_bytes)
                if self._held_bytes + size_bytes <= self.limit_bytes or not self._num_lent:
                    buffer = bytearray(size_bytes)  # may raise MemoryError: nothing is counted yet
                    self._held_bytes += size_bytes
                    self.peak_bytes = max(self.peak_bytes, self._held_bytes)
                    self._num_lent += 1
                    return buffer
                self._changed.wait()

    def _drop_idle(self, size_bytes: int) -> None:
        """Drop the largest of the idle buffers, all too small, for its successor, and others where the limit asks."""
        self._idle.sort(key=len)
        keep = max(0, len(self._idle) - 1)
        while self._idle and (len(self._idle) > keep or self._held_bytes + size_bytes > self.limit_bytes):
            self._held_bytes -= len(self._idle.pop())


@lru_cache(maxsize=64)
def schema_of(info: StoreInfo) -> pa.Schema:
    """Return the columns of a data file; dtype and shape of the feature are in its field's metadata.

    The file's metadata says what kind of store it is of, and which one: a repair makes store.json of that.
    """
    feature = pa.field(FEATURE, pa.binary(info.row_bytes), nullable=False)
    fields: list[Any] = [
        pa.field(KEY, pa.int64(), nullable=False),
        pa.field(URI, pa.string(), nullable=False),
        pa.field("content_digest", pa.binary(16), nullable=False),
        pa.field("source_tag", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field(DELETED, pa.bool_(), nullable=False),
        feature.with_metadata({"dtype": info.dtype, "shape": f"[{info.dim}]"}),
    ]
    return pa.schema(fields, metadata={_INFO: info.kind.model_dump_json(), _STORE_ID: info.store_id})


def table_of(rows: FeatureRows, info: StoreInfo) -> pa.Table:
    """Make an Arrow table of `rows`; the numbers are not copied."""
    columns: list[Any] = [
        pa.array(rows.keys_N),
        pa.array(rows.uris, pa.string()),
        _fixed_binary(rows.content_digest_N, 16),
        pa.array(rows.source_tag, pa.string()),
        pa.array(rows.width_N),
        pa.array(rows.height_N),
        pa.array(rows.deleted_N),
        _fixed_binary(rows.features_ND, info.row_bytes),
    ]
    return pa.Table.from_arrays(columns, schema=schema_of(info))


def live_table(metadata: pa.Table, features_MD: AnyArray, info: StoreInfo) -> pa.Table:
    """Make a table of live rows from their METADATA_COLUMNS and features; the numbers are not copied."""
    deleted, features = pa.array(np.zeros(len(metadata), np.bool_)), _fixed_binary(features_MD, info.row_bytes)
    columns: list[Any] = [*metadata.select(METADATA_COLUMNS).columns, deleted, features]
    return pa.Table.from_arrays(columns, schema=schema_of(info))


def numpy_column(table: pa.Table, name: str) -> AnyArray:
    """Return a column of numbers or booleans as one array."""
    return np.asarray(_one_chunk(table, name).to_numpy(zero_copy_only=False))


def text_column(table: pa.Table, name: str) -> list[str]:
    """Return a column of texts."""
    texts: list[Any] = table[name].to_pylist()
    return texts


def digest_column(table: pa.Table) -> AnyArray:
    """Return the digests of the images' bytes, 16 bytes each."""
    return np.frombuffer(_fixed_buffer(table, "content_digest"), dtype=DIGEST_DTYPE)


def matrix_of(table: pa.Table, info: StoreInfo) -> AnyArray:
    """Return the features, (N, D) in the storage dtype; a view of the table's memory where that is one piece."""
    return np.frombuffer(_fixed_buffer(table, FEATURE), dtype=info.storage_dtype).reshape(-1, info.dim)


def encode(table: pa.Table, info: StoreInfo, group_bytes: int = ROW_GROUP_BYTES) -> pa.Buffer:
    """Return the bytes of a Parquet file with the rows of `table`."""
    sink = pa.BufferOutputStream()
    with encoder(sink, info) as writer:
        writer.write_table(table.cast(schema_of(info)), row_group_rows(info, group_bytes))
    return sink.getvalue()


def encoder(sink: Any, info: StoreInfo) -> pq.ParquetWriter:
    """Open a writer of a Parquet file into `sink`; each table begins a row group."""
    return pq.ParquetWriter(
        sink,
        schema_of(info),
        compression="lz4",
        use_dictionary=False,
        write_statistics=[KEY],
        write_page_checksum=True,
        store_schema=True,
    )


def row_group_rows(info: StoreInfo, group_bytes: int = ROW_GROUP_BYTES) -> int:
    """Return how many rows have features of that many bytes, at least one."""
    return max(1, group_bytes // info.row_bytes)


class DataFile:
    """One Parquet file of a store, open for reading."""

    def __init__(
        self,
        source: IO[bytes] | pa.NativeFile,
        info: StoreInfo,
        path: str,
        checked: Check = "size",
        streaming: bool = False,
    ) -> None:
        """Open the file that `path` names in messages.

        `checked`: what of the bytes was compared with the commit, a digest or their number alone; `streaming`: read as
        it goes, not all columns of all row groups first. Raises CorruptFileError, SpecMismatchError, and MemoryError
        after a digest: without one a wrong length may ask for that much."""
        self.path = path
        self._digest_checked = checked != "size"
        self._block_rows = max(1, BLOCK_BYTES // info.row_bytes)
        with self._translated():
            self._parquet = pq.ParquetFile(
                source, page_checksum_verification=checked != "xxh3_128", pre_buffer=not streaming
            )
            schema = self._parquet.schema_arrow
            found = _parsed((schema.metadata or {})[_INFO])
        if self.group_starts[-1] != self.num_rows:  # the one number of the footer that Arrow believes unseen
            raise errors.CorruptFileError(Problem.WRONG_ROW_GROUPS, path, self.num_rows)
        info.check_same(found, path)
        if not schema.equals(schema_of(info)):
            raise errors.CorruptFileError(Problem.WRONG_COLUMNS, path, schema.names)

    @property
    def num_rows(self) -> int:
        """Rows, tombstones included."""
        return int(self._parquet.metadata.num_rows)

    @property
    def group_starts(self) -> list[int]:
        """The first row of each row group, and the number of rows at the end."""
        starts = [0]
        for group in range(self._parquet.num_row_groups):
            starts.append(starts[-1] + self._parquet.metadata.row_group(group).num_rows)
        return starts

    def read(self, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None) -> pa.Table:
        """Read columns (all by default) of row groups (all by default)."""
        with self._translated():
            names = list(columns) if columns is not None else None
            if groups is None:
                return self._parquet.read(names, use_threads=False)
            return self._parquet.read_row_groups(list(groups), names, use_threads=False)

    def blocks(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Read columns, some megabytes at a time."""
        rows = self._block_rows if FEATURE in columns else max(1, BLOCK_BYTES // _METADATA_BYTES)
        with self._translated():
            yield from (
                pa.Table.from_batches([batch])
                for batch in self._parquet.iter_batches(rows, columns=list(columns), use_threads=False)
            )

    def close(self) -> None:
        """Close the source."""
        self._parquet.close(force=True)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except errors.FeatureStoreError:
            raise
        except MemoryError as error:
            if self._digest_checked:  # a good file must not be taken for a damaged one: a repair would drop it
                raise
            raise errors.CorruptFileError(Problem.DAMAGED, self.path, error) from error
        except (pa.ArrowException, OSError, UnicodeDecodeError, ValidationError, KeyError) as error:
            raise errors.CorruptFileError(Problem.DAMAGED, self.path, error) from error


@contextlib.contextmanager
def open_entry(
    storage: Storage,
    info: StoreInfo,
    entry: FileEntry,
    check: Check = "size",
    memory: FileMemory | None = None,
    streaming: bool = False,
) -> Iterator[DataFile]:
    """Open the file of `entry`; its data is valid inside the block.

    A `check` of the "size" reads only what is asked for; one of a digest reads the whole file into `memory`, or without
    it into memory of its own, and compares before any row is read. Raises CorruptFileError where size, digest, row
    count or content differ from what was committed.
    """
    path = storage.full(entry.path)
    with contextlib.ExitStack() as stack:
        try:
            if check != "size":
                try:
                    view = stack.enter_context((memory or FileMemory(entry.bytes)).borrow(entry.bytes))
                except MemoryError:  # a manifest may name any size
                    _check_size(path, storage.size(entry.path), entry)
                    raise
                _check_size(path, storage.read_into(entry.path, view), entry)
                if digest_of(view, check) != getattr(entry, check):
                    raise errors.CorruptFileError(Problem.DIGEST_DIFFERS, path, check)
                source: IO[bytes] | pa.NativeFile = stack.enter_context(pa.BufferReader(pa.py_buffer(view)))
            elif entry.bytes > _SMALL_BYTES:
                source = stack.enter_context(storage.open_input(entry.path))
            else:  # one request instead of one for each piece; on a disk Arrow's reader threads cost more than the rest
                source = stack.enter_context(pa.BufferReader(storage.read_bytes(entry.path)))
        except FileNotFoundError as error:
            raise errors.CorruptFileError(Problem.MISSING, path) from error
        source.seek(0, io.SEEK_END)
        _check_size(path, source.tell(), entry)
        source.seek(0)
        try:
            file = DataFile(source, info, path, check, streaming)
        except errors.SpecMismatchError as error:
            if entry.info_digest != info.digest:
                raise
            raise errors.CorruptFileError(Problem.DAMAGED, path, error) from error
        if file.num_rows != entry.rows:
            raise errors.CorruptFileError(Problem.WRONG_NUMBER, path, file.num_rows, "rows", entry.rows)
        yield file


@lru_cache(maxsize=64)
def _parsed(info: bytes) -> StoreInfo:
    return StoreInfo.model_validate_json(info)


def _check_size(path: str, size_bytes: int, entry: FileEntry) -> None:
    if size_bytes != entry.bytes:
        raise errors.CorruptFileError(Problem.WRONG_NUMBER, path, size_bytes, "bytes", entry.bytes)


def info_in(data: bytes, path: str) -> StoreInfo:
    """Read the StoreInfo in a data file. Raises CorruptFileError."""
    try:
        metadata = pq.read_schema(pa.BufferReader(data)).metadata or {}
        kind = StoreInfo.model_validate_json(metadata[_INFO])
        return StoreInfo.model_validate(kind.model_dump() | {"store_id": metadata[_STORE_ID].decode()})
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValidationError, KeyError) as error:
        raise errors.CorruptFileError(Problem.DAMAGED, path, error) from error


def read_verified(storage: Storage, path: str, algorithm: Digest, expected: str) -> bytes:
    """Read a whole small file whose digest is known. Raises CorruptFileError where it differs, FileNotFoundError."""
    data = storage.read_bytes(path)
    if digest_of(data, algorithm) != expected:
        raise errors.CorruptFileError(Problem.DIGEST_DIFFERS, storage.full(path), algorithm)
    return data


def digest_of(data: bytes | memoryview | pa.Buffer, algorithm: Digest) -> str:
    """Return the digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest() if algorithm == "sha256" else xxhash.xxh3_128_hexdigest(data)


def check_names(parquet: pq.ParquetFile) -> None:
    """Raise UnicodeDecodeError where the name of a column is damaged, which Arrow says when it is asked for."""
    for name in (*parquet.schema_arrow.names, *(parquet.schema.column(n).path for n in range(len(parquet.schema)))):
        name.encode()


def is_text(kind: pa.DataType) -> bool:
    """Return whether an Arrow type has texts, however it holds them."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _fixed_binary(array: AnyArray, width: int) -> "pa.Array[Any]":
    flat = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(array), [None, pa.py_buffer(flat.data)])


def _one_chunk(table: pa.Table, name: str) -> Any:
    column = table[name]  # combine_chunks copies even where there is one chunk
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _fixed_buffer(table: pa.Table, name: str) -> memoryview:
    column = _one_chunk(table, name)
    width = column.type.byte_width
    values = column.buffers()[1]
    assert values is not None
    return memoryview(values)[column.offset * width : (column.offset + len(column)) * width]
