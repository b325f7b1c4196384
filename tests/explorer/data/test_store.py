"""What pages read of a store, against plain loops over its rows: snapshots, neighbours, and the table of all images.

Snapshots: their images by key, uri and part, the timeline, and what came and went. Neighbours: for every dtype; ties,
zeros, and large stores. The table: searched, filtered and sorted.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from explorer.data import catalogue, neighbours, snapshots
from explorer.data.ads import AdFigures, nothing_known
from explorer.data.background import Task
from explorer.data.catalogue import SORTS, Catalogue, ImageQuery, make_catalogue
from explorer.data.neighbours import Neighbour, Neighbours, Space, cosines, nearest_features, nearest_vectors
from explorer.data.snapshots import KINDS, Changes, Timeline, find_key, live_rows, named, newest_at, open_snapshot
from explorer.errors import NotHereError
from featurestore import FeatureStore, key_of_uri, log
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import move_channel, pin
from featurestore.upkeep.remake import remake
from tests.explorer.stores import ADDED, CHANGED, DIM, make_store, rows, storied


@pytest.fixture
def store(tmp_path):
    return storied(tmp_path / "store")


def compared(store, old, new):
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
        expected = compared(store, old, new)
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
    assert compared(store, 1, 2) == {"added": {*ADDED}, "changed": {*CHANGED}, "removed": set()}


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
    assert [newest_at(store, time_s).snapshot.version for time_s in times] == [1, 2, 3, 4]
    assert newest_at(store, times[0] - 1).snapshot.version == 0
    assert newest_at(store, times[3] + 1e9).snapshot.version == 4
    assert newest_at(store, (times[1] + times[2]) / 2).snapshot.version == 2
    assert all(newest_at(store, time_s).is_exact for time_s in [0.0, *times])
    empty = newest_at(make_store(tmp_path / "empty"), 1e9)
    assert (empty.snapshot.version, empty.is_exact) == (0, True)


def test_an_expired_time_gives_the_nearest_that_is_kept_and_says_so(store):
    times = [store.snapshot(version).manifest.time_s for version in (1, 2, 3, 4)]
    expire(store, keep_last=2, keep_days=0, grace_days=0)
    for time_s, is_exact in ((times[0] - 1, False), (times[0], False), (times[1], False), (times[2], True)):
        found = newest_at(store, time_s)
        assert (found.snapshot.version, found.is_exact) == (3, is_exact)
    assert [snapshots.version_before(store, version) for version in (1, 3, 4)] == [0, None, 3]
    with pytest.raises(NotHereError, match="2 has expired"):
        open_snapshot(store, 2)


def expire_when_listed(store, monkeypatch):
    """Expire snapshots 1 and 2 once the versions have been listed, so that they are still in the list."""

    def expiring(storage):
        monkeypatch.undo()
        found = snapshots.log.versions(storage)
        expire(store, keep_last=2, keep_days=0, grace_days=0)
        return found

    monkeypatch.setattr(snapshots.log, "versions", expiring)


def test_a_snapshot_that_expires_while_a_time_is_looked_for_is_none_of_those_that_are_kept(store, monkeypatch):
    times = [store.snapshot(version).manifest.time_s for version in (1, 2, 3, 4)]
    expire_when_listed(store, monkeypatch)
    found = newest_at(store, times[0])
    assert (found.snapshot.version, found.is_exact) == (3, False)


def test_the_first_snapshot_that_is_kept_stands_for_the_empty_store(store, monkeypatch, tmp_path):
    assert newest_at(store, 0.0, never_empty=True).snapshot.version == 1
    expire_when_listed(store, monkeypatch)
    assert newest_at(store, 0.0, never_empty=True).snapshot.version == 3
    assert newest_at(make_store(tmp_path / "empty"), 0.0, never_empty=True).snapshot.version == 0


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


def plainly(snapshot, query_D, most, without):
    table = snapshot.to_arrow(["key", "uri", "feature"]).to_pylist()
    near = []
    for row in table:
        feature_D = np.array(row["feature"], np.float64)
        length = np.linalg.norm(feature_D) * np.linalg.norm(query_D)
        near.append((-(feature_D @ query_D) / length if length else -0.0, row["key"], row["uri"]))
    return [(uri, -cosine) for cosine, key, uri in sorted(near) if key != without][:most]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "compact"])
@pytest.mark.parametrize("most", [1, 5, 43, 100])
def test_neighbours_are_those_of_all_rows_at_once(tmp_path, kind, most):
    store = storied(tmp_path / "store", "bfloat16" if kind == "bfloat16" else "float32")
    if kind == "compact":
        remake(store, tmp_path / "compact", dims=3)
        store = FeatureStore.open(tmp_path / "compact")
    snapshot, key = store.snapshot(), key_of_uri("a/5.jpg")
    query_D = store.codec.decode(snapshot.get([key]))[0]
    found = nearest_features(snapshot, query_D, most + 1).without(key, most)
    expected = plainly(snapshot, query_D.astype(np.float64), most, key)
    assert [image.uri for image in found.images] == [uri for uri, _ in expected]
    np.testing.assert_allclose([image.nearness for image in found.images], [near for _, near in expected], rtol=1e-4)
    assert found.is_exact
    assert found.num_rows == 44


def test_of_equally_near_ones_the_smaller_key_comes_first(tmp_path):
    store = make_store(tmp_path / "store")
    made = rows([f"{number}" for number in range(50)], 1)
    made.features_ND[:] = 1
    store.put(made)
    found = nearest_features(store.snapshot(), np.ones(DIM, np.float32), 7)
    assert [image.key for image in found.images] == sorted(made.keys_N.tolist())[:7]


def test_rows_of_zeros_are_far_from_all():
    values_KD = np.array([[0, 0], [1, 0], [-1, 0]], np.float32)
    assert cosines(values_KD, np.array([2, 0], np.float32)).tolist() == [0, 1, -1]
    assert cosines(values_KD, np.zeros(2, np.float32)).tolist() == [0, 0, 0]


def test_of_a_store_that_is_too_large_a_part_is_searched_and_said(store, monkeypatch):
    monkeypatch.setattr(neighbours, "READ_BYTES", 20 * DIM * 4)
    found, again = (nearest_features(store.snapshot(), np.ones(DIM, np.float32), 3) for _ in range(2))
    assert not found.is_exact
    assert 0 < found.num_searched < found.num_rows == 44
    assert again.images == found.images


def test_vectors_in_blocks_give_the_same_as_in_one(store):
    snapshot = store.snapshot()
    table = snapshot.to_arrow(["key", "feature"])
    keys_N = table["key"].to_numpy()
    vectors_NV = np.array(table["feature"].to_pylist(), np.float32)
    query_V = np.arange(DIM, dtype=np.float32)
    one = nearest_vectors(snapshot, [(keys_N, vectors_NV)], query_V, 9)
    blocks = ((keys_N[start : start + 4], vectors_NV[start : start + 4]) for start in range(0, 44, 4))
    other = nearest_vectors(snapshot, blocks, query_V, 9)
    assert [image.uri for image in other.images] == [image.uri for image in one.images]
    assert [image.uri for image in one.images] == [uri for uri, _ in plainly(snapshot, query_V, 9, None)]


def space(name, keys):
    images = tuple(Neighbour(key, f"{key}", 1.0) for key in keys)
    return Space(name=name, found=Neighbours(images=images, num_searched=9, num_rows=9, seconds=0))


def test_what_one_space_alone_has_is_marked():
    spaces = [space("features", [1, 2, 3]), space("visual", [2, 4])]
    assert neighbours.overlap(spaces) == (1, 2, {"features": {1, 3}, "visual": {4}})
    alone = [spaces[0], Space(name="visual", problem="none")]
    assert neighbours.overlap(alone) is None


PART = ["a/", "1", ".JPG", "B/3", "nothing", "a/1%", "*", "\\", "[", " "]


def figures() -> AdFigures:
    """Make figures of the images a/0.jpg to a/9.jpg: number n has 10 n impressions, and n clicks but for the last."""
    keys = np.array([key_of_uri(f"a/{number}.jpg") for number in range(10)])
    order, numbers = np.argsort(keys), np.arange(10)
    return AdFigures(
        keys_I=keys[order],
        impressions_I=(10 * numbers)[order],
        clicks_I=np.where(numbers < 9, numbers, 60)[order],
        category_I=np.array(["even" if number % 2 == 0 else "odd" for number in numbers], object)[order],
        price_I=np.where(numbers < 5, numbers, np.nan)[order],
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """The same store, for tests that only read it."""
    return storied(tmp_path_factory.mktemp("catalogue") / "store")


@pytest.fixture(scope="module")
def listed(kept: FeatureStore) -> Catalogue:
    return make_catalogue(kept, kept.snapshot(), figures(), Task())


def uris(found: Catalogue, **asked: object) -> list[str]:
    return [image.uri for image in found.images(found.find(ImageQuery(**asked)))]  # type: ignore[arg-type]


def all_uris(store: FeatureStore, version: int | None = None) -> set[str]:
    return set(store.snapshot(version).to_arrow(["uri"])["uri"].to_pylist())


def test_all_images_are_listed_by_name(kept: FeatureStore, listed: Catalogue) -> None:
    assert uris(listed) == sorted(all_uris(kept)) and len(listed) == 44
    older = make_catalogue(kept, kept.snapshot(1), figures(), Task())
    assert uris(older) == sorted(all_uris(kept, 1))
    assert listed.folders == {"a": 39, "b": 5}
    assert listed.categories == {"even": 5, "odd": 5}


@pytest.mark.parametrize("part", PART)
def test_a_part_finds_what_a_loop_finds_in_all_shards(kept: FeatureStore, listed: Catalogue, part: str) -> None:
    assert uris(listed, text=part) == sorted(uri for uri in all_uris(kept) if part.lower() in uri.lower())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (str(key_of_uri("a/5.jpg")), ["a/5.jpg"]),
        (str(key_of_uri("a/11.jpg")), []),  # it is not in the snapshot
        *((text, []) for text in ("-", "1e5", "9" * 30, "-9223372036854775809", "²", "9" * 5_000)),
    ],
)
def test_a_key_finds_its_image_and_what_is_no_key_nothing(listed: Catalogue, text: str, found: list[str]) -> None:
    assert uris(listed, text=text) == found


def test_filters_go_together(listed: Catalogue) -> None:
    assert uris(listed, folder="b") == sorted(ADDED)
    assert uris(listed, category="odd") == [f"a/{number}.jpg" for number in (1, 3, 5, 7, 9)]
    assert uris(listed, category="odd", text="3") == ["a/3.jpg"]
    assert uris(listed, category="odd", folder="b") == uris(listed, category="none") == []


def test_new_images_came_within_a_day_or_after_the_first_snapshot(
    kept: FeatureStore, listed: Catalogue, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert listed.new_since == 1
    assert uris(listed, is_new=True) == sorted(ADDED) and listed.num_new == len(ADDED)
    assert uris(listed, is_new=True, text="a/") == [], "images that changed are not new"
    first = make_catalogue(kept, kept.snapshot(1), figures(), Task())
    assert (first.new_since, first.num_new) == (1, 0)
    other = storied(tmp_path / "store")
    monkeypatch.setattr(catalogue, "_NEW_S", -1.0)  # all snapshots are older
    assert make_catalogue(other, other.snapshot(), figures(), Task()).num_new == 0


def test_orders(listed: Catalogue) -> None:
    rest = sorted(set(uris(listed)) - {f"a/{number}.jpg" for number in range(10)})
    most = uris(listed, sort="impressions")
    assert most[:9] == [f"a/{number}.jpg" for number in range(9, 0, -1)]
    assert most[9:] == sorted(["a/0.jpg", *rest])
    best = uris(listed, sort="ctr")
    assert best[0] == "a/9.jpg"
    assert best[1:9] == uris(listed, sort="low_ctr")[7::-1], "CTRs of few impressions are drawn to the mean"
    assert best[9:] == sorted(["a/0.jpg", *rest]) == uris(listed, sort="low_ctr")[9:]
    assert uris(listed, sort="price")[:5] == [f"a/{number}.jpg" for number in range(4, -1, -1)]
    assert uris(listed, sort="new")[:5] == sorted(ADDED)
    assert all(sorted(uris(listed, sort=sort)) == uris(listed) for sort in SORTS)


def test_an_image_has_its_figures(listed: Catalogue) -> None:
    (image,) = listed.images(listed.find(ImageQuery(text="a/3.jpg")))
    assert (image.category, image.impressions, image.price, image.is_new) == ("odd", 30, 3.0, False)
    assert image.ctr == pytest.approx(0.1)
    (new,) = listed.images(listed.find(ImageQuery(text="b/3.jpg")))
    assert (new.category, new.impressions, new.ctr, new.price, new.is_new) == ("", 0, None, None, True)


def test_the_names_are_read_once(kept: FeatureStore, listed: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_names", None)
    again = make_catalogue(kept, kept.snapshot(), nothing_known("no samples"), Task())
    assert uris(again) == uris(listed) and again.categories == {}


def test_an_empty_store_and_names_of_all_kinds(tmp_path: Path) -> None:
    empty = make_store(tmp_path / "empty")
    found = make_catalogue(empty, empty.snapshot(), figures(), Task())
    assert len(found) == found.num_new == 0 and uris(found, text="x", sort="ctr") == []
    names = {
        "s3://bag/x.jpg": "bag",
        "c.jpg": "",
        "a/b/c.jpg": "a",
        "line\nbreak/x.png": "line\nbreak",
        "/abs/y.jpg": "",
    }
    made = make_store(tmp_path / "names")
    made.put(rows(list(names), 1))
    found = make_catalogue(made, made.snapshot(), figures(), Task())
    assert found.names["folder"].to_pylist() == [names[uri] for uri in sorted(names)]
