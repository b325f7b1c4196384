"""Pure functions: how much more than its share the busiest of P owners gets."""

import math
from statistics import NormalDist


def highest_of(count: int) -> float:
    """Expected highest of `count` standard normal draws: 0 for one, 1.87 for twenty.

    Blom's approximation of normal order statistics (Statistical Estimates and Transformed Beta-Variables, 1958).
    """
    return 0.0 if count == 1 else NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def owner_skew(unique: float, num_ranks: int, num_shards: int) -> float:
    """Keys of the busiest owner over the mean of all owners, expected, for `unique` keys that are hashed into shards.

    Shards are dealt out in turn, so some ranks have one more than others, which no number of keys evens out; among the
    ranks that have most, the number of keys is binomial, and the highest of them counts. Ranks without a shard idle.
    """
    if num_ranks == 1 or unique <= 0:
        return 1.0
    most = math.ceil(num_shards / num_ranks)
    ranks_with_most = num_shards - (most - 1) * num_ranks
    share = most / num_shards
    deviation = math.sqrt(unique * share * (1 - share))
    highest = unique * share + deviation * highest_of(min(ranks_with_most, num_ranks))
    return min(highest, unique) * num_ranks / unique
