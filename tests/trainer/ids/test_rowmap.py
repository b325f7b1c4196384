"""Parts of an exact table: the map from ids to rows against a dict, and the filter that counts ids without a row."""

from collections import Counter
from copy import deepcopy

import numpy as np
import pytest

from featurestore.keys import owned_shards, shard_of, splitmix64
from trainer.ids.exact import CountingFilter, Int64, RowMap, counters_for

SHARDS = 8


class Owned:
    """The map of one rank, asked with ids alone."""

    def __init__(self, rows_per_shard: int, rank: int = 0, num_ranks: int = 1) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.shards = owned_shards(SHARDS, rank, num_ranks)
        self.map = RowMap(len(self.shards), rows_per_shard)

    def of(self, ids: Int64) -> tuple[Int64, np.ndarray, Int64]:
        return np.searchsorted(self.shards, shard_of(ids, SHARDS)), splitmix64(ids), ids

    def rows(self, ids: Int64) -> list[int]:
        return (self.map.places(*self.of(ids)) % self.map.rows_per_shard).tolist()

    def learn(self, ids: Int64) -> None:
        """As a step does: different ids, those of this rank alone, and of them those without a row."""
        ids = np.unique(ids)
        ids = ids[shard_of(ids, SHARDS) % self.num_ranks == self.rank]
        slot, hashes, _ = self.of(ids)
        new = self.map.places(slot, hashes, ids) % self.map.rows_per_shard == 0
        self.map.insert(slot[new], hashes[new], ids[new])


def steps(count: int, size: int, most: int) -> list[Int64]:
    draw = np.random.default_rng(most)
    return [draw.integers(-most, most, size) * 7919 for _ in range(count)]


def by_dict(batches: list[Int64], most_rows: int) -> dict[int, int]:
    """Id -> row in its shard, one id at a time."""
    row_of: dict[int, int] = {}
    used = [0] * SHARDS
    for batch in map(np.unique, batches):
        for each, shard in zip(batch.tolist(), shard_of(batch, SHARDS).tolist(), strict=True):
            if each not in row_of and used[shard] < most_rows:
                used[shard] += 1
                row_of[each] = used[shard]
    return row_of


@pytest.mark.parametrize("rows_per_shard", [2, 5, 40, 2000])
@pytest.mark.parametrize("num_ranks", [1, 3, 11])
def test_rows_are_those_of_a_dict(num_ranks: int, rows_per_shard: int) -> None:
    batches = steps(12, 300, 900)
    expected = by_dict(batches, rows_per_shard - 1)
    known = np.array([*expected])
    every = np.unique(np.concatenate([*batches, np.array([0, 2**63 - 1, -(2**63)])]))
    for rank in range(num_ranks):
        owned = Owned(rows_per_shard, rank, num_ranks)
        for batch in batches:
            owned.learn(batch)
        mine = every[shard_of(every, SHARDS) % num_ranks == rank]
        assert owned.rows(mine) == [expected.get(each, 0) for each in mine.tolist()]
        for slot, shard in enumerate(owned.shards):
            ids = known[shard_of(known, SHARDS) == shard].tolist()
            assert owned.map.ids_of(slot).tolist() == sorted(ids, key=expected.__getitem__)


def test_rows_are_removed_and_the_last_ones_take_their_numbers() -> None:
    """Against lists, many times over."""
    draw, owned = np.random.default_rng(5), Owned(60)
    ids_of: list[list[int]] = [[] for _ in range(SHARDS)]
    for number in range(40):
        new = np.arange(number * 100, number * 100 + 100)
        owned.learn(new)
        for slot, ids in enumerate(ids_of):
            ids.extend(new[shard_of(new, SHARDS) == slot][: 59 - len(ids)].tolist())
            gone = np.sort(draw.choice(len(ids), int(draw.integers(0, len(ids) + 1)), replace=False)) + 1
            from_M, to_M = owned.map.remove(slot, gone)
            end = len(ids) - len(gone)
            assert to_M.tolist() == [row for row in gone.tolist() if row <= end]
            assert from_M.tolist() == [row for row in range(end + 1, len(ids) + 1) if row not in gone]
            for row, to in zip(from_M.tolist(), to_M.tolist(), strict=True):
                ids[to - 1] = ids[row - 1]
            del ids[end:]
            assert owned.map.ids_of(slot).tolist() == ids
        every = np.arange(number * 100 + 100)
        row_of = {each: row for ids in ids_of for row, each in enumerate(ids, 1)}
        assert owned.rows(every) == [row_of.get(each, 0) for each in every.tolist()]


def add(counts: CountingFilter, ids: np.ndarray) -> np.ndarray:
    return counts.add(shard_of(ids, SHARDS), splitmix64(ids))


def seen(counts: CountingFilter, ids: np.ndarray) -> np.ndarray:
    return add(deepcopy(counts), ids) - 1


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
