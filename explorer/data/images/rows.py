"""Images of a snapshot by key, uri and shard."""

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
from featurestore.format.datafile import KEY, URI, numpy_column, text_column
from featurestore.keys import key_of_uri, shard_of
from featurestore.snapshot import Snapshot

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
