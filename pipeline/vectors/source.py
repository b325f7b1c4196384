"""What every format of vectors provides: slices that a worker reads alone, and blocks of rows out of them.

Letters of shapes: N rows of a block, D feature width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from featurestore.keys import Int64Array
from featurestore.storage.local import StorageEntry
from featurestore.storage.storage import Storage
from pipeline.errors import VectorsNotFoundError
from pipeline.store_run import BadRow

BLOCK_BYTES = 32 << 20  # of float32: what a task holds a few times


@dataclass(frozen=True)
class VectorBlock:
    """Rows as a format gives them: values may still be NaN or infinite, keys may repeat."""

    keys_N: Int64Array
    uris: list[str]
    vectors_ND: npt.NDArray[np.float32]
    bad: tuple[BadRow, ...] = ()

    def __len__(self) -> int:
        return len(self.keys_N)


class VectorSlice(Protocol):
    """Some rows of one file, which pickle as their place."""

    @property
    def num_rows(self) -> int:
        """Number of rows, bad ones included."""

    @property
    def place(self) -> str:
        """Name of the place for messages."""

    def read(self, block_rows: int) -> Iterator[VectorBlock]:
        """Read the rows in their order, about `block_rows` at a time. Raises VectorImportError, StorageError."""


@dataclass(frozen=True)
class VectorSource:
    """The vectors to import: their slices, and their width."""

    dim: int
    slices: tuple[VectorSlice, ...]
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
    folder, _, name = storage.url.rstrip("/").rpartition("/")
    try:
        if storage.is_local and Path(storage.url).is_dir():
            raise FileNotFoundError
        return Storage(folder), [Storage(folder).entry(name)]
    except FileNotFoundError:
        absent = f"are no files that end with {suffix}" if suffix else "is nothing"
        raise VectorsNotFoundError(f"there {absent} at {address}: give the file or folder of your {what}") from None


def fingerprint_of(storage: Storage, entries: Iterable[StorageEntry]) -> str:
    """Write what changes when a file of the import does."""
    return f"{storage.url} " + " ".join(f"{entry.path}:{entry.size_bytes}:{entry.mtime_s}" for entry in entries)


def block_rows(dim: int) -> int:
    """Count the rows of a block of BLOCK_BYTES."""
    return max(1, BLOCK_BYTES // (4 * dim))


def pack(slices: Iterable[VectorSlice], rows: int) -> list[tuple[VectorSlice, ...]]:
    """Group slices one after the other, about `rows` rows each."""
    packed: list[tuple[VectorSlice, ...]] = []
    current: list[VectorSlice] = []
    count = 0
    for piece in slices:
        if current and count + piece.num_rows > rows:
            packed.append(tuple(current))
            current, count = [], 0
        current.append(piece)
        count += piece.num_rows
    return [*packed, tuple(current)] if current else packed


def gathered(blocks: Iterable[VectorBlock], rows: int) -> Iterator[VectorBlock]:
    """Join the rows in blocks of at least `rows`, but for the last; one block where there are no rows."""
    waiting: list[VectorBlock] = []
    num_blocks = 0
    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) >= rows:
            yield _joined(waiting)
            waiting = []
            num_blocks += 1
    if waiting or not num_blocks:
        yield _joined(waiting)


def _joined(blocks: list[VectorBlock]) -> VectorBlock:
    if len(blocks) == 1:
        return blocks[0]
    if not blocks:
        return VectorBlock(np.empty(0, np.int64), [], np.empty((0, 0), np.float32))
    return VectorBlock(
        np.concatenate([block.keys_N for block in blocks]),
        [uri for block in blocks for uri in block.uris],
        np.concatenate([block.vectors_ND for block in blocks]),
        tuple(bad for block in blocks for bad in block.bad),
    )
