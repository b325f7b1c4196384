"""The difference of a listing and a store: images that it lacks, that only moved, that have equal bytes.

Both sides stay in Arrow and numpy, the store's one shard at a time: rows of a shard are sorted by splitmix64, and so is
the listing here, so each shard meets its own slice. An image is its place in the listing until its part is submitted.
Letters of shapes: N images listed, M rows stored in a shard, L images of the listing in a shard, K images asked for,
P images that may have changed, C images to compute. A digest is 16 bytes, or zeros where it is not known.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore.errors import KeyCollisionError
from featurestore.format.datafile import digest_column
from featurestore.format.shard import take_rows
from featurestore.keys import AnyArray, BoolArray, Int64Array, shard_of_hash, splitmix64
from featurestore.store import Snapshot
from pipeline.images.source import ImageTable
from pipeline.problems import Problem
from pipeline.store_run import run_id_of

MAX_GROUP_PARTS = 16  # copies of one image in a part: at most the room of 16 parts; more are computed again
READ_THREADS = 4
DIGEST_DTYPE = np.dtype("S16")  # unlike void it has an order

DigestArray = AnyArray


class ImagePart(NamedTuple):
    """Images that one task works on. The name changes with its images, so a staged part is never taken for others."""

    name: str
    index_K: Int64Array
    source_key_K: Int64Array | None = None  # where the store has their features: the keys that it has them under


class ImageCopies(NamedTuple):
    """Places in the listing of images whose feature the store has, and the keys that it has them under."""

    index_K: Int64Array
    source_key_K: Int64Array


@dataclass(frozen=True)
class Comparison:
    """A listing compared with a snapshot."""

    num_stored: int  # live rows of the snapshot
    is_stored_N: BoolArray
    is_same_tag_N: BoolArray  # stored under the tag of the listing; also where neither has one
    digest_N: DigestArray  # of the stored bytes; counts only where is_stored_N
    gone_keys: Int64Array  # stored and not listed


@dataclass(frozen=True)
class ListingPlan:
    """Every image of the listing in exactly one of four ways."""

    num_unchanged: int
    num_touched: int  # another tag on the stored bytes: the first ones of `copies`
    copies: ImageCopies  # the others have bytes that the store has under another key
    compute_C: Int64Array
    digest_C: DigestArray
    stored_keys: Int64Array  # of duplicates and images to compute that the store has with other bytes


def compare(images: ImageTable, snapshot: Snapshot) -> Comparison:
    """Compare keys, uris and tags of the listing with those of the store; reads its small columns, no features.

    Raises KeyCollisionError when the store has another image under a key.
    """
    hash_N = splitmix64(images.keys())
    order_N = np.argsort(hash_N)
    hash_N = hash_N[order_N]
    num_shards = snapshot.info.num_shards
    bounds = np.searchsorted(shard_of_hash(hash_N, num_shards), np.arange(num_shards + 1))
    is_stored_N, is_same_tag_N = np.zeros((2, len(images)), np.bool_)
    digest_N = np.zeros(len(images), DIGEST_DTYPE)
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
        found, listed = take_rows(table, place_L), images.take(index_L, "key", "uri", "source_tag")
        _check_uris(listed, found["uri"])
        is_stored_N[index_L] = True
        is_same_tag_N[index_L] = _equal(found["source_tag"], listed["source_tag"])
        digest_N[index_L] = digest_column(found).view(DIGEST_DTYPE)
    return Comparison(num_stored, is_stored_N, is_same_tag_N, digest_N, np.sort(np.concatenate(gone)))


def find_digests(snapshot: Snapshot, digest_K: DigestArray) -> tuple[BoolArray, Int64Array]:
    """Return which digests the store has, (K,), and the smallest key under which it has them, (K,)."""
    if not (digest_K != b"").any() or not any(snapshot.manifest.shards.values()):
        return np.zeros(len(digest_K), np.bool_), np.zeros(len(digest_K), np.int64)
    wanted_W, inverse_K = np.unique(digest_K, return_inverse=True)
    is_found_W, key_W = np.zeros(len(wanted_W), np.bool_), np.full(len(wanted_W), np.iinfo(np.int64).max)
    for _, table in _each_shard(snapshot, ["key", "content_digest"]):
        digest_M = digest_column(table).view(DIGEST_DTYPE)
        place_M = np.searchsorted(wanted_W, digest_M).clip(max=len(wanted_W) - 1)
        is_wanted_M = (wanted_W[place_M] == digest_M) & (digest_M != b"")
        is_found_W[place_M[is_wanted_M]] = True
        np.minimum.at(key_W, place_M[is_wanted_M], table["key"].to_numpy()[is_wanted_M])
    return is_found_W[inverse_K], key_W[inverse_K]


def split(
    images: ImageTable,
    comparison: Comparison,
    pending_P: Int64Array,
    digest_P: DigestArray,
    is_known_P: BoolArray,
    known_key_P: Int64Array,
) -> ListingPlan:
    """Plan from the digests of pending images, and those of them that the store has, with their keys there."""
    keys_P, has_tag_P = images.keys()[pending_P], images.has_tag()[pending_P]
    is_stored_P = comparison.is_stored_N[pending_P]
    is_same_P = is_stored_P & (digest_P != b"")
    is_same_P[is_same_P] = digest_P[is_same_P] == comparison.digest_N[pending_P[is_same_P]]
    touched, is_new_P = is_same_P & has_tag_P, ~is_same_P & ~is_known_P
    duplicates = ~is_same_P & is_known_P
    return ListingPlan(
        num_unchanged=len(images) - int(np.count_nonzero(~is_same_P | has_tag_P)),
        num_touched=int(np.count_nonzero(touched)),
        copies=ImageCopies(
            np.append(pending_P[touched], pending_P[duplicates]), np.append(keys_P[touched], known_key_P[duplicates])
        ),
        compute_C=pending_P[is_new_P],
        digest_C=digest_P[is_new_P],
        stored_keys=keys_P[is_stored_P & ~is_same_P],
    )


def equal_candidates(size_K: Int64Array) -> BoolArray:
    """Return whose bytes may equal another's: those of the same size, or of unknown size. Only these are read. (K,)."""
    return _is_repeated(size_K) | (size_K < 0)


def make_parts(images: ImageTable, index_C: Int64Array, digest_C: DigestArray, part_size: int) -> list[ImagePart]:
    """Make parts of `part_size` to twice as many images in the order of `index_C`; equal images are in one part.

    A part ends before an image whose hash says so, where there is one: then it has the same images, and so its name,
    in another listing that differs elsewhere.
    """
    order_C, ends = _grouped(digest_C, MAX_GROUP_PARTS * part_size)
    ordered_C = index_C[order_C]
    hash_K = splitmix64(images.keys()[ordered_C[ends[:-1]]])
    marked = np.append(ends[:-1][hash_K % np.uint64(part_size) == 0], len(ordered_C))
    parts, start = list[ImagePart](), 0
    while start < len(ordered_C):
        end = int(marked[np.searchsorted(marked[:-1], start + part_size)])
        if end > start + 2 * part_size:
            end = int(ends[np.searchsorted(ends[:-1], start + 2 * part_size)])
        index_K = ordered_C[start:end]
        parts.append(ImagePart(run_id_of(_named(images, index_K)), index_K))
        start = end
    return parts


def _grouped(digest_C: DigestArray, most: int) -> tuple[Int64Array, Int64Array]:
    """Order images so that equal ones follow the first of them, (C,); and give the places where a part may end.

    These are the ends of groups of equal images, and in larger groups each `most` images.
    """
    known_K = np.flatnonzero(_is_repeated(digest_C.view(np.uint64)[::2]) & (digest_C != b""))  # few, by half a digest
    _, first_U, inverse_K = np.unique(digest_C[known_K], return_index=True, return_inverse=True)
    group_C = np.arange(len(digest_C))  # the first image that is equal
    group_C[known_K] = known_K[first_U[inverse_K]]
    order_C = np.argsort(group_C, kind="stable")
    group_C = group_C[order_C]
    ends = np.append(np.flatnonzero(group_C[1:] != group_C[:-1]) + 1, len(group_C))
    large = np.flatnonzero(np.diff(ends, prepend=0) > most)
    inner = [np.arange((ends[each - 1] if each else 0) + most, ends[each], most) for each in large]
    return order_C, np.sort(np.concatenate([ends, *inner]))


def make_copy_parts(images: ImageTable, copies: ImageCopies, part_size: int) -> list[ImagePart]:
    """Make parts of `part_size` copies, those of one shard together, so that few tasks read the same shard."""
    order_K = np.argsort(splitmix64(copies.source_key_K), kind="stable")
    parts = []
    for start in range(0, len(order_K), part_size):
        index_K, source_key_K = (column[order_K[start : start + part_size]] for column in copies)
        named = [*_named(images, index_K), source_key_K.tolist()]
        parts.append(ImagePart(run_id_of(named), index_K, source_key_K))
    return parts


def _is_repeated(values_K: AnyArray) -> BoolArray:
    """Return which numbers are there more than once, (K,); takes a third of the memory of `np.unique` with counts."""
    sorted_K = np.sort(values_K)
    repeated = np.unique(sorted_K[1:][sorted_K[1:] == sorted_K[:-1]])
    place_K = np.searchsorted(repeated, values_K)
    is_below_K = place_K < len(repeated)
    is_below_K[is_below_K] = repeated[place_K[is_below_K]] == values_K[is_below_K]
    return is_below_K


def _named(images: ImageTable, index_K: Int64Array) -> list[tuple[Any, ...]]:
    """Return the fingerprint of images over two runs: key and source tag of each."""
    return list(zip(*images.take(index_K, "key", "source_tag").to_pydict().values(), strict=True))


def _each_shard(snapshot: Snapshot, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Read columns of the live rows of each shard that has files, a few shards ahead."""
    shards = [shard for shard, files in sorted(snapshot.manifest.shards.items()) if files]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for start in range(0, len(shards), READ_THREADS):
            chunk = shards[start : start + READ_THREADS]
            tables = pool.map(lambda shard: snapshot.shard_reader(shard).read(columns), chunk)
            yield from zip(chunk, tables, strict=True)


def _check_uris(listed: pa.Table, uris: "pa.ChunkedArray[Any]") -> None:
    differing = np.flatnonzero(~_equal(uris, listed["uri"]))
    if len(differing):
        key, uri, stored = (column[int(differing[0])].as_py() for column in (listed["key"], listed["uri"], uris))
        raise KeyCollisionError(Problem.OTHER_URI_STORED, key, stored, uri)


def _equal(mine: "pa.ChunkedArray[Any]", theirs: "pa.ChunkedArray[Any]") -> BoolArray:
    equal: Any = pc.equal(mine, theirs)
    return np.asarray(equal.to_numpy(zero_copy_only=False) if isinstance(equal, pa.Array) else equal.to_numpy())
