"""The images of a snapshot as one table with what samples say of them: searched, filtered and sorted as a whole.

The table is a file of the explorer's cache that is mapped into memory: names of a million images are 60 MB, of which
only what is read is in memory.

Letters of shapes: N images of the snapshot.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from explorer.data.ads import AdFigures
from explorer.data.background import Task
from explorer.data.cache import FileCache, LruCache
from explorer.data.snapshots import name_of, newest_at
from featurestore import log
from featurestore.console.files import replaced_file
from featurestore.format.datafile import KEY, URI
from featurestore.keys import Int64Array
from featurestore.snapshot import Snapshot
from featurestore.store import FeatureStore
from featurestore.upkeep.history import diff

Sort = Literal["uri", "new", "impressions", "ctr", "low_ctr", "price"]
SORTS: dict[Sort, str] = {
    "uri": "name",
    "new": "new first",
    "impressions": "most impressions",
    "ctr": "highest CTR",
    "low_ctr": "lowest CTR",
    "price": "highest price",
}
MOST_NAMES = 60
"""Folders or categories to choose from, those of most images."""
_NEW_S = 24 * 3600.0
_PRIOR = 20
"""Impressions of the mean CTR that each image gets on top of its own, where images are sorted by CTR."""
_IS_NEW = "is_new"
_ABOUT = b"explorer_images"
_FILES = FileCache("images-", ".arrow", most=8)


class ImageQuery(NamedTuple):
    """What a list of images is asked for; empty texts: all."""

    text: str = ""
    folder: str = ""
    category: str = ""
    is_new: bool = False
    sort: Sort = "uri"


class ListedImage(NamedTuple):
    """An image of a list; `ctr` is None without impressions."""

    key: int
    uri: str
    category: str
    impressions: int
    ctr: float | None
    price: float | None
    is_new: bool


@dataclass
class Catalogue:
    """All images of a snapshot. Thread-safe."""

    names: pa.Table
    """Key, uri, folder and whether the image is new, in the order of the uris, (N,)."""
    figures: AdFigures
    """Of the same images, (N,)."""
    new_since: int
    """The snapshot that does not have the new ones yet."""
    _found: LruCache[Int64Array] = field(default_factory=lambda: LruCache(32))

    def __len__(self) -> int:
        """Count the images."""
        return len(self.names)

    @cached_property
    def folders(self) -> Mapping[str, int]:
        """The folders with their numbers of images, those with most images."""
        return _most(self.names["folder"])

    @cached_property
    def categories(self) -> Mapping[str, int]:
        """The categories with their numbers of images, those with most images; without the empty one."""
        return {name: count for name, count in _most(pa.array(self.figures.category_I)).items() if name}

    @cached_property
    def num_new(self) -> int:
        """Count the new images."""
        return int(np.count_nonzero(self._new))

    @cached_property
    def _new(self) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self.names[_IS_NEW].to_numpy()
        return found

    def find(self, query: ImageQuery) -> Int64Array:
        """Return the rows of the images that a query is for, in its order."""
        return self._found.get(query, lambda: self._ordered(np.flatnonzero(self._matches(query)), query.sort))

    def images(self, rows: Int64Array) -> list[ListedImage]:
        """Return the images of some rows."""
        chosen, of = self.names.take(rows), self.figures
        named: Iterator[tuple[Any, ...]] = zip(*(chosen[name].to_pylist() for name in (KEY, URI, _IS_NEW)), strict=True)
        return [
            ListedImage(
                key=key,
                uri=uri,
                category=str(of.category_I[row]),
                impressions=(shown := int(of.impressions_I[row])),
                ctr=int(of.clicks_I[row]) / shown if shown else None,
                price=_known(of.price_I[row]),
                is_new=is_new,
            )
            for row, (key, uri, is_new) in zip(rows.tolist(), named, strict=True)
        ]

    def _matches(self, query: ImageQuery) -> NDArray[np.bool_]:
        wanted_N = np.ones(len(self), np.bool_)
        if query.text:
            has_it: Any = pc.match_substring(self.names[URI], query.text, ignore_case=True)
            wanted_N &= has_it.to_numpy()
            with suppress(ValueError):
                wanted_N |= self.names[KEY].to_numpy() == int(query.text)
        if query.folder:
            in_it: Any = pc.equal(self.names["folder"], pa.scalar(query.folder, pa.large_string()))
            wanted_N &= in_it.to_numpy()
        if query.category:
            wanted_N &= self.figures.category_I == query.category
        return wanted_N & self._new if query.is_new else wanted_N

    def _ordered(self, rows: Int64Array, sort: Sort) -> Int64Array:
        of = self.figures
        if sort == "uri" or not len(rows):
            return rows
        if sort == "new":
            by = self._new[rows].astype(np.float64)
        elif sort == "impressions":
            by = of.impressions_I[rows].astype(np.float64)
        elif sort == "price":
            by = of.price_I[rows]
        else:
            mean = of.clicks_I.sum() / max(1, of.impressions_I.sum())
            by = (of.clicks_I[rows] + _PRIOR * mean) / (of.impressions_I[rows] + _PRIOR)
            by = np.where(of.impressions_I[rows] > 0, by if sort == "ctr" else -by, np.nan)
        return rows[np.argsort(np.where(np.isnan(by), np.inf, -by), kind="stable")]


def make_catalogue(store: FeatureStore, snapshot: Snapshot, figures: AdFigures, task: Task[Any]) -> Catalogue:
    """List the images of a snapshot, or open the cached list, and join the figures of ads.

    New are those that a snapshot of a day before did not have, or the store's first one if that is younger. Reads the
    names of all images, some seconds for a million, once. Raises CorruptFileError.
    """
    file = _FILES.path(hashlib.sha256(json.dumps(name_of(snapshot)).encode()).hexdigest()[:24])
    if (names := _opened(file)) is None:
        task.tell("reads the names of all images")
        table, before = _names(snapshot), _before(store, snapshot)
        task.tell(f"compares with snapshot {before}")
        new = diff(store, before, snapshot.version).added.keys_N
        is_new = pa.array(np.isin(table[KEY].to_numpy(), new))
        table = table.append_column(_IS_NEW, is_new).replace_schema_metadata({_ABOUT: str(before)})
        with replaced_file(file) as part, pa.OSFile(str(part), "wb") as out, pa.ipc.new_file(out, table.schema) as made:
            made.write_table(table)
        names = _opened(file)
        assert names is not None
        _FILES.prune()
    since = int((names.schema.metadata or {})[_ABOUT])
    return Catalogue(names, figures.of(names[KEY].to_numpy()), since)


def _opened(file: Path) -> pa.Table | None:
    if not file.is_file():
        return None
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        int((table.schema.metadata or {})[_ABOUT])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        file.unlink(missing_ok=True)
        return None
    with suppress(OSError):
        os.utime(file)
    return table


def _names(snapshot: Snapshot) -> pa.Table:
    """Read keys and uris of all images, with the first folder of each, in the order of the uris."""
    columns: dict[str, Any] = {KEY: pa.int64(), URI: pa.large_string()}
    schema = pa.schema(columns)
    parts = [
        table.select([KEY, URI]).cast(schema)
        for shard in sorted(snapshot.manifest.shards)
        for table in snapshot.shard_reader(shard).live_tables([KEY, URI])
    ]
    table = pa.concat_tables([schema.empty_table(), *parts]).combine_chunks().sort_by([(URI, "ascending")])
    in_folder: Any = pc.match_substring(table[URI], "/")
    folder: Any = pc.replace_substring_regex(table[URI], r"(?s)^(?:.*://)?([^/]*)/.*$", r"\1")
    return table.append_column("folder", pc.if_else(in_folder, folder, pa.scalar("", pa.large_string())))


def _before(store: FeatureStore, snapshot: Snapshot) -> int:
    """Find the snapshot that new images are not in: of a day before, or the first one that is kept."""
    before = newest_at(store, snapshot.manifest.time_s - _NEW_S).version if snapshot.version else 0
    first = min([each for each in log.versions(store.storage) if each <= snapshot.version], default=snapshot.version)
    return min(before or first, snapshot.version)


def _most(names: Any) -> dict[str, int]:
    counts = sorted((-each["counts"], each["values"]) for each in pc.value_counts(names).to_pylist())
    return {name: -count for count, name in sorted(counts[:MOST_NAMES], key=lambda pair: pair[1])}


def _known(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
