"""Images by key, uri and a part of it, against a loop over all uris."""

import pytest

from explorer.data.images import rows as image_rows
from explorer.data.images.rows import find_exactly, find_key, find_part
from featurestore import key_of_uri
from tests.explorer.stores import make_store, rows, storied


@pytest.fixture
def store(tmp_path):
    return storied(tmp_path / "store")


def uris(snapshot):
    return set(snapshot.to_arrow(["uri"])["uri"].to_pylist())


def test_a_key_or_a_whole_uri_finds_its_image(store):
    snapshot, key = store.snapshot(), key_of_uri("a/5.jpg")
    assert find_key(snapshot, key) == (key, "a/5.jpg")
    assert find_exactly(snapshot, str(key)) == [(key, "a/5.jpg")]
    assert find_exactly(snapshot, "a/5.jpg") == [(key, "a/5.jpg")]
    gone = key_of_uri("a/11.jpg")
    assert find_exactly(snapshot, str(gone)) == find_exactly(snapshot, "a/11.jpg") == []
    assert find_exactly(store.snapshot(1), "a/11.jpg") == [(gone, "a/11.jpg")]


@pytest.mark.parametrize("text", ["", "-", "1e5", "9" * 30, "-9223372036854775809", "\ud800", "²", "%", "a/5.jp"])
def test_what_is_no_key_and_no_uri_finds_nothing(store, text):
    assert find_exactly(store.snapshot(), text) == []


def test_a_store_of_its_own_keys_is_searched_by_them(tmp_path):
    store = make_store(tmp_path / "store")
    made = rows(["photo.jpg"], 1)
    store.put(type(made)(**{**made.__dict__, "keys_N": made.keys_N * 0 + 7}))
    assert find_exactly(store.snapshot(), "7") == [(7, "photo.jpg")]
    assert find_exactly(store.snapshot(), "photo.jpg") == []
    assert find_part(store.snapshot(), "photo").images == ((7, "photo.jpg"),)
    other = rows(["b.jpg"], 2)
    store.put(type(other)(**{**other.__dict__, "uris": ["not b.jpg"]}))
    assert find_exactly(store.snapshot(), "b.jpg") == []


@pytest.mark.parametrize("part", ["a/", "1", ".JPG", "B/3", "nothing", "a/1%", "*", "\\"])
def test_a_part_finds_what_a_loop_finds(store, part):
    snapshot = store.snapshot()
    found = find_part(snapshot, part)
    assert {image.uri for image in found.images} == {uri for uri in uris(snapshot) if part.lower() in uri.lower()}
    assert len({image.key for image in found.images}) == len(found.images)
    assert (found.num_searched, found.next_shard) == (44, None)


def test_a_long_search_stops_and_goes_on_where_it_stopped(store, monkeypatch):
    monkeypatch.setattr(image_rows, "MOST_FOUND", 5)
    snapshot, found, shard, rounds = store.snapshot(), [], 0, 0
    while shard is not None:
        part = find_part(snapshot, "jpg", shard)
        found, shard, rounds = [*found, *part.images], part.next_shard, rounds + 1
    assert rounds == 4
    assert len(found) == 44
    assert {image.uri for image in found} == uris(snapshot)
    monkeypatch.setattr(image_rows, "_LOOKS_S", -1)
    assert find_part(snapshot, "nothing").next_shard == 1
