"""Image sources: files of a folder or of an object store, listed and read.

On a disk links are followed, but each folder is listed once: links in a circle end, and a folder that several links
lead to has its files under one name. Pipes, sockets and devices are not images.

The images of a listing are columns of a mapped file: what is looked at takes memory, and the rest takes disk.
Letters of shapes: N images, K of them asked for, R that repeat another's key.
"""

import contextlib
import io
import mmap
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from featurestore.errors import FeatureStoreError, KeyCollisionError
from featurestore.format.datafile import is_text
from featurestore.format.shard import take_rows
from featurestore.keys import AnyArray, BoolArray, Int64Array, key_of_uri
from featurestore.storage.remote import HTTP_PROTOCOLS, S3_PROTOCOLS, protocol_and_path
from featurestore.storage.storage import Storage, file_at
from featurestore.text import CsvTextError, long_rows, one_line, refusal
from pipeline.errors import BadImageError, SourceError, SourceNotFoundError
from pipeline.problems import Problem

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


class ImageTable:
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
            yield from self.refs(np.arange(start, min(start + BATCH_ROWS, self._length)))

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
                raise KeyCollisionError(Problem.KEY_OF_TWO_IMAGES, key, names[0], names[1])
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
        raise SourceError(Problem.NO_ROOM_FOR_LISTING, tempfile.gettempdir(), error.strerror or error) from error
    reader = pa.ipc.open_file(pa.py_buffer(mapped))
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
TABLE_EXTENSIONS = (".parquet", ".csv")
STAT_THREADS = 32  # waiting for answers, not computing


def list_images(address: str) -> Listing:
    """List the images of a folder, of an fsspec address, or of a table (.parquet, .csv).

    In a folder the uri is the path relative to it, with forward slashes, and the key that of the uri. A table has a
    column `uri` (relative to the table's folder, or a whole address) and `key` (int64), or `id` (string, made into a
    key), or neither (the key is that of the uri). Raises SourceError, KeyCollisionError and the errors of storage.
    """
    storage = Storage(address)
    is_table = address.lower().endswith(TABLE_EXTENSIONS)
    if not storage.is_local:
        if is_table:
            return _list_table(address)
        on_s3 = protocol_and_path(address)[0] in S3_PROTOCOLS
        storage, folder = _place_of(address.rstrip("/")) if on_s3 else (storage, "")
        return _list_folder(_remote_files(storage, folder), storage.full(folder), address)
    with _disk_errors(address):
        is_there, is_folder = Path(storage.url).exists(), Path(storage.url).is_dir()
    if not is_there:
        raise SourceNotFoundError(Problem.NO_IMAGES_THERE, address)
    if is_folder:
        return _list_folder(_local_files(storage.url, address), storage.url, address)
    if is_table:
        return _list_table(storage.url)
    raise SourceNotFoundError(Problem.NOT_A_FOLDER_OR_TABLE, address, ", ".join(TABLE_EXTENSIONS))


def read_image(location: str, most_bytes: int | None = None) -> bytes:
    """Read the bytes of one image, or its first `most_bytes` where it has more.

    Raises BadImageError with the reason.
    """
    try:
        storage, path = _place_of(location)
        if most_bytes is None:
            return storage.read_bytes(path)
        first = np.empty(most_bytes, np.uint8)
        size_bytes = storage.read_into(path, first.data)
        return first[:size_bytes].tobytes()
    except FileNotFoundError as error:
        raise BadImageError(Problem.NO_SUCH_FILE) from error
    except FeatureStoreError as error:
        raise BadImageError(*error.args) from error


def _place_of(address: str) -> tuple[Storage, str]:
    """Split the address of a file into a place and the path there.

    On S3 the place is the bucket, and over http the server, as a key may have empty parts (`a//b.jpg`), which the
    address of a folder loses.
    """
    protocol, path = protocol_and_path(address)
    if protocol not in (*S3_PROTOCOLS, *HTTP_PROTOCOLS):
        return file_at(address)
    place, _, key = path.partition("/")
    return Storage(f"{protocol}://{place}"), key


FoundFile = tuple[str, str, str, int]
"""A file below a folder as an ImageRef without key; the uri is empty where it is not a regular file."""


def _list_folder(files: Iterable[FoundFile], folder: str, address: str) -> Listing:
    num_ignored = 0

    def images() -> Iterator[ImageRef]:
        nonlocal num_ignored
        for file in files:
            if _is_image(file[0]):
                yield ImageRef(key_of_uri(file[0]), *file)
            else:
                num_ignored += 1

    table = ImageTable.of(images(), f"{folder.rstrip('/')}/", by_uri=True)
    if not len(table):
        raise SourceNotFoundError(Problem.NO_IMAGES, address, num_ignored, ", ".join(IMAGE_EXTENSIONS))
    return Listing(table, num_ignored)


def _remote_files(storage: Storage, folder: str) -> Iterator[FoundFile]:
    for entry in storage.iter_entries(folder):
        uri = entry.path.removeprefix(folder).lstrip("/")
        yield uri, storage.full(entry.path), _tag(entry.size_bytes, entry.mtime_s, entry.tag), entry.size_bytes


def _local_files(root: str, address: str) -> Iterator[FoundFile]:
    with _disk_errors(address):
        for path, found in files_below(root):
            # A name that is not UTF-8 is listed as it is shown; reading finds no such file.
            location = os.fsencode(path).decode(errors="backslashreplace")
            uri = location.removeprefix(root).lstrip("/")
            if found is None:  # it cannot be looked at: reading it will say why
                yield uri, location, "", -1
            elif stat.S_ISREG(found.st_mode):
                yield uri, location, _tag(found.st_size, found.st_mtime), found.st_size
            else:
                yield "", location, "", -1


def _is_image(uri: str) -> bool:
    """Return whether a file's name ends as those of images; not by pathlib, which keeps the parts of each path."""
    stem, _, ending = uri.rpartition("/")[2].rpartition(".")
    return bool(stem) and f".{ending.lower()}" in IMAGE_EXTENSIONS


def files_below(root: str) -> Iterator[tuple[str, os.stat_result | None]]:
    """List all files below a folder of this machine, each with its `stat`, None where that fails.

    A folder that is there as itself and behind links is listed as itself. Raises OSError where a folder cannot be
    listed: its images would be taken for vanished.
    """
    listed: set[tuple[int, int]] = set()
    folders, links = [root], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        found = Path(folder).stat()
        if (found.st_dev, found.st_ino) in listed:
            continue
        listed.add((found.st_dev, found.st_ino))
        with os.scandir(folder) as entries:
            children = sorted(entries, key=lambda entry: entry.name)
        for entry in children:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
                continue
            target = _target_of(entry)
            if target is not None and stat.S_ISDIR(target.st_mode):
                links.append(entry.path)
            else:
                yield entry.path, target


def _target_of(entry: "os.DirEntry[str]") -> os.stat_result | None:
    """Look at a file, or at the target of its link."""
    try:
        return entry.stat()
    except PermissionError:
        if entry.is_symlink() and not PurePath(entry.name).suffix:  # to a folder, perhaps
            raise
        return None
    except OSError:  # a link that leads nowhere, or in a circle
        return None


@contextlib.contextmanager
def _disk_errors(address: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(Problem.REFUSED, "list", error.filename or address, refusal(error)) from error


def _list_table(address: str) -> Listing:
    table = _read_table(address)
    uris = _column(table, "uri", pa.string(), address)
    name = next(name for name in ("key", "id", "uri") if name in table.column_names)
    names = _column(table, name, pa.int64() if name == "key" else pa.string(), address)
    if not len(uris):
        raise SourceError(Problem.NO_ROWS, address)
    folder = address.rpartition("/")[0]

    def images() -> Iterator[ImageRef]:
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            for start in range(0, len(uris), BATCH_ROWS):
                names_K, uris_K = (column.slice(start, BATCH_ROWS).to_pylist() for column in (names, uris))
                keys_K = names_K if name == "key" else map(key_of_uri, names_K)
                places_K = [uri if "://" in uri or uri.startswith("/") else f"{folder}/{uri}" for uri in uris_K]
                seen_K = pool.map(_look_at, places_K)
                for key, uri, location, (tag, size_bytes) in zip(keys_K, uris_K, places_K, seen_K, strict=True):
                    yield ImageRef(key, uri, location, tag, size_bytes)

    images_N = ImageTable.of(images(), f"{folder}/")
    return Listing(images_N, len(uris) - len(images_N))


def _read_table(address: str) -> pa.Table:
    wanted = ("key", "id", "uri")
    storage, path = _place_of(address)
    try:
        data = io.BytesIO(storage.read_bytes(path))
        if path.lower().endswith(".csv"):
            # As text: type inference would make numbers of ids such as "007".
            types = pa.csv.ConvertOptions(column_types={"id": pa.string(), "uri": pa.string(), "key": pa.int64()})
            if long := long_rows(data, ","):
                raise CsvTextError(Problem.QUOTED_LINES.of(min(each.line for each in long.values())))
            data.seek(0)
            table = pa.csv.read_csv(data, convert_options=types)
        else:
            present = pa.parquet.read_schema(data).names
            table = pa.parquet.read_table(data, columns=[name for name in wanted if name in present])
    except FileNotFoundError as error:
        raise SourceNotFoundError(Problem.NO_IMAGES_THERE, address) from error
    except (pa.ArrowException, ValueError, OSError) as error:
        raise SourceError(Problem.REFUSED, "read", address, one_line(error)) from error
    if "uri" not in table.column_names:
        raise SourceError(Problem.NO_URI_COLUMN, address)
    return table


def _column(table: pa.Table, name: str, wanted: pa.DataType, address: str) -> Any:
    """Read a column as an Arrow array. Raises SourceError where it is of another kind or has gaps."""
    column = table.column(name)
    if not (pa.types.is_integer if pa.types.is_integer(wanted) else is_text)(column.type):
        way_out = "; use the name key for int64 keys" if name == "id" and pa.types.is_integer(column.type) else ""
        raise SourceError(Problem.WRONG_TYPE, address, name, column.type, wanted, way_out)
    if column.null_count:
        raise SourceError(Problem.EMPTY_VALUES, address, name, column.null_count)
    try:
        return cast("Any", column).cast(wanted)
    except pa.ArrowInvalid as error:
        raise SourceError(Problem.COLUMN_UNREAD, address, name, error) from error


def _look_at(location: str) -> tuple[str, int]:
    """Return a file's tag and size in bytes; "" and -1 where it cannot be looked at: reading it will say why."""
    try:
        storage, path = _place_of(location)
        entry = storage.entry(path)
    except (FeatureStoreError, FileNotFoundError):
        return "", -1
    # The tag of a disk is another one for a copy of the file.
    return _tag(entry.size_bytes, entry.mtime_s, "" if storage.is_local else entry.tag), entry.size_bytes


def _tag(size_bytes: int, mtime_s: float, etag: str = "") -> str:
    """Return a tag that changes when a file does: its etag, where it has one, else size and time."""
    return etag or f"{size_bytes}-{mtime_s}"
