"""Parquet files with a key (int64) or id (text) and a feature: a list of numbers, or fixed-size binary.

Letters of shapes: N rows, D feature width.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore.format.rows import to_float32
from featurestore.keys import key_of_uri
from featurestore.spec import STORAGE_DTYPES
from featurestore.storage.storage import Storage
from featurestore.text import DType, FloatDType
from pipeline.errors import VectorImportError
from pipeline.store_run import BadRow
from pipeline.vectors.source import (
    VectorBlock,
    VectorSlice,
    VectorSource,
    block_rows,
    find_files,
    fingerprint_of,
    uri_of_key,
)

FLOATS: tuple[DType, ...] = get_args(FloatDType)
FOOTER_THREADS = 16  # waiting for answers, not computing


@dataclass(frozen=True)
class ParquetColumns:
    """The columns of one file: names and types of what is needed."""

    key: str
    is_text: bool
    uri: str | None
    feature: str
    dtype: DType | None  # of binary features
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

    @property
    def place(self) -> str:
        """Name of the place for messages."""
        return f"{self.path}, rows {self.first_row} to {self.first_row + self.num_rows}"

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
            raise VectorImportError(f"{self.path} cannot be read: {error}") from error

    def _block(self, batch: pa.RecordBatch, first: int) -> VectorBlock:
        reasons_N = np.full(len(batch), "", object)
        vectors_ND = _vectors(batch.column(self.columns.feature), self.columns.dtype, self.dim, reasons_N)
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


def plan_parquet(address: str, dim: int | None, dtype: DType | None, feature: str | None) -> VectorSource:
    """Cut the file or folder into slices of row groups; `dtype` is that of binary features, `dim` of lists.

    Raises VectorImportError.
    """
    storage, entries = find_files(address, ".parquet")
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda entry: _footer(storage, entry.path), entries))
    columns = [_columns(schema, path.path, feature, dtype) for path, (schema, _) in zip(entries, footers, strict=True)]
    widths = {each.dim for each in columns if each.dim is not None} | ({dim} if dim else set())
    if len(widths) > 1:
        raise VectorImportError(f"{address} has features of different widths: {sorted(widths)}")
    width = widths.pop() if widths else _first_width(storage, [entry.path for entry in entries], columns)
    slices: list[VectorSlice] = []
    for entry, each, (_, counts) in zip(entries, columns, footers, strict=True):
        slices += _slices(storage.url, entry.path, each, counts, width)
    fingerprint = f"{fingerprint_of(storage, entries)} {feature} {dtype}"
    return VectorSource(width, tuple(slices), fingerprint)


def _footer(storage: Storage, path: str) -> tuple[pa.Schema, list[int]]:
    try:
        with pq.ParquetFile(storage.open_input(path)) as file:
            metadata = file.metadata
            return file.schema_arrow, [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise VectorImportError(f"{storage.full(path)} is no Parquet file that can be read: {error}") from error


def _slices(url: str, path: str, columns: ParquetColumns, counts: list[int], dim: int) -> list[VectorSlice]:
    slices: list[VectorSlice] = []
    groups: list[int] = []
    first, rows = 0, 0
    for group, count in enumerate(counts):
        groups.append(group)
        rows += count
        if rows >= block_rows(dim) or group == len(counts) - 1:
            slices.append(ParquetSlice(url, path, columns, tuple(groups), first, rows, dim))
            groups, first, rows = [], first + rows, 0
    return slices


def _columns(schema: pa.Schema, path: str, feature: str | None, dtype: DType | None) -> ParquetColumns:
    names = schema.names
    key = next((name for name in ("key", "id") if name in names), None)
    if key is None:
        raise VectorImportError(f"{path} has no column key (int64) or id (text), only {', '.join(names)}")
    is_text = key == "id"
    kind = schema.field(key).type
    if not (_is_text(kind) if is_text else pa.types.is_integer(kind) and kind != pa.uint64()):
        raise VectorImportError(f"{path}: column {key} is {kind}; key has to be int64, and id text")
    uri = "uri" if "uri" in names and _is_text(schema.field("uri").type) else None
    if feature is None:
        found = [name for name in names if _is_vector(schema.field(name).type)]
        feature = "feature" if "feature" in found else found[0] if len(found) == 1 else None
        if feature is None:
            raise VectorImportError(f"{path}: which column is the feature? --feature-column is one of {found or names}")
    if feature not in names or not _is_vector(schema.field(feature).type):
        raise VectorImportError(f"{path} has no column {feature!r} of lists of numbers or fixed-size binary")
    width, dtype = _width(schema.field(feature), path, dtype)
    return ParquetColumns(key, is_text, uri, feature, dtype, width)


def _width(field: "pa.Field[Any]", path: str, dtype: DType | None) -> tuple[int | None, DType | None]:
    kind: Any = getattr(field.type, "storage_type", field.type)
    if not pa.types.is_fixed_size_binary(kind):
        return (kind.list_size if pa.types.is_fixed_size_list(kind) else None), None
    recorded = (field.metadata or {}).get(b"dtype", b"").decode()
    named = dtype or next((each for each in FLOATS if each == recorded), None)
    if named is None:
        which = f"{recorded} cannot be read back" if recorded else "nothing says of which numbers"
        raise VectorImportError(f"{path}: column {field.name} is binary, and {which}: give --binary-dtype float32, say")
    itemsize = np.dtype(STORAGE_DTYPES[named]).itemsize
    if kind.byte_width % itemsize:
        raise VectorImportError(f"{path}: column {field.name} has {kind.byte_width} bytes, no number of {named}")
    return kind.byte_width // itemsize, named


def _first_width(storage: Storage, paths: list[str], columns: list[ParquetColumns]) -> int:
    """Measure the first list that there is."""
    for path, each in zip(paths, columns, strict=True):
        with pq.ParquetFile(storage.open_input(path)) as file:
            for batch in file.iter_batches(64, columns=[each.feature]):
                lengths = [length for length in pc.list_value_length(batch.column(0)).to_pylist() if length]
                if lengths:
                    return int(lengths[0])
    raise VectorImportError(f"{storage.url} has no features at all")


def _vectors(column: Any, dtype: DType | None, dim: int, reasons_N: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Read the rows that have `dim` numbers, float32 (N, D); `reasons_N` gets why another row has not."""
    column = getattr(column, "storage", column)
    valid = np.asarray(column.is_valid())
    reasons_N[~valid] = "no feature"
    if dtype is not None:
        data = column.filter(pa.array(valid))
        width = data.type.byte_width
        raw = memoryview(data.buffers()[1])[data.offset * width : (data.offset + len(data)) * width]
        return to_float32(np.frombuffer(raw, STORAGE_DTYPES[dtype]).reshape(-1, dim), dtype)
    if not pa.types.is_fixed_size_list(column.type):
        lengths = pc.list_value_length(column).fill_null(dim).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(lengths != dim):
            reasons_N[row] = f"{lengths[row]} numbers instead of {dim}"
        valid &= lengths == dim
    numbers = column.filter(pa.array(valid)).flatten().to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):  # infinite then, and refused
        return np.asarray(numbers.astype(np.float32).reshape(-1, dim))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_vector(kind: Any) -> bool:
    kind = getattr(kind, "storage_type", kind)
    if pa.types.is_fixed_size_binary(kind):
        return True
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_list and bool(pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))
