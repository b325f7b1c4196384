"""The place of a key among the sorted hashes of some shards, by a table of buckets instead of a binary search.

Letters of shapes: M hashes held, U hashes asked.
"""

from collections.abc import Sequence

import numpy as np

from featurestore.keys import Int64Array, UInt64Array


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
