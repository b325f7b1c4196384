"""By which commit an image came: against the commits that the test made, also where some have gone from the history."""

import numpy as np

from explorer.data.store.snapshots import MOST_STEPS, Changes, CommitsBetween, NamedImage, Timeline, commits_between
from featurestore import FeatureStore, key_of_uri
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import pin
from featurestore.upkeep.purge import Images, purge
from tests.explorer.stores import make_store, rows, storied


def found(store: FeatureStore, old: int, new: int, *uris: str) -> CommitsBetween:
    images = [NamedImage(key_of_uri(uri), uri) for uri in uris]
    return commits_between(store, Timeline(), Changes(), store.snapshot(old), store.snapshot(new), images)


def named(store: FeatureStore, old: int, new: int, *uris: str) -> list[tuple[int, bool] | None]:
    of_key = found(store, old, new, *uris).of_key
    came_by = [of_key.get(key_of_uri(uri)) for uri in uris]
    return [None if each is None else (each.commit.version, each.is_sure) for each in came_by]


def test_an_image_came_by_the_newest_commit_that_changed_it(tmp_path):
    store = storied(tmp_path / "store")
    compact(store, force=True)  # rewrites all files, and brings none
    images = ("a/5.jpg", "b/1.jpg", "a/1.jpg", "a/11.jpg", "a/10.jpg", "nobody.jpg")
    assert named(store, 0, 5, *images) == [(1, True), (2, True), (2, True), (3, True), (4, True), None]
    assert named(store, 1, 2, "b/1.jpg") == [(2, True)]
    lines = found(store, 1, 5).lines
    assert [(line.version, line.operation) for line in lines] == [
        (5, "compact"),
        (4, "refresh"),
        (3, "delete"),
        (2, "refresh"),
    ]
    assert all(line.writer == store.snapshot(line.version).manifest.writer != "" for line in lines)


def test_commits_that_have_gone_make_it_unsure(tmp_path):
    store = storied(tmp_path / "store")
    pin(store, "kept", 1)
    expire(store, keep_last=1, keep_days=0, grace_days=0)
    assert named(store, 1, 4, "b/1.jpg", "a/10.jpg") == [(4, False), (4, False)]
    assert found(store, 1, 4).count == 1


def test_of_many_commits_the_newest_are_listed_alone(tmp_path):
    store = make_store(tmp_path / "store", num_shards=1)
    for number in range(MOST_STEPS + 1):
        store.put(rows([f"{number}"], number))
    assert named(store, 0, MOST_STEPS + 1, "0") == [None]
    assert found(store, 0, MOST_STEPS + 1).count == MOST_STEPS + 1
    assert named(store, 1, MOST_STEPS + 1, "3") == [(4, True)]


def test_a_purge_is_named(tmp_path):
    store = storied(tmp_path / "store")
    purge(store, Images.of_keys(np.array([key_of_uri("b/1.jpg")])), writer_hours=0)
    (line,) = found(store, 1, 5).lines
    assert line.operation == "purge"
    assert named(store, 1, 5, "b/2.jpg") == [(5, False)]
