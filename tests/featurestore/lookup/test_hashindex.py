"""Places found by buckets are those that a binary search finds, whatever shards are held and however full they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.keys import HashIndex, shard_of_hash

ENDS = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1], np.uint64)


def index_of(hash_N, num_shards, owned):
    hash_N = np.unique(hash_N)
    bounds = np.searchsorted(shard_of_hash(hash_N, num_shards), np.arange(num_shards + 1))
    return HashIndex(owned, [hash_N[bounds[shard] : bounds[shard + 1]] for shard in owned], num_shards)


def check(index, asked_U, num_shards, owned):
    shard_U = shard_of_hash(asked_U, num_shards)
    asked_U, shard_U = asked_U[np.isin(shard_U, owned)], shard_U[np.isin(shard_U, owned)]
    place_U = index.places(asked_U, shard_U)
    assert place_U.min(initial=0) >= 0 and place_U.max(initial=0) < len(index)
    assert np.array_equal(index.hash_M[place_U] == asked_U, np.isin(asked_U, index.hash_M))


@pytest.mark.long
@pytest.mark.parametrize("num_shards", [1, 2, 64, 1 << 16])
@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 500, 20_000])
def test_every_hash_is_found_and_no_other(num_shards, num_ranks, count):
    rng = np.random.default_rng(count)
    hash_N = rng.integers(0, 2**64, count, dtype=np.uint64)
    hash_N[: len(ENDS)] = ENDS[: len(hash_N)]
    owned = list(range(0, num_shards, num_ranks))
    index = index_of(hash_N, num_shards, owned)
    asked_U = np.concatenate([hash_N, ENDS, rng.integers(0, 2**64, 5000, dtype=np.uint64)])
    check(index, asked_U, num_shards, owned)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40), st.sampled_from([1, 4, 16]))
def test_hashes_of_any_kind(numbers, num_shards):
    hash_N = np.array(numbers, np.uint64)
    owned = list(range(num_shards))
    asked_U = np.concatenate([hash_N, hash_N + np.uint64(1), hash_N - np.uint64(1), ENDS])
    check(index_of(hash_N, num_shards, owned), asked_U, num_shards, owned)


def test_hashes_that_crowd_in_one_bucket():
    hash_N = np.arange(3000, dtype=np.uint64) + np.uint64(1 << 40)
    check(index_of(hash_N, 4, [0, 1, 2, 3]), np.concatenate([hash_N, hash_N + np.uint64(3000), ENDS]), 4, [0, 1, 2, 3])


def test_the_largest_hash_is_not_taken_for_the_end():
    index = index_of(np.array([5], np.uint64), 1, [0])
    asked_U = np.array([2**64 - 1], np.uint64)
    place_U = index.places(asked_U, np.zeros(1, np.int64))
    assert index.hash_M[place_U[0]] != asked_U[0]
