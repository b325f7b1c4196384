"""The map of an exact table against a dict: rows in the order of arrival, whatever the number of ranks."""

import numpy as np
import pytest

from featurestore.keys import owned_shards, shard_of, splitmix64
from trainer.ids.exact import Int64, RowMap, map_bytes

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


def test_ids_of_a_checkpoint_take_the_place_of_those_that_were_there() -> None:
    owned, again = Owned(2000), Owned(2000)
    for batch in steps(5, 400, 900):
        owned.learn(batch)
    again.learn(np.arange(500))
    for slot in range(SHARDS):
        again.map.set_ids(slot, owned.map.ids_of(slot))
    asked = np.unique(np.concatenate([np.arange(500), *steps(5, 400, 900)]))
    assert again.rows(asked) == owned.rows(asked)
    more = np.arange(10_000, 11_000)
    owned.learn(more)
    again.learn(more)
    assert again.rows(more) == owned.rows(more)


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


def test_no_ids_are_no_matter() -> None:
    owned = Owned(5)
    owned.learn(np.empty(0, np.int64))
    assert owned.rows(np.empty(0, np.int64)) == []


def test_bytes_are_those_of_the_arrays() -> None:
    for rows in (2, 3, 100, 1025):
        of_map = RowMap(1, rows)
        assert map_bytes(rows) == of_map.id_of_place.nbytes + of_map.row_of_entry.nbytes
