"""Neighbours of an image by features, visual vectors and semantic IDs, and their overlap between these spaces.

Neighbours by vectors are exact, by cosine, and are searched block by block in bounded memory.

Letters of shapes: M rows or images with codes, K rows of a block, D width of a vector, C found.
"""

import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from explorer.data.background import Task
from explorer.data.cache import LruCache
from explorer.data.store.snapshots import NamedImage, named
from featurestore.errors import StorageError
from featurestore.keys import Int64Array
from featurestore.parsing import parse_json
from featurestore.published.versions import open_published
from featurestore.snapshot import Snapshot
from featurestore.storage.threads import in_threads

if TYPE_CHECKING:
    from pipeline.semantic.codes import Codebook, CodeIndex


READ_BYTES = 16 << 30
"""Most bytes of features read for one answer: some seconds a core. Of a larger store, random shards are read."""
_THREADS = 2

Blocks = Iterable[tuple[Int64Array, npt.NDArray[np.float32]]]


@dataclass(frozen=True)
class Neighbour:
    """An image and its similarity: the cosine in a space of vectors, the number of shared codes for semantic IDs."""

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
    """features, visual, or codes."""
    title: str
    found: Neighbours | None = None
    how: str = ""
    """How they were found, in a sentence."""
    problem: str = ""
    task: Task[Any] | None = None
    """The task that computes the vectors, while it is running."""


@dataclass(frozen=True)
class Shared:
    """The number of neighbours that two spaces have in common."""

    one: str
    other: str
    count: int
    of: int


def only_in(spaces: list[Space]) -> dict[str, set[int]]:
    """Find the keys that only one space has, for each space; empty if fewer than two spaces have any."""
    keys = {space.name: keys_of(space) for space in spaces if space.found is not None}
    if len(keys) < 2:
        return {space.name: set() for space in spaces}
    return {
        space.name: keys.get(space.name, set()).difference(*(each for name, each in keys.items() if name != space.name))
        for space in spaces
    }


def shared(spaces: list[Space]) -> list[Shared]:
    """Count the neighbours that each pair of spaces has in common; `of` is the length of the shorter list."""
    there = [space for space in spaces if space.found is not None]
    return [
        Shared(one.title, other.title, len(keys_of(one) & keys_of(other)), min(len(keys_of(one)), len(keys_of(other))))
        for number, one in enumerate(there)
        for other in there[number + 1 :]
    ]


def keys_of(space: Space) -> set[int]:
    """List the keys of a space."""
    return {image.key for image in space.found.images} if space.found else set()


_MARK = "summary.json"


@dataclass(frozen=True)
class SemanticIds:
    """The codes of all images at an address; takes 16 bytes per image in memory."""

    address: str
    index: "CodeIndex"
    source: dict[str, Any]
    """The vectors that the codes were computed from, as recorded by the job."""

    @property
    def origin(self) -> str:
        """Describe the vectors that the codes were computed from."""
        of = self.source.get("of", {})
        if "network" in of:
            return f"visual vectors of {of.get('run')}, {of.get('checkpoint')}"
        return f"features of snapshot {self.source['snapshot']}" if "snapshot" in self.source else "vectors of a file"

    def codes_of(self, key: int) -> list[int] | None:
        """List the codes of an image, or None."""
        full = int(self.index.lookup(np.array([key], np.int64))[0])
        return None if full < 0 else self.codes(full)

    def codes(self, full: int) -> list[int]:
        """Split a full code, which is one number, into its levels."""
        full_N = np.array([full], np.int64)
        return [int(self.index.code(full_N, level)[0]) for level in range(self.index.num_levels)]


class CodeShelf:
    """Semantic IDs by address; caches the last two. Thread-safe."""

    def __init__(self) -> None:
        self._read: LruCache[SemanticIds] = LruCache(2)

    def open(self, address: str) -> SemanticIds | None:
        """Read the semantic IDs next to samples, or return None. Raises SampleError, StorageError."""
        from pipeline.semantic.codes import FOLDER, read_codes

        storage = open_published(address)
        try:
            mark = storage.read_bytes(_MARK)
            summary: dict[str, Any] = parse_json(mark)
            num_codes = int(summary["codebook"]["codes"])
        except (FileNotFoundError, StorageError, ValueError, KeyError, TypeError):
            return None
        if not storage.list(FOLDER):
            return None
        return self._read.get(
            (address, mark), lambda: SemanticIds(address, read_codes(storage, num_codes), summary.get("source", {}))
        )


def nearest_codes(
    snapshot: Snapshot, ids: SemanticIds, codes: list[int], most: int, without: int | None = None
) -> Neighbours:
    """Find the images of the snapshot that share the longest prefix of codes; keys break ties.

    Leaves out images that share no code. Reads all codes once for each level.
    """
    index = ids.index
    keys: list[int] = []
    nearness: list[float] = []
    taken_M = np.zeros(len(index.keys_M), np.bool_)
    if without is not None:
        taken_M |= index.keys_M == without
    for length in range(index.num_levels, 0, -1):
        wanted = 0
        for code in codes[:length]:
            wanted = wanted * index.num_codes + code
        same_M = (index.prefix(index.prefix_M, length) == wanted) & ~taken_M
        taken_M |= same_M
        found = index.keys_M[same_M][: most - len(keys)].tolist()
        keys += found
        nearness += [float(length)] * len(found)
    count = len(index.keys_M)
    images = tuple(with_names(snapshot, keys, nearness))
    return Neighbours(images=images, num_searched=count, num_rows=count, seconds=0)


def encode(ids: SemanticIds, vector_D: npt.NDArray[np.float32]) -> list[int] | None:
    """Compute the codes of a vector of the codebook's kind; None if its width differs.

    Raises SampleError.
    """
    codebook = _codebook(ids.address)
    if codebook.dim != len(vector_D):
        return None
    codes_NL, _, _ = codebook.encode(vector_D[None].astype(np.float32))
    return [int(code) for code in codes_NL[0]]


def _codebook(address: str) -> "Codebook":
    from pipeline.samples.publish import CODEBOOK_FILE
    from pipeline.semantic.codes import Codebook

    place = open_published(address)
    return Codebook.from_bytes(place.read_bytes(CODEBOOK_FILE), place.full(CODEBOOK_FILE))
