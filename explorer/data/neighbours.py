"""Neighbours of an image by features and visual vectors, and their overlap between these spaces.

Neighbours by vectors are exact, by cosine, and are searched block by block in bounded memory.

Letters of shapes: M rows, K rows of a block, D width of a vector, C found.
"""

import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from explorer.data.background import Task
from explorer.data.snapshots import NamedImage, named
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


@dataclass
class _Nearest:
    """The nearest C of the rows seen so far."""

    query_D: npt.NDArray[np.float32]
    most: int
    without: int | None
    keys_C: Int64Array = field(default_factory=lambda: np.empty(0, np.int64))
    cosine_C: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    num_seen: int = 0

    def see(self, keys_K: Int64Array, values_KD: npt.NDArray[np.float32]) -> None:
        self.num_seen += len(keys_K)
        cosine_K = cosines(values_KD, self.query_D)
        if self.without is not None:
            others_K = keys_K != self.without
            keys_K, cosine_K = keys_K[others_K], cosine_K[others_K]
        self._keep(np.concatenate([self.keys_C, keys_K]), np.concatenate([self.cosine_C, cosine_K]))

    def merge(self, other: "_Nearest") -> None:
        self.num_seen += other.num_seen
        self._keep(np.concatenate([self.keys_C, other.keys_C]), np.concatenate([self.cosine_C, other.cosine_C]))

    def _keep(self, keys: Int64Array, cosine: npt.NDArray[np.float32]) -> None:
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


def nearest_features(
    snapshot: Snapshot, query_D: npt.NDArray[np.float32], most: int, without: int | None = None
) -> Neighbours:
    """Find the images whose features are nearest to a decoded one, leaving out the key `without`.

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
        nearest = _Nearest(query_D, most, without)
        for block in snapshot.shard_reader(shard).verified_blocks():
            nearest.see(block.keys_K, snapshot.codec.decode(block.features_KD))
        return nearest

    total = _Nearest(query_D, most, without)
    for part in in_threads(search, shards, _THREADS):
        total.merge(part)
    num_rows = total.num_seen if len(shards) == len(manifest.shards) else snapshot.num_rows
    return _answer(snapshot, total, num_rows, start_s)


def nearest_vectors(
    snapshot: Snapshot, blocks: Blocks, query_V: npt.NDArray[np.float32], most: int, without: int | None = None
) -> Neighbours:
    """Find the images whose vectors, given block by block, are nearest to one."""
    start_s = time.monotonic()
    total = _Nearest(query_V, most, without)
    for keys_K, vectors_KV in blocks:
        total.see(keys_K, vectors_KV)
    return _answer(snapshot, total, total.num_seen, start_s)


def _answer(snapshot: Snapshot, found: _Nearest, num_rows: int, start_s: float) -> Neighbours:
    return Neighbours(
        images=tuple(with_names(snapshot, found.keys_C.tolist(), found.cosine_C.tolist())),
        num_searched=found.num_seen,
        num_rows=num_rows,
        seconds=time.monotonic() - start_s,
    )


def with_names(snapshot: Snapshot, keys: list[int], nearness: list[float]) -> Iterator[Neighbour]:
    """Add the names of found images; leave out those that are not in the snapshot."""
    images: dict[int, NamedImage] = {image.key: image for image in named(snapshot, keys)}
    for key, near in zip(keys, nearness, strict=True):
        if key in images:
            yield Neighbour(key, images[key].uri, near)


@dataclass(frozen=True, kw_only=True)
class Space:
    """The neighbours in one space, or a sentence on why there are none, or on the progress of the search."""

    name: str
    """features or visual."""
    title: str
    found: Neighbours | None = None
    how: str = ""
    """How they were found, in a sentence."""
    problem: str = ""
    task: Task[Any] | None = None
    """The task that computes the vectors, while it is running."""


def keys_of(spaces: list[Space]) -> dict[str, set[int]]:
    """List the keys that each space has found."""
    return {space.name: {image.key for image in space.found.images} for space in spaces if space.found}


def only_in(spaces: list[Space]) -> dict[str, set[int]]:
    """Find the keys that only one of two spaces has, for each; empty if fewer have any."""
    match keys_of(spaces):
        case {"features": features, "visual": visual}:
            return {"features": features - visual, "visual": visual - features}
    return {space.name: set() for space in spaces}


def shared(spaces: list[Space]) -> tuple[int, int] | None:
    """Count the neighbours that two spaces have in common, and those of the shorter list; None if fewer have any."""
    match keys_of(spaces):
        case {"features": features, "visual": visual}:
            return len(features & visual), min(len(features), len(visual))
    return None
