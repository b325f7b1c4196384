"""The images of a snapshot as one table with what samples say of them: searched, filtered and sorted as a whole.

The table is a file of the explorer's cache that is mapped into memory: names of a million images are 60 MB, of which
only what is read is in memory.

Letters of shapes: N images of the snapshot.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from explorer.data.ads import AdFigures
from explorer.data.background import Task
from explorer.data.cache import TableCache, about_of, described, digest_of
from explorer.data.snapshots import name_of, newest_at
from featurestore.format.datafile import KEY, URI
from featurestore.keys import Int64Array
from featurestore.storage.storage import in_threads
from featurestore.store import FeatureStore, Snapshot

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
_THREADS = 2
_FILES = TableCache("images-", most=8)


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


@dataclass(frozen=True)
class Catalogue:
    """All images of a snapshot. Thread-safe."""

    names: pa.Table
    """Key, uri, folder and whether the image is new, in the order of the uris, (N,)."""
    figures: AdFigures
    """Of the images that the samples have."""
    place_N: NDArray[np.int32]
    """The row of each image in the figures, or the one after the last."""

    def __len__(self) -> int:
        """Count the images."""
        return len(self.names)

    @property
    def size_bytes(self) -> int:
        """The memory that it takes besides its file and the figures."""
        return 5 * len(self)

    @property
    def new_since(self) -> int:
        """The snapshot that does not have the new ones yet."""
        return int(about_of(self.names))

    @cached_property
    def folders(self) -> Mapping[str, int]:
        """The folders with their numbers of images, those with most images."""
        return _most(self.names["folder"])

    @cached_property
    def categories(self) -> Mapping[str, int]:
        """The categories with their numbers of images, those with most images; without the empty one."""
        is_here_I = np.bincount(self.place_N, minlength=len(self.figures.keys_I) + 1)[:-1] > 0
        names = pa.array(self.figures.category_I[is_here_I], pa.string())
        return {name: count for name, count in _most(names).items() if name}

    @cached_property
    def num_new(self) -> int:
        """Count the new images."""
        return int(np.count_nonzero(self._new))

    @cached_property
    def _new(self) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self.names[_IS_NEW].to_numpy()
        return found

    def find(self, query: ImageQuery) -> NDArray[np.int32]:
        """Return the rows of the images that a query is for, in its order."""
        return self._ordered(np.flatnonzero(self._matches(query)), query.sort).astype(np.int32)

    def images(self, rows: NDArray[np.int32]) -> list[ListedImage]:
        """Return the images of some rows."""
        chosen = self.names.take(rows)
        of = self.figures.of(chosen[KEY].to_numpy())
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
            for row, (key, uri, is_new) in enumerate(named)
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
            wanted_N &= np.append(self.figures.category_I == query.category, False)[self.place_N]
        return wanted_N & self._new if query.is_new else wanted_N

    def _ordered(self, rows: Int64Array, sort: Sort) -> Int64Array:
        if sort == "uri":
            return rows
        by = self._new[rows] if sort == "new" else np.append(self._sorted_by(sort), -np.inf)[self.place_N[rows]]
        return rows[np.argsort(-by.astype(np.float64), kind="stable")]

    def _sorted_by(self, sort: Sort) -> NDArray[np.float64]:
        """Return the figure by which images are sorted, largest first, (I,); minus infinity where there is none."""
        of = self.figures
        if sort == "impressions":
            by = of.impressions_I.astype(np.float64)
        elif sort == "price":
            by = of.price_I
        else:
            mean = of.clicks_I.sum() / max(1, int(of.impressions_I.sum()))
            by = (of.clicks_I + _PRIOR * mean) / (of.impressions_I + _PRIOR)
            by = np.where(of.impressions_I > 0, by if sort == "ctr" else -by, np.nan)
        return np.where(np.isnan(by), -np.inf, by)


def make_catalogue(store: FeatureStore, snapshot: Snapshot, figures: AdFigures, task: Task[Any]) -> Catalogue:
    """List the images of a snapshot, or open the cached list, and join the figures of ads.

    New are those that a snapshot of a day before did not have, or the store's first one if that is younger. Reads the
    names of all images, some seconds for a million, once. Raises CorruptFileError.
    """

    def named() -> Iterator[pa.Table]:
        task.tell("reads the names of all images")
        table, before = _names(snapshot), _before(store, snapshot)
        task.tell(f"compares with snapshot {before.version}")
        is_old: Any = pc.is_in(table[KEY], value_set=pa.array(before.keys()))
        table = table.append_column(_IS_NEW, pc.invert(is_old))
        yield table.cast(described(table.schema, before.version))

    names = _FILES.get(digest_of(name_of(snapshot)), named)
    return Catalogue(names, figures, figures.places(names[KEY].to_numpy()))


def _names(snapshot: Snapshot) -> pa.Table:
    """Read keys and uris of all images, with the first folder of each, in the order of the uris."""
    columns: dict[str, Any] = {KEY: pa.int64(), URI: pa.large_string()}
    schema = pa.schema(columns)

    def read(shard: int) -> list[pa.Table]:
        tables = snapshot.shard_reader(shard).live_tables([KEY, URI])
        return [table.select([KEY, URI]).cast(schema) for table in tables]

    parts = itertools.chain.from_iterable(in_threads(read, sorted(snapshot.manifest.shards), _THREADS))
    table = pa.concat_tables([schema.empty_table(), *parts]).combine_chunks().sort_by([(URI, "ascending")])
    return table.append_column("folder", _folders(table[URI]))


def _folders(uris_N: Any) -> Any:
    """Return the first folder of each image's path, or an empty text, (N,), dictionary-encoded."""
    if pc.any(pc.match_substring(uris_N, "://")).as_py():
        uris_N = pc.replace_substring_regex(uris_N, r"(?s)^.*://", "")
    first_N = pc.list_element(pc.split_pattern(uris_N, "/", max_splits=1), 0)
    in_folder_N = pc.match_substring(uris_N, "/")
    return pc.if_else(in_folder_N, first_N, pa.scalar("", pa.large_string())).combine_chunks().dictionary_encode()


def _before(store: FeatureStore, snapshot: Snapshot) -> Snapshot:
    """Open the snapshot that new images are not in: of a day before, or the first one that is kept."""
    before = newest_at(store, snapshot.manifest.time_s - _NEW_S, never_empty=True).snapshot
    return min(before, snapshot, key=lambda each: each.version)


def _most(names: Any) -> dict[str, int]:
    counts = sorted((-each["counts"], each["values"]) for each in pc.value_counts(names).to_pylist())
    return {name: -count for count, name in sorted(counts[:MOST_NAMES], key=lambda pair: pair[1])}


def _known(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
