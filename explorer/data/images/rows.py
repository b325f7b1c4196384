"""Images of a snapshot by key, uri and shard, and the rows of one image over the snapshots of a store."""

import itertools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from explorer.data.cache import LruCache
from explorer.data.store.listing import name_of
from explorer.data.store.snapshots import NamedImage
from featurestore import log
from featurestore.errors import CorruptFileError
from featurestore.format.datafile import (
    DELETED,
    FEATURE,
    KEY,
    METADATA_COLUMNS,
    URI,
    matrix_of,
    numpy_column,
    open_entry,
    text_column,
)
from featurestore.keys import key_of_uri, shard_of
from featurestore.snapshot import Snapshot
from featurestore.spec import FileEntry, Manifest
from featurestore.storage.threads import in_threads
from featurestore.store import FeatureStore

MOST_FOUND = 120
_LOOKS_S = 1.5
_LARGEST = 1 << 63


@dataclass(frozen=True)
class Found:
    """Images of some shards whose uri contains a text."""

    images: tuple[NamedImage, ...]
    num_searched: int
    """Number of images searched."""
    next_shard: int | None
    """Shard where the search continues; None: all were searched."""


class ImageNames:
    """Names of the images in a snapshot. Thread-safe."""

    def __init__(self) -> None:
        self._tables: LruCache[pa.Table] = LruCache(4)

    def page(self, snapshot: Snapshot, shard: int, first: int, most: int) -> tuple[list[NamedImage], int]:
        """List up to `most` images of a shard from number `first` on, and count all. Reads its keys and uris."""
        if not snapshot.manifest.files(shard):
            return [], 0
        name = (name_of(snapshot), shard)
        table = self._tables.get(name, lambda: snapshot.shard_reader(shard).read([KEY, URI]))
        return _images(table.slice(first, most)), len(table)


def find_key(snapshot: Snapshot, key: int) -> NamedImage | None:
    """Find an image by its key, or return None. Reads the names of one shard."""
    if not -_LARGEST <= key < _LARGEST:
        return None
    shard = int(shard_of([key], snapshot.info.num_shards)[0])
    keys, uris = snapshot.shard_reader(shard).uris(np.array([key], np.int64))
    return NamedImage(key, uris[0]) if len(keys) else None


def find_exactly(snapshot: Snapshot, text: str) -> list[NamedImage]:
    """Find images whose key or uri is `text`; in the second case the key must be the uri's."""
    found = []
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdigit() and len(digits) <= len(str(_LARGEST)):
        found.append(find_key(snapshot, int(text)))
    try:
        named = find_key(snapshot, key_of_uri(text))
    except UnicodeEncodeError:  # not a valid text: half a character
        named = None
    found.append(named if named is not None and named.uri == text else None)
    return list(dict.fromkeys(image for image in found if image is not None))


def find_part(snapshot: Snapshot, part: str, first_shard: int = 0) -> Found:
    """Find up to MOST_FOUND images whose uri contains `part`, ignoring case, from one shard on.

    Stops between two shards after some seconds. Raises CorruptFileError.
    """
    until = time.monotonic() + _LOOKS_S
    images: list[NamedImage] = []
    num_searched = 0
    shards = [shard for shard in sorted(snapshot.manifest.shards) if shard >= first_shard]
    for shard, following in itertools.zip_longest(shards, shards[1:]):
        for table in snapshot.shard_reader(shard).live_tables([KEY, URI]):
            num_searched += len(table)
            is_match: Any = pc.match_substring(table[URI], part, ignore_case=True)
            images += _images(table.filter(is_match))
        if len(images) >= MOST_FOUND or time.monotonic() > until:
            return Found(tuple(images), num_searched, following)
    return Found(tuple(images), num_searched, None)


def _images(table: pa.Table) -> list[NamedImage]:
    return list(map(NamedImage, numpy_column(table, KEY).tolist(), text_column(table, URI)))


MOST_SNAPSHOTS = 60
"""Number of snapshots that are examined, the newest ones."""
_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """One row of an image in a data file."""

    uri: str
    digest: str
    """Digest of the image's bytes; zeros if unknown, as for imported vectors."""
    source_tag: str
    width: int
    height: int
    norm: float
    """Euclidean length of the feature."""

    @property
    def has_digest(self) -> bool:
        """Whether the store has a digest of the image's bytes."""
        return self.digest.strip("0") != ""


@dataclass(frozen=True, kw_only=True)
class RowSpan:
    """One row, or none, from the first to the last snapshot that has it."""

    first: int
    last: int
    time_s: float
    operation: str
    """Time and operation of the first snapshot."""
    row: ImageRow | None
    """None: the image is not in these snapshots."""


def row_of(store: FeatureStore, manifest: Manifest, key: int) -> ImageRow | None:
    """Read the row of an image in a snapshot, or return None. Reads the names of its shard."""
    files = manifest.files(int(shard_of([key], store.info.num_shards)[0]))
    for entry in reversed(files):
        if (found := _row_in(store, entry, key)) is not None:
            return found.row
    return None


def row_spans(store: FeatureStore, key: int) -> list[RowSpan]:
    """List the rows of an image over the newest MOST_SNAPSHOTS snapshots, oldest first.

    Reads the names of each data file of its shard once, and the feature if the image is in it. The same row in another
    file, after a compaction, is not a change. Skips damaged manifests.
    """
    shard = int(shard_of([key], store.info.num_shards)[0])
    versions = log.versions(store.storage)[-MOST_SNAPSHOTS:]
    found_in: dict[str, _InFile | None] = {}
    spans: list[RowSpan] = []
    for manifest in in_threads(lambda version: _manifest(store, version), versions, _THREADS):
        if manifest is None:
            continue
        row: ImageRow | None = None
        for entry in reversed(manifest.files(shard)):
            if entry.path not in found_in:
                found_in[entry.path] = _row_in(store, entry, key)
            if (found := found_in[entry.path]) is not None:
                row = found.row
                break
        if spans and spans[-1].row == row:
            spans[-1] = RowSpan(**{**spans[-1].__dict__, "last": manifest.version})
        elif spans or row is not None:
            number = manifest.version
            spans.append(
                RowSpan(first=number, last=number, time_s=manifest.time_s, operation=manifest.operation, row=row)
            )
    return spans


@dataclass(frozen=True)
class _InFile:
    """The row of a key in a file; None if it is a tombstone."""

    row: ImageRow | None


def _manifest(store: FeatureStore, version: int) -> Manifest | None:
    try:
        return log.read(store.storage, version)
    except (FileNotFoundError, CorruptFileError):
        return None


def _row_in(store: FeatureStore, entry: FileEntry, key: int) -> _InFile | None:
    """Find the row of a key in one file, or return None."""
    with open_entry(store.storage, store.info, entry) as file:
        table = file.read([*METADATA_COLUMNS, DELETED])
        places = np.flatnonzero(numpy_column(table, KEY) == key)
        if not len(places):
            return None
        place = int(places[-1])
        values: dict[str, Any] = table.slice(place, 1).to_pylist()[0]
        if values[DELETED]:
            return _InFile(None)
        group = int(np.searchsorted(np.asarray(file.group_starts), place, side="right")) - 1
        features_ND = matrix_of(file.read([FEATURE], [group]), store.info)
        feature_D = store.codec.decode(features_ND[place - file.group_starts[group]][None])[0]
        row = ImageRow(
            uri=values["uri"],
            digest=values["content_digest"].hex(),
            source_tag=values["source_tag"],
            width=values["width"],
            height=values["height"],
            norm=float(np.linalg.norm(feature_D.astype(np.float64))),
        )
    return _InFile(row)
