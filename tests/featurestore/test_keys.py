"""Keys, shards and owners: known values, ranges, and that no rank or shard is favoured."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.keys import (
    id_of_text,
    ids_of_texts,
    key_of_uri,
    keys_of_uris,
    owned_shards,
    owner_of,
    shard_of,
    splitmix64,
)
from featurestore.problems import Problem
from tests.raised import told

ANY_KEY = st.integers(-(2**63), 2**63 - 1)


def test_key_of_uri_is_xxh3_64_as_a_signed_number() -> None:
    assert key_of_uri("") == 0x2D06800538D394C2
    assert key_of_uri("abc") == 0x78AF5F94892F3950
    assert -(2**63) <= key_of_uri("größe/ä.jpg") < 2**63
    uris = [f"{i}" for i in range(100)]
    assert keys_of_uris(uris).tolist() == [key_of_uri(uri) for uri in uris]
    assert min(keys_of_uris(uris)) < 0 < max(keys_of_uris(uris))


@pytest.mark.long
@settings(deadline=None)
@given(
    st.lists(st.text(max_size=4) | st.integers().map(str) | st.sampled_from(["007", " 7 ", "-0", "1\0002", "", "٣"]))
)
def test_ids_of_texts_are_those_of_each_text(texts: list[str]) -> None:
    assert ids_of_texts(texts).tolist() == [id_of_text(text) for text in texts]


@pytest.mark.parametrize("texts", [["7", "-12", "0"], ["sku 7", "größe"], ["7", "sku"], ["1\0002"], ["9" * 19, "7"]])
def test_each_way_to_many_ids_gives_those_of_one_text(texts: list[str]) -> None:
    assert ids_of_texts(texts).tolist() == [id_of_text(text) for text in texts]


def test_splitmix64_is_the_published_sequence() -> None:
    # The generator seeded with 0 gives hash(0), hash(golden), ...
    golden = 0x9E3779B97F4A7C15
    states = np.array([0, golden, 2 * golden % 2**64], dtype=np.uint64).view(np.int64)
    assert splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@settings(deadline=None)
@given(st.lists(ANY_KEY, max_size=50), st.integers(0, 16))
def test_shards_are_the_top_bits_so_hash_order_is_shard_order(keys: list[int], log2: int) -> None:
    hashes = splitmix64(np.array(keys, dtype=np.int64))
    shards = shard_of(np.array(keys, dtype=np.int64), 1 << log2)
    assert shards.tolist() == [int(h) >> (64 - log2) for h in hashes]
    assert (np.diff(shards[np.argsort(hashes)]) >= 0).all()


@pytest.mark.parametrize("num_shards", [0, 3, 12, -2])
def test_num_shards_must_be_a_power_of_two(num_shards: int) -> None:
    with pytest.raises(ValueError, match=told(Problem.SHARDS_NOT_A_POWER, value=num_shards)):
        shard_of([1], num_shards)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 11])
def test_every_shard_has_one_owner(num_ranks: int) -> None:
    owned = [owned_shards(8, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(shard for shards in owned for shard in shards) == list(range(8))
    for rank, shards in enumerate(owned):
        assert all(owner_of(shards, num_ranks) == rank)
