"""Counts of ids without a row: never too low, seldom too high, and the same in any order and on any number of ranks."""

from collections import Counter

import numpy as np
import pytest

from featurestore.keys import shard_of, splitmix64
from trainer.ids.exact import CountingFilter, counters_for

SHARDS = 8


def add(counts: CountingFilter, ids: np.ndarray) -> np.ndarray:
    return counts.add(shard_of(ids, SHARDS), splitmix64(ids))


def seen(counts: CountingFilter, ids: np.ndarray) -> np.ndarray:
    return counts.counts(shard_of(ids, SHARDS), splitmix64(ids))


def test_few_ids_are_counted_exactly() -> None:
    counts, ids = CountingFilter(SHARDS, 1 << 16), np.arange(50)
    for step in range(1, 6):
        assert add(counts, ids[: 10 * step]).tolist() == [step - i // 10 for i in range(10 * step)]
    assert seen(counts, ids).tolist() == [5 - i // 10 for i in range(50)]
    assert seen(counts, np.arange(1000, 1100)).sum() == 0


def test_a_count_is_never_too_low_and_seldom_too_high() -> None:
    """As many ids wait as the table has rows."""
    draw, truth = np.random.default_rng(0), Counter[int]()
    rows = 4096
    counts = CountingFilter(SHARDS, counters_for(rows // SHARDS))
    for _ in range(30):
        ids = np.unique(np.minimum(draw.zipf(1.3, 400), rows))
        add(counts, ids)
        truth.update(ids.tolist())
    ids = np.arange(1, rows)
    over = seen(counts, ids).astype(int) - np.array([truth[each] for each in ids.tolist()])
    assert over.min() == 0
    assert (over > 0).mean() < 0.05


def test_counts_end_at_255() -> None:
    counts, ids = CountingFilter(SHARDS, 64), np.array([5])
    for _ in range(300):
        last = add(counts, ids)
    assert last.tolist() == [255] and counts.counts_SC.max() == 255


@pytest.mark.parametrize("counters", [4, 64])
def test_order_does_not_matter(counters: int) -> None:
    one, other = CountingFilter(SHARDS, counters), CountingFilter(SHARDS, counters)
    draw = np.random.default_rng(1)
    for _ in range(10):
        ids = np.unique(draw.integers(0, 500, 200))
        mixed = draw.permutation(len(ids))
        assert add(one, ids)[mixed].tolist() == add(other, ids[mixed]).tolist()
    assert (one.counts_SC == other.counts_SC).all()


def test_fading_halves() -> None:
    counts, ids = CountingFilter(SHARDS, 1024), np.arange(3)
    for most in (3, 2, 2, 1):
        add(counts, ids[:most])
    slots = shard_of(ids, SHARDS)
    before = seen(counts, ids)
    counts.fade(slots[0])
    assert seen(counts, ids).tolist() == np.where(slots == slots[0], [2, 1, 0], before).tolist()


def test_counters_are_a_power_of_two_and_enough() -> None:
    assert [counters_for(rows) for rows in (1, 2, 3, 100)] == [8, 16, 32, 1024]
