"""Eviction from a full shard of an exact ID table: the rows longest unused (LRU) make room, many at once.

The shard has a clock, which counts its training steps, and notes for each row in which of them it was last used. So the
choice depends on the ids of each step alone, and not on the number of ranks.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trainer.exchange.routing import Int64

USED_AT, CLOCK = "used_at", "clock"
"""Names in a checkpoint: the step in which each row was last used, and how many steps there were."""
_AT_ONCE = 1 / 16


def count_to_evict(lacking: int, capacity: int) -> int:
    """Return how many of a full shard's `capacity` rows to free where `lacking` more are needed.

    At least a sixteenth, because finding them reads all rows, and the shard's map is made again."""
    return max(lacking, math.ceil(capacity * _AT_ONCE))


def longest_unused(used_at_N: NDArray[np.int32], ids_N: Int64, most: int, now: int) -> Int64:
    """Find which `most` of N rows were used longest ago, before step `now`, by their index, ascending; or fewer.

    Of rows that were last used in one step those with the smaller ids come first."""
    most = min(most, int(np.count_nonzero(used_at_N < now)))
    if not most:
        return np.empty(0, np.int64)
    limit = np.partition(used_at_N, most - 1)[most - 1]
    older, tied = np.flatnonzero(used_at_N < limit), np.flatnonzero(used_at_N == limit)
    tied = tied[np.argsort(ids_N[tied])[: most - len(older)]]
    return np.sort(np.concatenate([older, tied]))


def order_of_use(state: Mapping[str, Tensor], shard: str, last_use_N: Tensor) -> dict[str, Tensor]:
    """Read the order in which a shard's rows were used out of the checkpoint that a run begins with.

    It is by steps, or by days where rows did not make room then. `shard` is how its names begin."""
    if shard + CLOCK in state:
        return {part: state[shard + part] for part in (USED_AT, CLOCK)}
    return {USED_AT: last_use_N, CLOCK: last_use_N.max().reshape(1)}
