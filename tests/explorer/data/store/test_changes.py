"""What came and went, page by page, against the rows of both snapshots compared one by one; and days of the history."""

import numpy as np
import pytest

from explorer.data.store.listing import live_rows, open_snapshot, version_before
from explorer.data.store.snapshots import KINDS, Changes, named, newest_at
from explorer.errors import NotHereError
from featurestore import key_of_uri
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from tests.explorer.stores import ADDED, CHANGED, make_store, rows, storied


def plainly(store, old, new):
    """The uris that came, changed and went, from two dictionaries."""
    tables = (store.snapshot(version).to_arrow().to_pylist() for version in (old, new))
    before, after = ({row["uri"]: (row["content_digest"], tuple(row["feature"])) for row in table} for table in tables)
    return {
        "added": {*after} - {*before},
        "changed": {uri for uri in {*after} & {*before} if after[uri] != before[uri]},
        "removed": {*before} - {*after},
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_of_changes_hold_each_image_once_as_a_plain_comparison_finds_it(tmp_path, dtype):
    store, changes = storied(tmp_path / "store", dtype), Changes()
    for old, new in ((0, 1), (1, 2), (2, 3), (3, 4), (1, 4), (4, 1), (0, 4), (2, 2)):
        before, after = store.snapshot(old), store.snapshot(new)
        expected = plainly(store, old, new)
        counts = changes.count(before, after)
        for kind in KINDS:
            assert counts.total(kind) == len(expected[kind])
            found = []
            for first in range(0, len(expected[kind]), 3):
                page = changes.page(before, after, kind, first, 3)
                assert len(page) == min(3, len(expected[kind]) - first)
                found += page
            assert {image.uri for image in found} == expected[kind]
            assert len({image.key for image in found}) == len(found)
    assert plainly(store, 1, 2) == {"added": {*ADDED}, "changed": {*CHANGED}, "removed": set()}


def test_a_shard_with_the_same_files_is_not_looked_at(tmp_path):
    store = make_store(tmp_path / "store", num_shards=8)
    store.put(rows([f"{number}" for number in range(100)], 1))
    store.put(rows(["0"], 2))
    assert len(Changes().count(store.snapshot(1), store.snapshot(2)).shards) == 1


def test_compaction_changes_no_image(tmp_path):
    store = storied(tmp_path / "store")
    compact(store, force=True)
    counts = Changes().count(store.snapshot(4), store.snapshot(5))
    assert len(counts.shards) == 4
    assert [counts.total(kind) for kind in KINDS] == [0, 0, 0]


def test_the_newest_snapshot_at_a_time(tmp_path):
    store = storied(tmp_path / "store")
    times = [store.snapshot(version).manifest.time_s for version in (1, 2, 3, 4)]
    assert [newest_at(store, time_s).version for time_s in times] == [1, 2, 3, 4]
    assert newest_at(store, times[0] - 1).version == 0
    assert newest_at(store, times[3] + 1e9).version == 4
    assert newest_at(store, (times[1] + times[2]) / 2).version == 2
    assert all(newest_at(store, time_s).is_exact for time_s in [0.0, *times])
    empty = newest_at(make_store(tmp_path / "empty"), 1e9)
    assert (empty.version, empty.is_exact) == (0, True)


def test_an_expired_time_gives_the_nearest_that_is_kept_and_says_so(tmp_path):
    store = storied(tmp_path / "store")
    times = [store.snapshot(version).manifest.time_s for version in (1, 2, 3, 4)]
    expire(store, keep_last=2, keep_days=0, grace_days=0)
    assert newest_at(store, times[0] - 1) == newest_at(store, times[1])
    assert (newest_at(store, times[0]).version, newest_at(store, times[0]).is_exact) == (3, False)
    assert (newest_at(store, times[2]).version, newest_at(store, times[2]).is_exact) == (3, True)
    assert [version_before(store, version) for version in (1, 3, 4)] == [0, None, 3]
    with pytest.raises(NotHereError, match="2 has expired"):
        open_snapshot(store, 2)


def test_images_are_counted_without_reading_where_that_is_exact(tmp_path):
    store = storied(tmp_path / "store")
    assert live_rows(store.snapshot(0)) == 0
    assert live_rows(store.snapshot(1)) == 40
    assert live_rows(store.snapshot(4)) is None
    compact(store, force=True)
    assert live_rows(store.snapshot()) == store.snapshot(4).num_rows == len(np.unique(store.snapshot(4).keys())) == 44


def test_names_come_in_the_order_asked(tmp_path):
    snapshot = storied(tmp_path / "store").snapshot()
    keys = [key_of_uri(uri) for uri in ("b/1.jpg", "a/5.jpg", "nowhere", "a/11.jpg", "b/0.jpg")]
    assert [image.uri for image in named(snapshot, keys)] == ["b/1.jpg", "a/5.jpg", "b/0.jpg"]
