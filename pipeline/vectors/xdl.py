"""The XDL framework's binary files: data.0 to data.1023, records of a little-endian int64 key and D float32.

Key k is in file k modulo 1024. Letters of shapes: N records, D feature width.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from featurestore.storage.storage import Storage
from pipeline.errors import VectorImportError, VectorsNotFoundError
from pipeline.options import XDL_DIM
from pipeline.store_run import BadRow
from pipeline.vectors.source import VectorBlock, VectorSource, block_rows, find_files, fingerprint_of, uri_of_key

NUM_FILES = 1024
NAME = re.compile(r"(?:.*/)?data\.(\d{1,4})")
PROBED_FILES, PROBED_RECORDS = 8, 9
MAX_TORN_SHARE = 0.1  # of files that end within a record: beyond, it is the width that is wrong
WRONG_FILE = "key in the wrong file"
TRUNCATED = "truncated record"


@dataclass(frozen=True)
class XdlSlice:
    """Records `start` to `stop` of one file; `torn_bytes` of one more that is not whole."""

    url: str
    path: str
    number: int
    start: int
    stop: int
    dim: int
    torn_bytes: int = 0

    @property
    def num_rows(self) -> int:
        """Number of records, the torn one included."""
        return self.stop - self.start + (self.torn_bytes > 0)

    @property
    def place(self) -> str:
        """Name of the place for messages."""
        return f"{self.path}, records {self.start} to {self.stop}"

    def read(self, block_rows: int) -> Iterator[VectorBlock]:
        """Read the records; those of other files are bad."""
        record = record_dtype(self.dim)
        with Storage(self.url).open_input(self.path) as file:
            file.seek(self.start * record.itemsize)
            for first in range(self.start, self.stop, block_rows):
                count = min(block_rows, self.stop - first)
                data = file.read(count * record.itemsize)
                if len(data) != count * record.itemsize:
                    raise VectorImportError(f"{self.path} has become shorter while it was read: try again")
                yield self._block(np.frombuffer(data, record))
            if self.torn_bytes:
                bad = (BadRow.at(self.path, self.stop, TRUNCATED),)
                yield VectorBlock(np.empty(0, np.int64), [], np.empty((0, self.dim), np.float32), bad)

    def _block(self, records_N: npt.NDArray[np.void]) -> VectorBlock:
        keys_N = records_N["key"].astype(np.int64)
        fits_N = (keys_N & (NUM_FILES - 1)) == self.number
        bad = tuple(BadRow(key, uri_of_key(key), WRONG_FILE) for key in keys_N[~fits_N].tolist())
        keys_N = keys_N[fits_N]
        vectors_ND = records_N["vector"][fits_N].astype(np.float32)
        return VectorBlock(keys_N, [uri_of_key(key) for key in keys_N.tolist()], vectors_ND, bad)


def record_dtype(dim: int) -> np.dtype[np.void]:
    """Give the type of one record."""
    return np.dtype([("key", "<i8"), ("vector", "<f4", (dim,))])


def looks_like(address: str) -> bool:
    """Return whether an address has files that are named as these."""
    return any(NAME.fullmatch(entry.path) for entry in find_files(address)[1])


def plan_xdl(address: str, dim: int | None) -> VectorSource:
    """Cut the folder of files into slices of some megabytes. Raises VectorImportError."""
    dim = dim or XDL_DIM
    storage, entries = find_files(address)
    record_bytes = record_dtype(dim).itemsize
    slices: list[XdlSlice] = []
    used, torn = [], []
    for entry in entries:
        match = NAME.fullmatch(entry.path)
        if match is None or int(match[1]) >= NUM_FILES:
            continue
        used.append(entry)
        count, rest = divmod(entry.size_bytes, record_bytes)
        if rest:
            torn.append(entry.path)
        rows = block_rows(dim)
        for start in range(0, max(count, 1), rows):
            stop = min(start + rows, count)
            torn_bytes = rest if stop == count else 0
            slices.append(XdlSlice(storage.url, entry.path, int(match[1]), start, stop, dim, torn_bytes))
    if not used:
        raise VectorsNotFoundError(f"{address} has no files data.0 to data.{NUM_FILES - 1}, as XDL writes them")
    is_empty = not any(piece.stop for piece in slices)
    if is_empty and not torn:
        raise VectorImportError(f"all {len(used)} files of {address} are empty")
    if is_empty or len(torn) > max(1, MAX_TORN_SHARE * len(used)):
        raise VectorImportError(
            f"{len(torn)} of {len(used)} files, {torn[0]} first, are not a number of records of {record_bytes} bytes"
            f" (a key and {dim} float32): is --dim {dim} right?"
        )
    _probe([piece for piece in slices if piece.start == 0][:PROBED_FILES], dim)
    return VectorSource(dim, tuple(slices), fingerprint_of(storage, used))


def _probe(slices: Sequence[XdlSlice], dim: int) -> None:
    """Raise VectorImportError where many of the first records, but for the very first, are not of their files.

    Before a store is made, whose width is for ever.
    """
    probes = [replace(piece, start=1, stop=max(1, min(piece.stop, PROBED_RECORDS)), torn_bytes=0) for piece in slices]
    blocks = [block for probe in probes for block in probe.read(PROBED_RECORDS)]
    num_good, num_bad = (sum(map(len, lists)) for lists in (blocks, [block.bad for block in blocks]))
    if num_bad > 1 and 2 * num_bad > num_good:
        raise VectorImportError(
            f"{num_bad} of the first {num_good + num_bad} keys are in the wrong file (key k belongs in data.(k mod"
            f" {NUM_FILES})): is --dim {dim} right?"
        )
