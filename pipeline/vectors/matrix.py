"""A matrix in a .npy file, and its keys in another: an int64 .npy or a text file with an id on each line.

Letters of shapes: N rows, D feature width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from featurestore.format.rows import to_float32
from featurestore.keys import Int64Array, keys_of_uris
from featurestore.storage.storage import Storage
from featurestore.text import DType
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

_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class NpyArray:
    """The array of a .npy file."""

    url: str
    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int  # bytes before the numbers

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Read rows `start` to `stop`."""
        row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        with Storage(self.url).open_input(self.path) as file:
            file.seek(self.offset + start * row_bytes)
            data = file.read((stop - start) * row_bytes)
        if len(data) != (stop - start) * row_bytes:
            raise VectorImportError(f"{self.path} has become shorter while it was read: try again")
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class IdLines:
    """Some lines of a text file: bytes `start` to `stop`."""

    url: str
    path: str
    start: int
    stop: int

    def texts(self) -> list[str]:
        """Read one text for each line. Raises VectorImportError."""
        with Storage(self.url).open_input(self.path) as file:
            file.seek(self.start)
            data = file.read(self.stop - self.start)
        try:
            return data.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise VectorImportError(f"{self.path} is no text in UTF-8: {error}") from error


@dataclass(frozen=True)
class MatrixSlice:
    """Rows `start` to `stop` of a matrix with their keys."""

    matrix: NpyArray
    keys: NpyArray | IdLines
    start: int
    stop: int
    dtype: DType | None  # of the numbers, where numpy has no such type

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start

    @property
    def place(self) -> str:
        """Name of the place for messages."""
        return f"{self.matrix.path}, rows {self.start} to {self.stop}"

    def read(self, block_rows: int) -> Iterator[VectorBlock]:
        """Read the rows; those with an empty id are bad."""
        uris = self.keys.texts() if isinstance(self.keys, IdLines) else None
        for first in range(self.start, self.stop, block_rows):
            last = min(first + block_rows, self.stop)
            stored_ND = self.matrix.rows(first, last)
            vectors_ND = to_float32(stored_ND, self.dtype) if self.dtype else _single(stored_ND)
            if uris is not None:
                yield _named(self.matrix.path, first, uris[first - self.start : last - self.start], vectors_ND)
            else:
                keys_N: Int64Array = cast("NpyArray", self.keys).rows(first, last).astype(np.int64)
                yield VectorBlock(keys_N, [uri_of_key(key) for key in keys_N.tolist()], vectors_ND)


def plan_matrix(address: str, keys_address: str, dtype: DType | None) -> VectorSource:
    """Cut a matrix and its keys into slices of some megabytes; `dtype` bfloat16 for its bits in uint16.

    Raises VectorImportError.
    """
    matrix, fingerprint = _open_array(address, 2)
    kinds = "u" if dtype == "bfloat16" else "f"
    if matrix.dtype.kind != kinds or (dtype == "bfloat16" and matrix.dtype.itemsize != 2):
        raise VectorImportError(
            f"{address} holds {matrix.dtype}: give floating point numbers, or, for bits of bfloat16 in uint16,"
            " --binary-dtype bfloat16"
        )
    rows = block_rows(matrix.shape[1])
    starts = range(0, matrix.shape[0], rows)
    if keys_address.endswith(".npy"):
        array, keys_fingerprint = _open_array(keys_address, 1)
        if array.dtype.kind not in "iu" or array.dtype == np.uint64:
            raise VectorImportError(f"{keys_address} holds {array.dtype}, not int64 keys")
        num_keys = array.shape[0]
        keys: list[NpyArray | IdLines] = [array] * len(starts)
    else:
        lines, num_keys, keys_fingerprint = _scan_lines(keys_address, rows)
        keys = list(lines)
    if num_keys != matrix.shape[0]:
        raise VectorImportError(f"{keys_address} has {num_keys:,} keys and {address} {matrix.shape[0]:,} rows")
    slices: list[VectorSlice] = [
        MatrixSlice(matrix, part, start, min(start + rows, num_keys), dtype)
        for start, part in zip(starts, keys, strict=True)
    ]
    return VectorSource(matrix.shape[1], tuple(slices), f"{fingerprint} {keys_fingerprint} {dtype}")


def _named(path: str, first: int, uris: list[str], vectors_ND: npt.NDArray[np.float32]) -> VectorBlock:
    named_N = np.array([uri != "" for uri in uris], np.bool_)
    bad = tuple(BadRow.at(path, first + int(row), "empty id") for row in np.flatnonzero(~named_N))
    uris = [uri for uri in uris if uri]
    return VectorBlock(keys_of_uris(uris), uris, vectors_ND[named_N], bad)


def _single(values_ND: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # infinite then, and refused
        return values_ND.astype(np.float32)


def _open_array(address: str, num_dimensions: int) -> tuple[NpyArray, str]:
    storage, entries = find_files(address)
    path = entries[0].path
    with storage.open_input(path) as file:
        try:
            shape, is_fortran, dtype = _read_header(file)
        except (ValueError, SyntaxError) as error:
            raise VectorImportError(f"{address} is no .npy file: {error}") from error
        offset = file.tell()
    if len(shape) != num_dimensions or dtype.hasobject or 0 in shape:
        raise VectorImportError(f"{address} holds {dtype} {shape}, not {num_dimensions} dimension(s) of numbers")
    if is_fortran and num_dimensions > 1:
        raise VectorImportError(f"{address} is stored column by column: save numpy.ascontiguousarray of it")
    size = offset + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if entries[0].size_bytes != size:
        raise VectorImportError(f"{address} is truncated: {entries[0].size_bytes:,} bytes instead of {size:,}")
    return NpyArray(storage.url, path, dtype, shape, offset), fingerprint_of(storage, entries)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"format {version} is for arrays of records")


def _scan_lines(address: str, rows: int) -> tuple[list[IdLines], int, str]:
    """Find where each `rows` lines begin and end, and count the lines."""
    storage, entries = find_files(address)
    path, size = entries[0].path, entries[0].size_bytes
    bounds, num_lines, position, last = [0], 0, 0, b"\n"
    with storage.open_input(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            ends_L = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + position + 1
            first = rows - 1 - num_lines % rows
            bounds += ends_L[first::rows].tolist()
            num_lines += len(ends_L)
            position += len(chunk)
            last = chunk[-1:]
    num_lines += last != b"\n"  # a last line without its end
    if bounds[-1] != size:
        bounds.append(size)
    lines = [IdLines(storage.url, path, start, stop) for start, stop in pairwise(bounds)]
    return lines, num_lines, fingerprint_of(storage, entries)
