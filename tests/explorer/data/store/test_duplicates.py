"""Copies against a dictionary of digests, in one pass and in several; what has no digest is not compared."""

from collections import Counter

import pytest

from explorer.data.store import duplicates
from explorer.data.store.duplicates import find_duplicates, named
from featurestore import key_of_uri
from tests.explorer.stores import make_store, rows, storied


@pytest.fixture
def store(tmp_path):
    """300 images of 120 contents in two commits, so that a content may lose its copy; and 7 without a digest."""
    store = make_store(tmp_path / "store")
    uris = [f"{number}.jpg" for number in range(300)]
    store.put(rows(uris, 1, [1 + number**2 % 120 for number in range(300)]))
    store.put(rows(uris[:50], 2, [1000 + number for number in range(50)]))
    store.put(rows([f"bare-{number}" for number in range(7)], 3))
    return store


@pytest.mark.parametrize("pass_rows", [10_000, 100, 7])
def test_groups_are_those_of_a_dictionary(store, monkeypatch, pass_rows):
    monkeypatch.setattr(duplicates, "PASS_ROWS", pass_rows)
    table = store.snapshot().to_arrow(["key", "content_digest"]).to_pylist()
    counts = Counter(row["content_digest"] for row in table if any(row["content_digest"]))
    expected = {digest.hex(): count for digest, count in counts.items() if count > 1}
    found = find_duplicates(store.snapshot())
    assert {group.digest: group.count for group in found.groups} == expected
    assert (found.num_groups, found.num_images) == (len(expected), sum(expected.values()))
    assert found.num_spare == sum(count - 1 for count in expected.values())
    assert found.num_without == 7
    assert [group.count for group in found.groups] == sorted(expected.values(), reverse=True)
    keys = {digest: {row["key"] for row in table if row["content_digest"].hex() == digest} for digest in expected}
    assert all({*group.keys} == keys[group.digest] for group in found.groups)


def test_only_the_largest_groups_and_some_keys_are_kept(store, monkeypatch):
    every = find_duplicates(store.snapshot())
    monkeypatch.setattr(duplicates, "MOST_GROUPS", 3)
    monkeypatch.setattr(duplicates, "MOST_KEYS", 2)
    few = find_duplicates(store.snapshot())
    assert (few.num_groups, few.num_images) == (every.num_groups, every.num_images)
    assert [group.count for group in few.groups] == [group.count for group in every.groups[:3]]
    assert all(len(group.keys) == 2 for group in few.groups)


def test_an_empty_store_and_one_without_digests_have_none(tmp_path):
    empty = find_duplicates(make_store(tmp_path / "empty").snapshot())
    assert (empty.num_groups, empty.groups, empty.num_without) == (0, (), 0)
    bare = make_store(tmp_path / "bare")
    bare.put(rows(["a", "b"], 1))
    assert (find_duplicates(bare.snapshot()).num_groups, find_duplicates(bare.snapshot()).num_without) == (0, 2)


def test_names_come_in_the_order_asked(tmp_path):
    snapshot = storied(tmp_path / "store").snapshot()
    keys = [key_of_uri(uri) for uri in ("b/1.jpg", "a/5.jpg", "nowhere", "a/11.jpg", "b/0.jpg")]
    assert [image.uri for image in named(snapshot, keys)] == ["b/1.jpg", "a/5.jpg", "b/0.jpg"]
