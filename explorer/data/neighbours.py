"""Neighbours of an image by features and visual vectors, and their overlap between these spaces.

Neighbours by vectors are exact, by cosine, and are searched block by block in bounded memory.

Letters of shapes: M rows, K rows of a block, D width of a vector, C found.
"""

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from explorer.data.background import Task
from explorer.data.snapshots import named
from featurestore.keys import Int64Array
from featurestore.storage.storage import in_threads
from featurestore.store import Snapshot

READ_BYTES = 16 << 30
"""Most bytes of features read for one answer: some seconds a core. Of a larger store, random shards are read."""
_THREADS = 2

Blocks = Iterable[tuple[Int64Array, npt.NDArray[np.float32]]]


@dataclass(frozen=True)
class Neighbour:
    """An image and its similarity: the cosine in a space of vectors."""

    key: int
    uri: str
    nearness: float


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The images nearest to one, nearest first, and how they were found."""

    images: tuple[Neighbour, ...]
    num_searched: int
    num_rows: int
    """Rows of the snapshot; more than `num_searched` if only a part was searched."""
    seconds: float

    @property
    def is_exact(self) -> bool:
        """Whether all rows were compared."""
        return self.num_searched == self.num_rows

    def without(self, key: int | None, most: int) -> "Neighbours":
        """Leave out one image, if it is there, and all beyond `most`."""
        return replace(self, images=tuple(image for image in self.images if image.key != key)[:most])


@dataclass
class _Nearest:
    """The nearest C of the rows seen so far."""

    query_D: npt.NDArray[np.float32]
    most: int
    keys_C: Int64Array = field(default_factory=lambda: np.empty(0, np.int64))
    cosine_C: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    num_seen: int = 0

    def see(self, keys_K: Int64Array, values_KD: npt.NDArray[np.float32]) -> None:
        self.merge(keys_K, cosines(values_KD, self.query_D), len(keys_K))

    def merge(self, more_keys: Int64Array, more_cosine: npt.NDArray[np.float32], num_seen: int) -> None:
        self.num_seen += num_seen
        keys, cosine = np.concatenate([self.keys_C, more_keys]), np.concatenate([self.cosine_C, more_cosine])
        if len(cosine) > self.most:
            chosen = np.argpartition(-cosine, self.most - 1)
            worst = cosine[chosen[self.most - 1]]
            chosen = np.flatnonzero(cosine >= worst)  # also those tied with the last one: keys break ties
            keys, cosine = keys[chosen], cosine[chosen]
        order = np.lexsort((keys, -cosine))[: self.most]
        self.keys_C, self.cosine_C = keys[order], cosine[order]


def cosines(values_KD: npt.NDArray[np.float32], query_D: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Compute the cosine between each row and the query, (K,); 0 if either is all zeros."""
    norm_K = np.sqrt(np.einsum("kd,kd->k", values_KD, values_KD)) * np.float32(np.linalg.norm(query_D))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine_K = (values_KD @ query_D) / norm_K
    return np.where(norm_K > 0, cosine_K, np.float32(0))


def nearest_features(snapshot: Snapshot, query_D: npt.NDArray[np.float32], most: int) -> Neighbours:
    """Find the images whose features are nearest to a decoded one, also the one that it is of.

    Reads all features, or a part if there are more than READ_BYTES, a few files at a time. Raises CorruptFileError.
    """
    start_s = time.monotonic()
    manifest = snapshot.manifest
    shards = sorted(manifest.shards)
    if manifest.file_rows * snapshot.info.row_bytes > READ_BYTES:
        most_rows = READ_BYTES // snapshot.info.row_bytes
        random.Random(manifest.commit_id).shuffle(shards)
        rows = np.cumsum([sum(entry.rows for entry in manifest.files(shard)) for shard in shards])
        shards = shards[: max(1, int(np.searchsorted(rows, most_rows, side="right")))]

    def search(shard: int) -> _Nearest:
        nearest = _Nearest(query_D, most)
        for block in snapshot.shard_reader(shard).verified_blocks():
            nearest.see(block.keys_K, snapshot.codec.decode(block.features_KD))
        return nearest

    total = _Nearest(query_D, most)
    for part in in_threads(search, shards, _THREADS):
        total.merge(part.keys_C, part.cosine_C, part.num_seen)
    num_rows = total.num_seen if len(shards) == len(manifest.shards) else snapshot.num_rows
    return _answer(snapshot, total, num_rows, start_s)


def nearest_vectors(snapshot: Snapshot, blocks: Blocks, query_V: npt.NDArray[np.float32], most: int) -> Neighbours:
    """Find the images whose vectors, given block by block, are nearest to one."""
    start_s = time.monotonic()
    total = _Nearest(query_V, most)
    for keys_K, vectors_KV in blocks:
        total.see(keys_K, vectors_KV)
    return _answer(snapshot, total, total.num_seen, start_s)


def _answer(snapshot: Snapshot, found: _Nearest, num_rows: int, start_s: float) -> Neighbours:
    """Add the names of found images; leave out those that are not in the snapshot."""
    nearness = dict(zip(found.keys_C.tolist(), found.cosine_C.tolist(), strict=True))
    images = named(snapshot, list(nearness))
    return Neighbours(
        images=tuple(Neighbour(image.key, image.uri, nearness[image.key]) for image in images),
        num_searched=found.num_seen,
        num_rows=num_rows,
        seconds=time.monotonic() - start_s,
    )


@dataclass(frozen=True, kw_only=True)
class Space:
    """The neighbours in one space, or a sentence on why there are none, or on the progress of the search."""

    name: Literal["features", "visual"]
    found: Neighbours | None = None
    how: str = ""
    """How they were found, in a sentence."""
    problem: str = ""
    task: Task[Any] | None = None
    """The task that computes the vectors, while it is running."""

    @property
    def title(self) -> str:
        """The words for the space on pages."""
        return {"features": "Features", "visual": "Visual vectors"}[self.name]


class Overlap(NamedTuple):
    """What two spaces have in common."""

    shared: int
    of: int
    """The number of neighbours of the shorter list."""
    only: Mapping[str, set[int]]
    """The keys that only one of them has, by its name."""


def overlap(spaces: Sequence[Space]) -> Overlap | None:
    """Compare the neighbours of two spaces; None if fewer have any."""
    match [(space.name, {image.key for image in space.found.images}) for space in spaces if space.found]:
        case [(one, mine), (other, theirs)]:
            only: dict[str, set[int]] = {one: mine - theirs, other: theirs - mine}
            return Overlap(len(mine & theirs), min(len(mine), len(theirs)), only)
    return None
