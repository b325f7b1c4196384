"""Formats of vectors of others: matrices, Parquet, and XDL's binary files, in which key k is in file k modulo 1024.

Letters of shapes: N rows of a block, D feature width.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore.format.codec import read_npy
from featurestore.format.datafile import is_text
from featurestore.keys import AnyArray, Float32Array, Int64Array, key_of_uri, keys_of_uris
from featurestore.storage.local import StorageEntry
from featurestore.storage.storage import Storage, file_at
from pipeline.cluster.tasks import neighbours
from pipeline.errors import VectorImportError, VectorsNotFoundError
from pipeline.options import XDL_DIM
from pipeline.problems import Problem
from pipeline.store_run import BadRow

BLOCK_BYTES = 32 << 20  # of float32: what a task holds a few times


@dataclass(frozen=True)
class VectorBlock:
    """Rows as a format gives them: values may still be NaN or infinite, keys may repeat."""

    keys_N: Int64Array
    uris: list[str]
    vectors_ND: Float32Array
    bad: tuple[BadRow, ...] = ()

    def __len__(self) -> int:
        return len(self.keys_N)


@dataclass(frozen=True)
class VectorSource:
    """The vectors to import: their slices, and their width."""

    dim: int
    slices: "tuple[VectorSlice, ...]"
    fingerprint: str  # changes when a file does


def uri_of_key(key: int) -> str:
    """Name a row that came with an int64 key alone."""
    return f"key:{key}"


def find_files(address: str, suffix: str = "", what: str = "vectors") -> tuple[Storage, list[StorageEntry]]:
    """Find the file at `address`, or those below it that end with `suffix`, and the storage of their paths.

    Hidden files are left out. Raises VectorImportError where there is none.
    """
    storage = Storage(address)
    found = [
        entry
        for entry in storage.entries()
        if entry.path.endswith(suffix) and not any(part.startswith((".", "_")) for part in Path(entry.path).parts)
    ]
    if found:
        return storage, found
    folder, name = file_at(storage.url.rstrip("/"))
    try:
        if storage.is_local and Path(storage.url).is_dir():
            raise FileNotFoundError
        return folder, [folder.entry(name)]
    except FileNotFoundError:
        problem = (Problem.NO_FILES_ENDING, suffix) if suffix else (Problem.NOTHING_THERE,)
        raise VectorsNotFoundError(*problem, address, what) from None


def fingerprint_of(storage: Storage, entries: Iterable[StorageEntry]) -> str:
    """Return a text that changes when a file of the import does."""
    return f"{storage.url} " + " ".join(f"{entry.path}:{entry.size_bytes}:{entry.mtime_s}" for entry in entries)


def block_rows(dim: int) -> int:
    """Count the rows of a block of BLOCK_BYTES."""
    return max(1, BLOCK_BYTES // (4 * dim))


def _cuts(num_rows: int, dim: int) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks: yield where each begins and ends."""
    rows = block_rows(dim)
    return ((start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))


def read_slices(slices: "Sequence[VectorSlice]", rows: int) -> Iterator[VectorBlock]:
    """Read slices that were packed together: as one block, or one slice in blocks of `rows` rows."""
    blocks = chain.from_iterable(piece.read(rows) for piece in slices)
    if len(slices) == 1:
        yield from blocks
        return
    keys_N, uris, vectors_ND, bad = zip(*(vars(block).values() for block in blocks), strict=True)
    yield VectorBlock(np.concatenate(keys_N), [*chain(*uris)], np.concatenate(vectors_ND), tuple(chain(*bad)))


@dataclass(frozen=True, kw_only=True)
class RecordSlice:
    """Records `start` to `stop` of one file, which lie one after the other behind its first `offset` bytes."""

    url: str
    path: str
    record: np.dtype[Any]
    offset: int = 0
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Number of records."""
        return self.stop - self.start

    def read(self, block_rows: int) -> Iterator[VectorBlock]:
        """Read the records, this many at a time. Raises VectorImportError."""
        with Storage(self.url).open_input(self.path) as file:
            file.seek(self.offset + self.start * self.record.itemsize)
            for first in range(0, self.num_rows, block_rows):
                size_bytes = min(block_rows, self.num_rows - first) * self.record.itemsize
                if len(data := file.read(size_bytes)) != size_bytes:
                    raise VectorImportError(Problem.BECAME_SHORTER, self.path)
                yield self._block(first, np.frombuffer(data, self.record))

    def _block(self, first: int, records_N: AnyArray) -> VectorBlock:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class MatrixSlice(RecordSlice):
    """Rows of the matrix in a .npy file, with their keys or their ids; those with an empty id are bad."""

    names: Int64Array | list[str]

    def _block(self, first: int, records_N: AnyArray) -> VectorBlock:
        names, vectors_ND = self.names[first : first + len(records_N)], _single(records_N)
        if not isinstance(names, list):
            return VectorBlock(names, list(map(uri_of_key, names.tolist())), vectors_ND)
        is_named_N = np.array([name != "" for name in names], np.bool_)
        place = self.start + first
        bad = tuple(BadRow.at(self.path, place + int(row), "empty id") for row in np.flatnonzero(~is_named_N))
        uris = [name for name in names if name]
        return VectorBlock(keys_of_uris(uris), uris, vectors_ND[is_named_N], bad)


def plan_matrix(address: str, keys_address: str) -> VectorSource:
    """Cut a matrix and its keys into slices of some megabytes. The keys, or ids, are in memory.

    Raises VectorImportError."""
    storage, entries = find_files(address)
    path = entries[0].path
    with storage.open_input(path) as file:
        try:
            if (version := np.lib.format.read_magic(file)) != (1, 0):
                raise ValueError(Problem.NPY_OF_RECORDS.of(version))
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        except (ValueError, SyntaxError) as error:
            raise VectorImportError(Problem.UNREADABLE_AS, address, ".npy", error) from error
        offset = file.tell()
    if len(shape) != 2 or dtype.kind != "f" or 0 in shape:
        raise VectorImportError(Problem.NOT_A_MATRIX, address, dtype, shape)
    if is_fortran:
        raise VectorImportError(Problem.COLUMN_BY_COLUMN, address)
    num_rows, dim = shape
    size = offset + dtype.itemsize * num_rows * dim
    if entries[0].size_bytes != size:
        raise VectorImportError(Problem.TRUNCATED, address, entries[0].size_bytes, size)
    names, fingerprint = _names_of_rows(keys_address)
    if len(names) != num_rows:
        raise VectorImportError(Problem.WRONG_NUMBER_OF_KEYS, keys_address, len(names), address, num_rows)
    rows_of = partial(MatrixSlice, url=storage.url, path=path, record=np.dtype((dtype, (dim,))), offset=offset)
    slices = (rows_of(start=start, stop=stop, names=names[start:stop]) for start, stop in _cuts(num_rows, dim))
    return VectorSource(dim, tuple(slices), f"{fingerprint_of(storage, entries)} {fingerprint}")


def _names_of_rows(address: str) -> tuple[Int64Array | list[str], str]:
    """Read the keys in a .npy, or lines of ids; and the fingerprint of their file."""
    storage, entries = find_files(address)
    data, fingerprint = storage.read_bytes(entries[0].path), fingerprint_of(storage, entries)
    if not address.endswith(".npy"):
        try:
            return data.decode().replace("\r\n", "\n").removesuffix("\n").split("\n"), fingerprint
        except UnicodeDecodeError as error:
            raise VectorImportError(Problem.IDS_NOT_UTF8, address, error) from error
    try:
        keys_N = read_npy(data)
    except ValueError as error:
        raise VectorImportError(Problem.UNREADABLE_AS, address, ".npy", error) from error
    if keys_N.ndim != 1 or keys_N.dtype.kind not in "iu" or keys_N.dtype == np.uint64:
        raise VectorImportError(Problem.NOT_INT64_KEYS, address, keys_N.dtype, keys_N.shape)
    return keys_N.astype(np.int64), fingerprint


def _single(values_ND: AnyArray) -> Float32Array:
    with np.errstate(over="ignore"):  # infinite then, and refused
        return values_ND.astype(np.float32)


FOOTER_THREADS = 16  # waiting for answers, not computing


@dataclass(frozen=True)
class ParquetColumns:
    """The columns of one file: names and types of what is needed."""

    key: str
    is_text: bool
    uri: str | None
    feature: str
    dim: int | None  # None: lists of any length


@dataclass(frozen=True)
class ParquetSlice:
    """Row groups of one file, one after the other."""

    url: str
    path: str
    columns: ParquetColumns
    groups: tuple[int, ...]
    first_row: int
    num_rows: int
    dim: int

    def read(self, block_rows: int) -> Iterator[VectorBlock]:
        """Read the rows; those without key or feature, or of another width, are bad."""
        wanted = [self.columns.key, self.columns.feature, *([self.columns.uri] if self.columns.uri else [])]
        first = self.first_row
        try:
            with pq.ParquetFile(Storage(self.url).open_input(self.path), page_checksum_verification=True) as file:
                for batch in file.iter_batches(block_rows, list(self.groups), wanted, use_threads=False):
                    yield self._block(batch, first)
                    first += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise VectorImportError(Problem.REFUSED, "read", self.path, error) from error

    def _block(self, batch: pa.RecordBatch, first: int) -> VectorBlock:
        reasons_N = np.full(len(batch), "", object)
        vectors_ND = _vectors(batch.column(self.columns.feature), self.dim, reasons_N)
        has_vector_N = reasons_N == ""
        names = self._names(batch)
        has_name_N = np.array([name is not None for name in names], np.bool_)
        bad = []
        for row in np.flatnonzero(~(has_vector_N & has_name_N)).tolist():
            name, reason = names[row], reasons_N[row] or "no key or uri"
            bad.append(BadRow(*name, reason) if name else BadRow.at(self.path, first + row, reason))
        good = [name for name, has_vector in zip(names, has_vector_N, strict=True) if name and has_vector]
        keys_N = np.array([key for key, _ in good], np.int64)
        return VectorBlock(keys_N, [uri for _, uri in good], vectors_ND[has_name_N[has_vector_N]], tuple(bad))

    def _names(self, batch: pa.RecordBatch) -> list[tuple[int, str] | None]:
        """Read key and uri of each row; None where one is missing."""
        keys: list[Any] = batch.column(self.columns.key).to_pylist()
        if self.columns.is_text:
            keys, texts = [key_of_uri(text) if text else None for text in keys], keys
        else:
            texts = [uri_of_key(key) for key in keys]
        uris: list[Any] = batch.column(self.columns.uri).to_pylist() if self.columns.uri else texts
        return [(key, uri) if key is not None and uri else None for key, uri in zip(keys, uris, strict=True)]


def plan_parquet(address: str, dim: int | None, feature: str | None) -> VectorSource:
    """Cut the file or folder into slices of row groups. Raises VectorImportError."""
    storage, entries = find_files(address, ".parquet")
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda entry: _footer(storage, entry.path), entries))
    columns = [_columns(schema, path.path, feature) for path, (schema, _) in zip(entries, footers, strict=True)]
    widths = {each.dim for each in columns if each.dim is not None} | ({dim} if dim else set())
    if len(widths) > 1:
        raise VectorImportError(Problem.DIFFERENT_WIDTHS, address, sorted(widths))
    width = widths.pop() if widths else _first_width(storage, [entry.path for entry in entries], columns)
    slices: list[VectorSlice] = []
    for entry, each, (_, counts) in zip(entries, columns, footers, strict=True):
        slices += _slices(storage.url, entry.path, each, counts, width)
    return VectorSource(width, tuple(slices), f"{fingerprint_of(storage, entries)} {feature}")


def _footer(storage: Storage, path: str) -> tuple[pa.Schema, list[int]]:
    try:
        with pq.ParquetFile(storage.open_input(path)) as file:
            metadata = file.metadata
            return file.schema_arrow, [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise VectorImportError(Problem.UNREADABLE_AS, storage.full(path), "Parquet", error) from error


def _slices(url: str, path: str, columns: ParquetColumns, counts: list[int], dim: int) -> "list[VectorSlice]":
    slices: list[VectorSlice] = []
    first = 0
    for groups in neighbours(range(len(counts)), counts, block_rows(dim)):
        rows = sum(counts[group] for group in groups)
        slices.append(ParquetSlice(url, path, columns, tuple(groups), first, rows, dim))
        first += rows
    return slices


def _columns(schema: pa.Schema, path: str, feature: str | None) -> ParquetColumns:
    names = schema.names
    key = next((name for name in ("key", "id") if name in names), None)
    if key is None:
        raise VectorImportError(Problem.NO_KEY_COLUMN, path, ", ".join(names))
    has_ids = key == "id"
    kind = schema.field(key).type
    if not (is_text(kind) if has_ids else pa.types.is_integer(kind) and kind != pa.uint64()):
        raise VectorImportError(Problem.WRONG_KEY_TYPE, path, key, kind)
    uri = "uri" if "uri" in names and is_text(schema.field("uri").type) else None
    if feature is None:
        found = [name for name in names if _is_vector(schema.field(name).type)]
        feature = "feature" if "feature" in found else found[0] if len(found) == 1 else None
        if feature is None:
            raise VectorImportError(Problem.WHICH_FEATURE, path, found or names)
    if feature not in names or not _is_vector(schema.field(feature).type):
        raise VectorImportError(Problem.NO_VECTORS, path, feature)
    listed: Any = _stored_type(schema.field(feature).type)
    return ParquetColumns(key, has_ids, uri, feature, listed.list_size if pa.types.is_fixed_size_list(listed) else None)


def _first_width(storage: Storage, paths: list[str], columns: list[ParquetColumns]) -> int:
    """Measure the first list that there is."""
    for path, each in zip(paths, columns, strict=True):
        with pq.ParquetFile(storage.open_input(path)) as file:
            for batch in file.iter_batches(64, columns=[each.feature]):
                lengths = [length for length in pc.list_value_length(batch.column(0)).to_pylist() if length]
                if lengths:
                    return int(lengths[0])
    raise VectorImportError(Problem.NO_FEATURES, storage.url)


def _vectors(column: Any, dim: int, reasons_N: AnyArray) -> Float32Array:
    """Read the rows that have `dim` numbers, float32 (N, D); `reasons_N` gets why another row has not."""
    column = getattr(column, "storage", column)
    valid = np.asarray(column.is_valid())
    reasons_N[~valid] = "no feature"
    if not pa.types.is_fixed_size_list(column.type):
        lengths = pc.list_value_length(column).fill_null(dim).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(lengths != dim):
            reasons_N[row] = f"{lengths[row]} numbers instead of {dim}"
        valid &= lengths == dim
    return _single(column.filter(pa.array(valid)).flatten().to_numpy(zero_copy_only=False)).reshape(-1, dim)


def _is_vector(kind: Any) -> bool:
    kind = _stored_type(kind)
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_list and bool(pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def _stored_type(kind: Any) -> Any:
    """Return the type that holds the values of another one: that of a tensor is a list."""
    return getattr(kind, "storage_type", kind)


NUM_FILES = 1024
NAME = re.compile(r"(?:.*/)?data\.(\d{1,4})")
WRONG_FILE = "key in the wrong file"


@dataclass(frozen=True, kw_only=True)
class XdlSlice(RecordSlice):
    """Records of one file; those of other files are bad."""

    number: int

    def _block(self, first: int, records_N: AnyArray) -> VectorBlock:
        keys_N = records_N["key"].astype(np.int64)
        fits_N = (keys_N & (NUM_FILES - 1)) == self.number
        bad = tuple(BadRow(key, uri_of_key(key), WRONG_FILE) for key in keys_N[~fits_N].tolist())
        keys_N = keys_N[fits_N]
        vectors_ND = records_N["vector"][fits_N].astype(np.float32)
        return VectorBlock(keys_N, [uri_of_key(key) for key in keys_N.tolist()], vectors_ND, bad)


def looks_like(address: str) -> bool:
    """Return whether an address has files that are named as these."""
    return any(NAME.fullmatch(entry.path) for entry in find_files(address)[1])


def plan_xdl(address: str, dim: int | None) -> VectorSource:
    """Cut the folder of files into slices of some megabytes. Raises VectorImportError."""
    dim = dim or XDL_DIM
    storage, entries = find_files(address)
    record = np.dtype([("key", "<i8"), ("vector", "<f4", (dim,))])
    slices: list[XdlSlice] = []
    used, torn = [], []
    for entry in entries:
        match = NAME.fullmatch(entry.path)
        if match is None or int(match[1]) >= NUM_FILES:
            continue
        used.append(entry)
        count, rest = divmod(entry.size_bytes, record.itemsize)
        if rest:
            torn.append(entry.path)
        slices += [
            XdlSlice(url=storage.url, path=entry.path, record=record, start=start, stop=stop, number=int(match[1]))
            for start, stop in _cuts(count, dim)
        ]
    if not used:
        raise VectorsNotFoundError(Problem.NO_XDL_FILES, address, NUM_FILES - 1)
    if torn:
        raise VectorImportError(Problem.TORN_FILES, len(torn), len(used), torn[0], record.itemsize, dim)
    if not slices:
        raise VectorImportError(Problem.ONLY_EMPTY_FILES, address)
    return VectorSource(dim, tuple(slices), fingerprint_of(storage, used))


VectorSlice = RecordSlice | ParquetSlice
"""Some rows of one file, which pickle as their place; `read(block_rows)` reads them in their order.

Raises VectorImportError, StorageError."""
