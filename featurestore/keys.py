"""Map an image's uri to its key, the key to its shard, the shard to its rank, and the key to its row by an index.

All of it exists once: writer, partition and exchange use it, and the scorer.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from featurestore.errors import ImageNameError
from featurestore.problems import Problem

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
Int32Array = npt.NDArray[np.int32]
UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.floating[Any]]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
AnyArray = npt.NDArray[Any]

NO_IMAGE = 0
"""The key that stands for no image, for nulls in samples and requests."""

_WHOLE = re.compile(r"0|-?[1-9]\d{0,18}", re.ASCII)
_INT64 = range(-(1 << 63), 1 << 63)
_BETWEEN = "\0"
_ALL_WHOLE = re.compile(r"(?:0|-?[1-9]\d{0,17})(?:\0(?:0|-?[1-9]\d{0,17}))*", re.ASCII)


def key_of_uri(uri: str) -> int:
    """Return the key of an image: xxh3-64 of its uri in UTF-8, as a signed 64-bit number."""
    unsigned = xxhash.xxh3_64_intdigest(uri.encode())
    return unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned


def keys_of_uris(uris: Sequence[str]) -> Int64Array:
    """Return the keys of `uris`, (N,) int64, in their order."""
    return keys_of_bytes([uri.encode() for uri in uris])


def keys_of_bytes(names: Sequence[bytes]) -> Int64Array:
    """Return the keys of uris that are in UTF-8 already, (N,) int64, in half of the time."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, names), dtype=np.uint64, count=len(names)).view(np.int64)


def keys_of_images(images: Any) -> Int64Array:
    """Return the keys of images that a program names by keys or uris, in a list or in an array of any library, (U,).

    Raises ImageNameError for other values.
    """
    values: Any = np.asarray(images.to_pylist() if hasattr(images, "to_pylist") else images).reshape(-1)
    if values.dtype.kind in "iu" or not values.size:
        return np.asarray(values, np.int64)
    texts = values.tolist()
    if not all(isinstance(text, str) for text in texts):
        raise ImageNameError(Problem.NOT_AN_IMAGE_NAME)
    return keys_of_uris(texts)


def id_of_text(text: str) -> int:
    """Return the ID of a text in a log: a whole number, as it is written, is itself; other text has its `key_of_uri`.

    So 7 is the same user in a file that has numbers and in one that has texts. Spaces around the text do not count.
    """
    text = text.strip()
    if _WHOLE.fullmatch(text) and int(text) in _INT64:
        return int(text)
    return key_of_uri(text)


def ids_of_texts(texts: Sequence[str]) -> Int64Array:
    """Return the `id_of_text` of each text, (N,) int64, in a fifth of the time where all or none are whole numbers."""
    texts = [text.strip() for text in texts]
    if {text[:1] for text in texts}.isdisjoint("-0123456789"):
        return keys_of_uris(texts)
    joined = _BETWEEN.join(texts)
    if _ALL_WHOLE.fullmatch(joined) and joined.count(_BETWEEN) == len(texts) - 1:
        return np.fromiter(map(int, texts), dtype=np.int64, count=len(texts))
    return np.fromiter(map(id_of_text, texts), dtype=np.int64, count=len(texts))


def splitmix64(keys_N: npt.ArrayLike) -> UInt64Array:
    """Hash each key by splitmix64, which is the order of rows, (N,) uint64.

    A one-to-one map of 64-bit numbers, so equal hashes mean equal keys. Source: Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", 2014.
    """
    hash_N = np.array(keys_N, dtype=np.int64, ndmin=1).view(np.uint64)  # a copy, changed in place below
    hash_N += np.uint64(0x9E3779B97F4A7C15)
    hash_N ^= hash_N >> np.uint64(30)
    hash_N *= np.uint64(0xBF58476D1CE4E5B9)
    hash_N ^= hash_N >> np.uint64(27)
    hash_N *= np.uint64(0x94D049BB133111EB)
    hash_N ^= hash_N >> np.uint64(31)
    return hash_N


def shard_of_hash(hash_N: UInt64Array, num_shards: int) -> Int64Array:
    """Return the shard of each splitmix64 hash: its top bits, (N,) int64. `num_shards` is a power of two."""
    if num_shards < 1 or num_shards & (num_shards - 1):
        raise ValueError(Problem.SHARDS_NOT_A_POWER.of(num_shards))
    if num_shards == 1:  # a shift by all 64 bits is undefined
        return np.zeros(len(hash_N), dtype=np.int64)
    return (hash_N >> np.uint64(65 - num_shards.bit_length())).astype(np.int64)


def shard_of(keys_N: npt.ArrayLike, num_shards: int) -> Int64Array:
    """Return the shard of each key, (N,) int64 in [0, num_shards). `num_shards` is a power of two."""
    return shard_of_hash(splitmix64(keys_N), num_shards)


def owner_of(shards_N: npt.ArrayLike, num_ranks: int) -> Int64Array:
    """Return the rank that serves each shard, (N,) int64 in [0, num_ranks)."""
    return np.asarray(shards_N, dtype=np.int64) % num_ranks


def owned_shards(num_shards: int, rank: int, num_ranks: int) -> list[int]:
    """List the shards that `rank` serves, ascending; empty where there are more ranks than shards."""
    return list(range(rank, num_shards, num_ranks))


def power_of_two(least: int) -> int:
    """Return the smallest power of two that is `least` or more."""
    return 1 << (least - 1).bit_length()


def stream_start(name: str) -> np.uint64:
    """Return the start of a stream of random numbers: number n of it is the splitmix64 of the start plus n."""
    return np.uint64(key_of_uri(name) & 0xFFFFFFFFFFFFFFFF)


def unit_interval(words_N: UInt64Array) -> npt.NDArray[np.float64]:
    """Turn random 64 bits into numbers in [0, 1), each by its upper 53 bits."""
    return (words_N >> np.uint64(11)).astype(np.float64) * 2.0**-53


class HashIndex:
    """The splitmix64 hashes of ascending shards, one shard after the other, which is ascending too: `hash_M`.

    splitmix64 spreads keys evenly, so of as many buckets as there are keys each begins a step or two before whatever
    is in it. A table says where; that is three to four times as fast as a binary search in sorted order, and takes 4 to
    8 bytes a row. All buckets of a shard are equally wide, and shards that are not held have none.
    """

    def __init__(self, shards: Sequence[int], hashes: Sequence[UInt64Array], num_shards: int) -> None:
        """`hashes[i]` are those of `shards[i]`, ascending."""
        # After the last one comes a number that no hash exceeds, so that no walk leaves the array.
        self._walked: UInt64Array = np.concatenate([*hashes, np.array([2**64 - 1], np.uint64)])
        self.hash_M = self._walked[:-1]
        most = max((len(each) for each in hashes), default=0)
        self._bits = max(1, (most - 1).bit_length())  # of the hash, after those that name the shard
        self._shard_bits = num_shards.bit_length() - 1
        self._is_whole = len(shards) == num_shards
        self._first_bucket_S = np.zeros(num_shards, np.int64)
        self._first_bucket_S[list(shards)] = np.arange(len(shards)) << self._bits
        self._begin = np.empty(max(1, len(shards)) << self._bits, np.int32 if len(self.hash_M) < 2**31 else np.int64)
        start = 0
        for number, each in enumerate(hashes):
            counts = np.bincount(self._bucket(each), minlength=1 << self._bits)
            self._begin[number << self._bits :][: len(counts)] = start + np.cumsum(counts) - counts
            start += len(each)

    def __len__(self) -> int:
        return len(self.hash_M)

    def places(self, hash_U: UInt64Array, shard_U: Int64Array) -> Int64Array:
        """Return the only place where each hash may be, (U,) inside [0, M); M is not 0. `shard_U` are held shards."""
        place_U: Int64Array = self._begin.take(self._numbers(hash_U, shard_U)).astype(np.int64)
        behind = (self._walked.take(place_U) < hash_U).nonzero()[0]
        while len(behind):
            place_U[behind] += 1
            behind = behind[self._walked.take(place_U.take(behind)) < hash_U.take(behind)]
        np.minimum(place_U, len(self) - 1, out=place_U)
        return place_U

    def _numbers(self, hash_U: UInt64Array, shard_U: Int64Array) -> Int64Array:
        """Return the number of the bucket of each hash: of a whole index its top bits, which name the shard first."""
        if self._is_whole:
            return (hash_U >> np.uint64(64 - self._shard_bits - self._bits)).view(np.int64)
        return self._first_bucket_S[shard_U] + self._bucket(hash_U)

    def _bucket(self, hash_N: UInt64Array) -> Int64Array:
        """Return the bucket within the shard."""
        bucket_N: UInt64Array = (hash_N << np.uint64(self._shard_bits)) >> np.uint64(64 - self._bits)
        return bucket_N.view(np.int64)
