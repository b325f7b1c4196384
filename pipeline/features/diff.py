"""The difference of a listing and a store: images that it lacks, that only moved, that have equal bytes.

The store's side stays in Arrow and numpy, one shard at a time: rows of a shard are sorted by splitmix64, and so is the
listing here, so each shard meets its own slice. Letters of shapes: N images listed, M rows stored in a shard, L images
of the listing in a shard, K digests asked for.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurestore.errors import KeyCollisionError
from featurestore.format.shard_reader import take_rows
from featurestore.keys import Int64Array, shard_of_hash, splitmix64
from featurestore.snapshot import Snapshot
from pipeline.images.source import ImageRef
from pipeline.store_run import run_id_of

MAX_GROUP_PARTS = 16  # copies of one image in a part: at most the room of 16 parts; more are computed again
READ_THREADS = 4
DIGEST_TYPE = pa.binary(16)

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ImagePart:
    """Images that one task works on. The name changes with its images, so a staged part is never taken for others."""

    name: str
    refs: tuple[ImageRef, ...]


class ImageCopy(NamedTuple):
    """An image whose feature the store has already, under its own key or another."""

    ref: ImageRef
    source_key: int


class CopyPart(NamedTuple):
    """Copies that one task makes; named like a `ImagePart`."""

    name: str
    copies: tuple[ImageCopy, ...]


@dataclass(frozen=True)
class Comparison:
    """A listing compared with a snapshot."""

    num_stored: int  # live rows of the snapshot
    is_stored_N: BoolArray
    is_same_tag_N: BoolArray  # stored under the tag of the listing; also where neither has one
    digest_N: npt.NDArray[np.bytes_]  # of the stored bytes; 16 bytes that count only where is_stored_N
    gone_keys: Int64Array  # stored and not listed


@dataclass(frozen=True)
class ListingPlan:
    """Every image of the listing in exactly one of four ways."""

    num_unchanged: int
    touched: tuple[ImageCopy, ...]  # another tag on the stored bytes
    duplicates: tuple[ImageCopy, ...]  # bytes that the store has under another key
    compute: tuple[ImageRef, ...]
    stored_keys: frozenset[int]  # those of `duplicates` and `compute` that the store has with other bytes


def compare(images: Sequence[ImageRef], snapshot: Snapshot) -> Comparison:
    """Compare keys, uris and tags of the listing with those of the store; reads its small columns, no features.

    Raises KeyCollisionError when the store has another image under a key.
    """
    keys_N = np.fromiter((ref.key for ref in images), np.int64, len(images))
    hash_N = splitmix64(keys_N)
    order_N = np.argsort(hash_N)
    hash_N = hash_N[order_N]
    num_shards = snapshot.info.num_shards
    bounds = np.searchsorted(shard_of_hash(hash_N, num_shards), np.arange(num_shards + 1))
    is_stored_N, is_same_tag_N = np.zeros((2, len(images)), np.bool_)
    digest_N = np.zeros(len(images), "S16")
    gone = [np.empty(0, np.int64)]
    num_stored = 0
    columns = ["key", "uri", "content_digest", "source_tag"]
    for shard, table in _each_shard(snapshot, columns):
        index_L, hash_L = (array[bounds[shard] : bounds[shard + 1]] for array in (order_N, hash_N))
        keys_M = table["key"].to_numpy()
        hash_M = splitmix64(keys_M)
        num_stored += len(keys_M)
        gone.append(keys_M[~np.isin(hash_M, hash_L, assume_unique=True)])
        is_here_L = np.isin(hash_L, hash_M, assume_unique=True)
        index_L, place_L = index_L[is_here_L], np.searchsorted(hash_M, hash_L[is_here_L])
        found = take_rows(table, place_L)
        listed = [images[index] for index in index_L]
        _check_uris(listed, found["uri"])
        is_stored_N[index_L] = True
        is_same_tag_N[index_L] = _equal(found["source_tag"], [ref.source_tag for ref in listed])
        digest_N[index_L] = found["content_digest"].to_pylist()
    return Comparison(num_stored, is_stored_N, is_same_tag_N, digest_N, np.sort(np.concatenate(gone)))


def pending_images(images: Sequence[ImageRef], comparison: Comparison) -> list[ImageRef]:
    """List the images that the store lacks, or whose file may have changed since: another tag, or none."""
    return [ref for ref, same in zip(images, comparison.is_same_tag_N, strict=True) if not (same and ref.source_tag)]


def find_digests(snapshot: Snapshot, digests: Iterable[bytes]) -> dict[bytes, int]:
    """Find the smallest key under which the store has each of the digests (K) that it has at all."""
    wanted = sorted(set(digests) - {b""})
    if not wanted:
        return {}
    wanted_K = pa.array(wanted, DIGEST_TYPE)
    found: dict[bytes, int] = {}
    for _, table in _each_shard(snapshot, ["key", "content_digest"]):
        place_M: Any = pc.index_in(table["content_digest"], value_set=wanted_K)
        place_M = place_M.fill_null(-1).to_numpy()
        for place, key in zip(place_M[place_M >= 0], table["key"].to_numpy()[place_M >= 0], strict=True):
            found[wanted[place]] = min(int(key), found.get(wanted[place], int(key)))
    return found


def split(
    images: Sequence[ImageRef], comparison: Comparison, digests: Mapping[int, bytes], stored: Mapping[bytes, int]
) -> ListingPlan:
    """Plan from `digests` of pending images by key (empty or none where unknown) and `stored` keys by digest."""
    num_unchanged = 0
    touched, duplicates, compute, stored_keys = [], [], [], set()
    rows = zip(images, comparison.is_stored_N, comparison.is_same_tag_N, comparison.digest_N, strict=True)
    for ref, is_stored, is_same_tag, stored_digest in rows:
        digest = digests.get(ref.key, b"")
        is_same = is_stored and digest != b"" and digest == stored_digest.ljust(16, b"\0")
        if is_same_tag if ref.source_tag else is_same:
            num_unchanged += 1
        elif is_same:
            touched.append(ImageCopy(ref, ref.key))
        else:
            if is_stored:
                stored_keys.add(ref.key)
            if digest in stored:
                duplicates.append(ImageCopy(ref, stored[digest]))
            else:
                compute.append(ref)
    return ListingPlan(num_unchanged, tuple(touched), tuple(duplicates), tuple(compute), frozenset(stored_keys))


def equal_candidates(refs: Iterable[ImageRef]) -> list[ImageRef]:
    """List the images whose bytes may equal another's: of the same size, or of unknown size. Only these are read."""
    refs = list(refs)
    sizes = Counter(ref.size_bytes for ref in refs)
    return [ref for ref in refs if sizes[ref.size_bytes] > 1 or ref.size_bytes < 0]


def make_parts(refs: Sequence[ImageRef], digest_of: Callable[[ImageRef], bytes], part_size: int) -> list[ImagePart]:
    """Make parts of about `part_size` images in the order of `refs`; images of equal digest are in one part.

    `digest_of` gives empty bytes for an image that has no equal.
    """
    groups: dict[bytes | int, list[ImageRef]] = {}
    for ref in refs:
        groups.setdefault(digest_of(ref) or ref.key, []).append(ref)
    parts: list[ImagePart] = []
    current: list[ImageRef] = []
    for group in groups.values():
        for start in range(0, len(group), MAX_GROUP_PARTS * part_size):
            current += group[start : start + MAX_GROUP_PARTS * part_size]
            if len(current) >= part_size:
                parts.append(_part(current))
                current = []
    if current:
        parts.append(_part(current))
    return parts


def make_copy_parts(copies: Iterable[ImageCopy], part_size: int, prefix: str) -> list[CopyPart]:
    """Make parts of `part_size` copies, those of one shard together, so that few tasks read the same shard.

    Their names begin with `prefix`.
    """
    copies = list(copies)
    order = np.argsort(splitmix64(np.array([copy.source_key for copy in copies], np.int64)), kind="stable")
    parts = []
    for start in range(0, len(copies), part_size):
        chosen = tuple(copies[index] for index in order[start : start + part_size])
        name = run_id_of([(copy.ref.key, copy.ref.source_tag, copy.source_key) for copy in chosen])
        parts.append(CopyPart(f"{prefix}-{name}", chosen))
    return parts


def _part(refs: Sequence[ImageRef]) -> ImagePart:
    return ImagePart(run_id_of([(ref.key, ref.source_tag) for ref in refs]), tuple(refs))


def _each_shard(snapshot: Snapshot, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Read columns of the live rows of each shard that has files, a few shards ahead."""
    shards = [shard for shard, files in sorted(snapshot.manifest.shards.items()) if files]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for start in range(0, len(shards), READ_THREADS):
            chunk = shards[start : start + READ_THREADS]
            tables = pool.map(lambda shard: snapshot.shard_reader(shard).read(columns), chunk)
            yield from zip(chunk, tables, strict=True)


def _check_uris(listed: Sequence[ImageRef], uris: "pa.ChunkedArray[Any]") -> None:
    differing = np.flatnonzero(~_equal(uris, [ref.uri for ref in listed]))
    if len(differing):
        ref, stored = listed[differing[0]], uris[int(differing[0])].as_py()
        raise KeyCollisionError(
            f"key {ref.key} is {stored!r} in the store and {ref.uri!r} among the images: rename one,"
            " or use another store"
        )


def _equal(column: "pa.ChunkedArray[Any]", texts: Sequence[str]) -> BoolArray:
    equal: Any = pc.equal(column, pa.array(texts, pa.string()))
    return np.asarray(equal.to_numpy(zero_copy_only=False) if isinstance(equal, pa.Array) else equal.to_numpy())
