"""Traces of images in a store: every file that lies there is read, whether a snapshot names it or not."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.errors import CorruptFileError, StorageError
from featurestore.format.datafile import KEY, URI
from featurestore.keys import Int64Array, key_of_uri, keys_of_uris
from featurestore.storage.local import StorageEntry
from featurestore.storage.storage import Storage
from featurestore.storage.threads import Progress, in_threads
from featurestore.text.parsing import parse_json
from featurestore.upkeep.keyfiles import read_names

_THREADS = 4
_PARQUET = b"PAR1"
_BLOCK_ROWS = 65_536  # of keys and uris
_FEW = 1_000  # uris that are looked for within texts too; of more, a text is one of them or not
_WITH_KEYS = ("staging/", "reports/")  # JSON files that may name keys; numbers elsewhere mean something else

TraceKind = Literal["rows", "text", "unread"]


@dataclass(frozen=True)
class Images:
    """The images of a takedown: keys (N,), ascending, and uris; what has one of either is theirs."""

    keys_N: Int64Array
    uris: frozenset[str]

    @classmethod
    def of_keys(cls, keys: Int64Array) -> "Images":
        """Name images by keys."""
        return cls(np.unique(keys), frozenset())

    @classmethod
    def of_uris(cls, uris: list[str]) -> "Images":
        """Name images by uris; each names the key that it has by itself, and any that it was stored under."""
        return cls(np.unique(keys_of_uris(uris)), frozenset(uris))

    @classmethod
    def of_file(cls, file: Path) -> "Images":
        """Read a file of keys or of uris, see `read_names`. Raises InvalidRowsError."""
        keys, uris = read_names(file)
        return cls.of_uris(uris) if uris else cls.of_keys(keys)

    @property
    def described(self) -> str:
        """Say how many there are, and by what they are named."""
        names, count = ("uri", len(self.uris)) if self.uris else ("key", len(self.keys_N))
        return f"{count:,} {names}{'' if count == 1 else 's'}"

    def are_in(self, keys_N: Int64Array, uris: Any) -> npt.NDArray[np.bool_]:
        """Return which rows are theirs, (N,); `uris` is an Arrow array, or None where there are none."""
        found_N = np.isin(keys_N, self.keys_N)
        if self.uris and uris is not None:
            found_N |= np.array([uri in self.uris for uri in uris.to_pylist()], np.bool_)
        return found_N

    def without_rows(self, found: Collection[int | str]) -> list[str]:
        """List those of which neither key nor uri was found, in ascending order."""
        if self.uris:
            return [uri for uri in sorted(self.uris) if uri not in found and key_of_uri(uri) not in found]
        return [str(key) for key in self.keys_N.tolist() if key not in found]


@dataclass(frozen=True)
class Trace:
    """A file that has rows of the images, a text that names one, or one that cannot be read, so that nobody knows."""

    kind: TraceKind
    path: str
    rows: int
    text: str
    """For people, with the full address."""


@dataclass
class AbsenceReport:
    """What was read of a store, and the traces that were found."""

    num_files: int = 0
    num_bytes: int = 0
    traces: list[Trace] = field(default_factory=list)
    found: set[int | str] = field(default_factory=set)
    """Keys and uris of the images' rows, each of a row that has it."""

    @property
    def is_absent(self) -> bool:
        """Whether every file could be read, and none has a trace."""
        return not self.traces


def find_traces(storage: Storage, images: Images, progress: Progress | None = None) -> AbsenceReport:
    """Read every file below the store's address, also those that no snapshot names, and find rows of the images.

    Of Parquet files keys and uris are read, tombstones among them; of JSON files below staging/ and reports/ what
    names a key or a uri; in all other files the bytes of the uris are looked for. Files that vanish meanwhile are left
    out. Cost: the key and uri columns of all data files. Raises StorageError.
    """
    entries, report = storage.entries(), AbsenceReport()

    def look(entry: StorageEntry) -> tuple[Trace | None, set[int | str]]:
        found: set[int | str] = set()
        try:
            return _trace(storage, entry, images, found), found
        except FileNotFoundError:
            return None, set()

    for entry, (trace, found) in zip(entries, in_threads(look, entries, _THREADS, progress), strict=True):
        report.num_files += 1
        report.num_bytes += entry.size_bytes
        report.found |= found
        if trace is not None:
            report.traces.append(trace)
    return report


def _trace(storage: Storage, entry: StorageEntry, images: Images, found: set[int | str]) -> Trace | None:
    path = entry.path
    try:
        with storage.open_input(path) as source:
            is_parquet = source.read(len(_PARQUET)) == _PARQUET
            if is_parquet or path.endswith(".parquet"):
                source.seek(0)
                rows = sum(_rows(source, images, found))
            else:
                return _text_trace(storage, path, images)
    except (CorruptFileError, pa.ArrowException, OSError, KeyError) as error:
        if isinstance(error, FileNotFoundError | StorageError):
            raise
        text = f"{storage.full(path)} cannot be read, so nobody knows what is in it: {error}"
        return Trace("unread", path, 0, text)
    return Trace("rows", path, rows, f"{storage.full(path)} has {rows:,} of their rows") if rows else None


def _rows(source: Any, images: Images, found: set[int | str]) -> Iterator[int]:
    """Count the rows of the images in a Parquet file, block by block, and add their keys and uris to `found`."""
    file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)
    names = [name for name in (KEY, URI) if name in file.schema_arrow.names]
    if KEY not in names:
        raise KeyError(f"it has no column {KEY}, so it is no file of a store")
    for batch in file.iter_batches(_BLOCK_ROWS, columns=names, use_threads=False):
        keys_K = np.asarray(batch[KEY].to_numpy(zero_copy_only=False), np.int64)
        uris = batch[URI] if URI in names else None
        theirs_K = images.are_in(keys_K, uris)
        found.update(keys_K[theirs_K].tolist())
        if uris is not None:
            found.update(uri for uri in uris.filter(pa.array(theirs_K)).to_pylist() if uri is not None)
        yield int(theirs_K.sum())


def _text_trace(storage: Storage, path: str, images: Images) -> Trace | None:
    data = storage.read_bytes(path)
    try:
        value = parse_json(data)
    except ValueError:
        found = any(uri.encode() in data for uri in images.uris)
    else:
        keys = frozenset(images.keys_N.tolist()) if path.startswith(_WITH_KEYS) else frozenset[int]()
        found = _names_one(value, keys, images.uris, False)
    return Trace("text", path, 0, f"{storage.full(path)} names one of them") if found else None


def _names_one(value: Any, keys: frozenset[int], uris: frozenset[str], is_key: bool) -> bool:
    """Return whether a JSON value has one of the uris, also within a text, or one of the keys where a key is meant."""
    if isinstance(value, dict):
        return any(_names_one(each, keys, uris, KEY in name) or name in uris for name, each in value.items())
    if isinstance(value, list):  # an image in a report of a part is a list that begins with its key
        return any(_names_one(each, keys, uris, is_key or not place) for place, each in enumerate(value))
    if isinstance(value, str):
        return value in uris or (len(uris) <= _FEW and any(uri in value for uri in uris))
    return is_key and isinstance(value, int) and value in keys
