"""The images of a listing in columns of a mapped file: what is looked at takes memory, and the rest takes disk.

Letters of shapes: N images, K of them asked for, R that repeat another's key.
"""

import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore.errors import KeyCollisionError
from featurestore.format.shard import take_rows
from featurestore.keys import AnyArray, BoolArray, Int64Array
from pipeline.errors import SourceError

BATCH_ROWS = 1 << 14  # held as Python objects while they are written
_COLUMNS: dict[str, Any] = {
    "key": pa.int64(),
    "uri": pa.string(),
    "location": pa.string(),  # null where it is the table's base and the uri
    "source_tag": pa.string(),
    "size_bytes": pa.int64(),
}
_SCHEMA = pa.schema(_COLUMNS)


class ImageRef(NamedTuple):
    """One image of the listing."""

    key: int
    uri: str  # as the store has it
    location: str  # where to read it
    source_tag: str  # etag, or size and time; empty where the file cannot be looked at
    size_bytes: int  # -1 where unknown


class ImageTable(Sequence[ImageRef]):
    """Images in the order of a listing, each key once. An `ImageRef` is made when it is asked for, and not kept.

    The file has no name, so that it is gone with the process. It is in the folder for temporary files (TMPDIR).
    """

    def __init__(self, base: str, batches: Sequence[pa.RecordBatch]) -> None:
        self._base = base
        self._batches = batches  # of BATCH_ROWS each, but for the last one
        self._length = sum(len(batch) for batch in batches)

    @classmethod
    def of(cls, refs: Iterable[ImageRef], base: str = "", by_uri: bool = False) -> "ImageTable":
        """Write `refs` to a file, in the order of their uris where `by_uri` says so, and the first of equal rows alone.

        `base` and the uri make the location of most of them. Takes 24 bytes of memory an image while it sorts. Raises
        KeyCollisionError where two uris have one key, SourceError where the disk is full.
        """
        written = cls(base, _mapped(_batches_of(refs, base)))
        order_N = written._order(by_uri)
        if np.array_equal(order_N, np.arange(len(written))):
            return written
        chunks = (order_N[start : start + BATCH_ROWS] for start in range(0, len(order_N), BATCH_ROWS))
        return cls(base, _mapped(written.take(chunk).combine_chunks().to_batches()[0] for chunk in chunks))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[ImageRef]:
        for start in range(0, self._length, BATCH_ROWS):
            yield from self[start : start + BATCH_ROWS]

    @overload
    def __getitem__(self, place: int) -> ImageRef: ...
    @overload
    def __getitem__(self, place: slice) -> list[ImageRef]: ...
    def __getitem__(self, place: int | slice) -> ImageRef | list[ImageRef]:
        chosen = range(self._length)[place]
        return self.refs(np.array([chosen]))[0] if isinstance(chosen, int) else self.refs(np.array(chosen, np.int64))

    def refs(self, index_K: Int64Array) -> list[ImageRef]:
        """Make the refs of the images at `index_K`."""
        rows = zip(*self.take(index_K).to_pydict().values(), strict=True)
        return [
            ImageRef(key, uri, self._base + uri if location is None else location, *rest)
            for key, uri, location, *rest in rows
        ]

    def take(self, index_K: AnyArray, *columns: str) -> pa.Table:
        """Read columns (default: all) of the images at `index_K`, in that order."""
        # Not Table.take: it copies whole columns of text first.
        batch_K, row_K = np.divmod(index_K, BATCH_ROWS)
        order_K = np.argsort(batch_K, kind="stable")
        numbers, starts = np.unique(batch_K[order_K], return_index=True)
        pieces = [
            self._batches[number].select(list(columns or _COLUMNS)).take(pa.array(rows))
            for number, rows in zip(numbers, np.split(row_K[order_K], starts[1:]), strict=bool(len(numbers)))
        ]
        schema = pa.schema({name: _COLUMNS[name] for name in columns or _COLUMNS})
        return take_rows(pa.Table.from_batches(pieces, schema), np.argsort(order_K))

    def keys(self) -> Int64Array:
        """Return all keys, (N,)."""
        return self._numbers("key")

    def sizes(self) -> Int64Array:
        """Return the sizes of all files in bytes, (N,); -1 where unknown."""
        return self._numbers("size_bytes")

    def has_tag(self) -> BoolArray:
        """Return which images have a source tag, (N,)."""
        each: list[Any] = [pc.not_equal(batch.column("source_tag"), pa.scalar("")) for batch in self._batches]
        return np.concatenate([np.empty(0, np.bool_), *(found.to_numpy(zero_copy_only=False) for found in each)])

    def _numbers(self, name: str) -> Int64Array:
        return np.concatenate([np.empty(0, np.int64), *(batch.column(name).to_numpy() for batch in self._batches)])

    def _order(self, by_uri: bool) -> Int64Array:
        """Find the rows to keep, in their order. Raises KeyCollisionError."""
        keys_N, order_N = self.keys(), np.arange(self._length)
        if by_uri:
            uris = pa.chunked_array([batch.column("uri") for batch in self._batches], pa.string())
            order_N = pc.sort_indices(uris).to_numpy().view(np.int64)
        place_R, first_R = _repeats(keys_N[order_N])
        for start in range(0, len(place_R), BATCH_ROWS):
            again, first = (order_N[places[start : start + BATCH_ROWS]] for places in (place_R, first_R))
            uris_again, uris_first = (self.take(index, "uri")["uri"].combine_chunks() for index in (again, first))
            if not uris_again.equals(uris_first):
                is_other: Any = pc.not_equal(uris_again, uris_first)
                differing = is_other.index(True).as_py()
                key, names = keys_N[again[differing]], (uris_first[differing].as_py(), uris_again[differing].as_py())
                raise KeyCollisionError(f"key {key} belongs to two images, {names[0]!r} and {names[1]!r}: rename one")
        return np.delete(order_N, place_R) if len(place_R) else order_N


class Listing(NamedTuple):
    """All images, in the order of their uris (folder) or of the table."""

    images: ImageTable
    num_ignored: int  # files without an image's extension, or rows that repeat another


def _repeats(keys_N: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Find the places of keys that were there before, ascending, and for each the first place of its key, both (R,)."""
    sorted_N = np.sort(keys_N)
    if not (sorted_N[1:] == sorted_N[:-1]).any():
        return np.empty(0, np.int64), np.empty(0, np.int64)
    _, first_U, inverse_N = np.unique(keys_N, return_index=True, return_inverse=True)
    first_N = first_U[inverse_N]
    place_R = np.flatnonzero(first_N != np.arange(len(keys_N)))
    return place_R, first_N[place_R]


def _batches_of(refs: Iterable[ImageRef], base: str) -> Iterator[pa.RecordBatch]:
    waiting = iter(refs)
    while rows := list(islice(waiting, BATCH_ROWS)):
        columns = dict(zip(_COLUMNS, map(list[Any], zip(*rows, strict=True)), strict=True))
        columns["location"] = [None if ref.location == base + ref.uri else ref.location for ref in rows]
        yield pa.record_batch([pa.array(columns[name], kind) for name, kind in _COLUMNS.items()], schema=_SCHEMA)


def _mapped(batches: Iterable[pa.RecordBatch]) -> list[pa.RecordBatch]:
    """Write batches to a file and map it: the system may take its pages of memory back at any time.

    Raises SourceError where that fails; `batches` may raise other errors than OSError.
    """
    try:
        with tempfile.TemporaryFile() as file:
            with pa.ipc.new_file(file, _SCHEMA) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        folder, reason = tempfile.gettempdir(), error.strerror or error
        raise SourceError(f"cannot keep the listing in {folder}: {reason}; set TMPDIR to a folder with room") from error
    reader = pa.ipc.open_file(pa.py_buffer(mapped))
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]
