"""Snapshots: their images by key, uri and part, the timeline, and what came and went, against loops over all rows."""

from dataclasses import replace

import numpy as np
import pytest

from explorer.data import snapshots
from explorer.data.snapshots import KINDS, Changes, Timeline, find_key, live_rows, named, newest_at, open_snapshot
from explorer.errors import NotHereError
from featurestore import key_of_uri, log
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import move_channel, pin
from tests.explorer.stores import ADDED, CHANGED, make_store, rows, storied


@pytest.fixture
def store(tmp_path):
    return storied(tmp_path / "store")


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


def test_a_shard_with_the_same_files_is_not_looked_at_and_compaction_changes_no_image(store, tmp_path):
    wide = make_store(tmp_path / "wide", num_shards=8)
    wide.put(rows([f"{number}" for number in range(100)], 1))
    wide.put(rows(["0"], 2))
    assert len(Changes().count(wide.snapshot(1), wide.snapshot(2)).shards) == 1
    compact(store, force=True)
    counts = Changes().count(store.snapshot(4), store.snapshot(5))
    assert len(counts.shards) == 4
    assert [counts.total(kind) for kind in KINDS] == [0, 0, 0]


def test_the_newest_snapshot_at_a_time(store, tmp_path):
    times = [store.snapshot(version).manifest.time_s for version in (1, 2, 3, 4)]
    assert [newest_at(store, time_s).version for time_s in times] == [1, 2, 3, 4]
    assert newest_at(store, times[0] - 1).version == 0
    assert newest_at(store, times[3] + 1e9).version == 4
    assert newest_at(store, (times[1] + times[2]) / 2).version == 2
    assert all(newest_at(store, time_s).is_exact for time_s in [0.0, *times])
    empty = newest_at(make_store(tmp_path / "empty"), 1e9)
    assert (empty.version, empty.is_exact) == (0, True)


def test_an_expired_time_gives_the_nearest_that_is_kept_and_says_so(store):
    times = [store.snapshot(version).manifest.time_s for version in (1, 2, 3, 4)]
    expire(store, keep_last=2, keep_days=0, grace_days=0)
    assert newest_at(store, times[0] - 1) == newest_at(store, times[1])
    assert (newest_at(store, times[0]).version, newest_at(store, times[0]).is_exact) == (3, False)
    assert (newest_at(store, times[2]).version, newest_at(store, times[2]).is_exact) == (3, True)
    assert [snapshots.version_before(store, version) for version in (1, 3, 4)] == [0, None, 3]
    with pytest.raises(NotHereError, match="2 has expired"):
        open_snapshot(store, 2)


def test_images_are_counted_without_reading_where_that_is_exact(store):
    assert live_rows(store.snapshot(0)) == 0
    assert live_rows(store.snapshot(1)) == 40
    assert live_rows(store.snapshot(4)) is None
    compact(store, force=True)
    assert live_rows(store.snapshot()) == store.snapshot(4).num_rows == len(np.unique(store.snapshot(4).keys())) == 44


def test_a_key_finds_its_image_and_names_come_in_the_order_asked(store, tmp_path):
    snapshot, key, gone = store.snapshot(), key_of_uri("a/5.jpg"), key_of_uri("a/11.jpg")
    assert find_key(snapshot, key) == (key, "a/5.jpg")
    assert find_key(snapshot, gone) is find_key(snapshot, 2**63) is None
    assert find_key(store.snapshot(1), gone) == (gone, "a/11.jpg")
    asked = [key_of_uri(uri) for uri in ("b/1.jpg", "a/5.jpg", "nowhere", "a/11.jpg", "b/0.jpg")]
    assert [image.uri for image in named(snapshot, asked)] == ["b/1.jpg", "a/5.jpg", "b/0.jpg"]
    own_keys = make_store(tmp_path / "own")
    own_keys.put(replace(rows(["photo.jpg"], 1), keys_N=np.array([7])))
    assert find_key(own_keys.snapshot(), 7) == (7, "photo.jpg")


def test_lines_say_what_commits_wrote_and_who_points_to_them(store):
    """Pins and channels also on lines that were read before."""
    timeline = Timeline()
    assert [line.pins + line.channels for line in timeline.lines(store, [4, 3, 2, 1])] == [()] * 4
    pin(store, "before", 2)
    move_channel(store, "stable", 1)
    move_channel(store, "candidate", 3)
    move_channel(store, "stable", 3, "promoted")
    lines = timeline.lines(store, [4, 3, 2, 1])
    assert [(line.version, line.operation, line.rows_written, line.rows_deleted, line.file_rows) for line in lines] == [
        (4, "refresh", 1, 0, 51),
        (3, "delete", 0, 2, 50),
        (2, "refresh", 8, 0, 48),
        (1, "extract", 40, 0, 40),
    ]
    assert [line.pins for line in lines] == [(), (), ("before",), ()]
    assert [line.channels for line in lines] == [(), ("candidate", "stable"), (), ()]


def test_a_damaged_manifest_is_a_line_and_an_expired_one_is_none(store, tmp_path):
    path = tmp_path / "store" / log.manifest_path(3)
    path.write_bytes(path.read_bytes().replace(b"delete", b"delite"))
    (tmp_path / "store" / log.manifest_path(2)).unlink()
    lines = Timeline().lines(store, [4, 3, 2, 1])
    assert [(line.version, line.is_damaged) for line in lines] == [(4, False), (3, True), (1, False)]
    assert lines[0].rows_written is None
    assert lines[2].rows_written == 40


def test_lines_are_quick_when_they_are_known_or_few(store):
    timeline, versions = Timeline(), [1, 2, 3, 4]
    assert timeline.is_quick(store, versions, 4) and not timeline.is_quick(store, versions, 4096)
    timeline.lines(store, [1, 2, 3])
    assert timeline.is_quick(store, versions, 4096)
