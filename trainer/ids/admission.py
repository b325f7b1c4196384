"""Admission to an exact ID table: a counting filter, in which an id is counted until it has a row of its own.

A count-min sketch with conservative update (Cormode and Muthukrishnan, "An improved data stream summary", 2005; Estan
and Varghese, "New directions in traffic measurement and accounting", 2002): each id has two counters, shared with other
ids; its count is the smaller one, and only what is below the new count is raised. So a count is never too low, and it
is too high where both counters belong to others too. Letters of shapes: N ids, S shards owned, C counters of a shard.
"""

import numpy as np
from numpy.typing import NDArray

from featurestore.keys import UInt64Array, splitmix64
from trainer.exchange.routing import Int64

Counts = NDArray[np.uint8]

MOST_COUNT = 255
_COUNTERS_A_ROW = 8
_SALT = np.uint64(0xD1B54A32D192ED03)


class CountingFilter:
    """Counters of the ids without a row, in `num_slots` shards; `slot` is a shard's place among those."""

    def __init__(self, num_slots: int, counters_per_shard: int) -> None:
        """`counters_per_shard` is a power of two."""
        self.counts_SC: Counts = np.zeros((num_slots, counters_per_shard), np.uint8)

    def add(self, slot_N: Int64, hash_N: UInt64Array) -> Counts:
        """Count different ids once more, all at the same time, and return their counts, (N,), up to 255.

        `hash_N`: splitmix64 of the ids. What the counters are then does not depend on the order of the ids.
        """
        one_N, other_N = self._places(slot_N, hash_N)
        counts = self.counts_SC.reshape(-1)
        count_N = np.minimum(counts[one_N], counts[other_N])
        count_N += count_N < MOST_COUNT
        np.maximum.at(counts, one_N, count_N)
        np.maximum.at(counts, other_N, count_N)
        return count_N

    def counts(self, slot_N: Int64, hash_N: UInt64Array) -> Counts:
        """Return how often each id was counted, (N,), or more."""
        one_N, other_N = self._places(slot_N, hash_N)
        counts = self.counts_SC.reshape(-1)
        return np.minimum(counts[one_N], counts[other_N])

    def fade(self, slot: int) -> None:
        """Halve the counts of a shard, so that what was seen long ago counts less."""
        self.counts_SC[slot] >>= 1

    def _places(self, slot_N: Int64, hash_N: UInt64Array) -> tuple[Int64, Int64]:
        """Two counters of each id, by 64 bits of their own: the hash itself has chosen the shard."""
        num_counters = self.counts_SC.shape[1]
        bits_N = splitmix64((hash_N ^ _SALT).view(np.int64))
        first_N, last = slot_N * num_counters, np.uint64(num_counters - 1)
        one_N, other_N = ((each & last).view(np.int64) for each in (bits_N, bits_N >> np.uint64(32)))
        return first_N + one_N, first_N + other_N


def counters_for(rows: int) -> int:
    """Return how many counters a shard of this number of rows has: a power of two, at least eight for each row."""
    return 1 << (_COUNTERS_A_ROW * rows - 1).bit_length()
