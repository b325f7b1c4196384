"""What a run plans: new, changed, moved and equal images beside those stored, in bounded memory."""

import tracemalloc
from itertools import chain

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from featurestore import FeatureRows, FeatureStore, StoreInfo
from featurestore.errors import KeyCollisionError
from featurestore.keys import key_of_uri, keys_of_uris
from pipeline.features import diff, refresh
from pipeline.features.part import PartReport, PartSettings, digest_images
from pipeline.images.source import ImageRef, ImageTable
from pipeline.import_vectors import extractor_of
from pipeline.problems import Problem
from tests.raised import raises


def ref(key, size_bytes=10, tag="tag"):
    return ImageRef(key, f"{key}.jpg", f"file:///{key}.jpg", tag, size_bytes)


def table(*refs):
    return ImageTable.of(refs)


def digest(number):
    """16 bytes, some with zeros at the end."""
    return bytes([number % 251 + 1] * 8) + bytes(8) if number % 3 == 0 else number.to_bytes(16, "big")


def keys(images, parts):
    return [[ref.key for ref in images.refs(part.index_K)] for part in parts]


def parts_of(images, part_size, known=()):
    """The parts of images whose digests are known by key, or are not."""
    digests = [dict(known).get(key, b"") for key in images.keys().tolist()]
    return diff.make_parts(images, np.arange(len(images)), np.array(digests, diff.DIGEST_DTYPE), part_size)


def new_store(folder):
    info = StoreInfo(dim=1, num_shards=16, dtype="float32", extractor=extractor_of("elsewhere"))
    return FeatureStore.create(folder / "features", info)


def put(store, keys, uris, digests, tags):
    features_ND = np.ones((len(uris), 1), np.float32)
    store.put(FeatureRows.of(uris, features_ND, keys=keys, content_digests=[*digests], source_tags=tags))


@pytest.fixture
def store(tmp_path):
    """Ten images, key k of digest(k); 3 and 4 were replaced since, 5 was removed."""
    store = new_store(tmp_path)
    for numbers, tag in ((range(1, 11), "tag"), ([3, 4], "newer")):
        put(store, numbers, [f"{n}.jpg" for n in numbers], map(digest, numbers), [tag] * len(numbers))
    store.delete([5])
    return store


def test_another_image_under_a_key_is_refused(store):
    with raises(KeyCollisionError, Problem.OTHER_URI_STORED, where=1, stored="1.jpg", value="other.jpg"):
        diff.compare(table(ref(2), ref(1)._replace(uri="other.jpg")), store.snapshot())


def found_digests(store, asked):
    is_found, keys = diff.find_digests(store.snapshot(), np.array(asked, diff.DIGEST_DTYPE))
    return {each: int(key) for each, is_here, key in zip(asked, is_found, keys, strict=True) if is_here}


def test_digests_are_found_under_their_smallest_key(store):
    asked = [digest(9), digest(2), b"", digest(77), digest(5), digest(9)]
    assert found_digests(store, asked) == {digest(9): 9, digest(2): 2}
    store.put(FeatureRows.of(["copy"], np.ones((1, 1), np.float32), keys=[-7], content_digests=[digest(9)]))
    store.put(FeatureRows.of(["no digest"], np.ones((1, 1), np.float32), keys=[-8]))
    assert found_digests(store, asked)[digest(9)] == -7
    assert b"" not in found_digests(store, asked) and found_digests(store, [b""]) == {}
    assert found_digests(FeatureStore.create(f"{store.url}-empty", store.info), asked) == {}


def test_equal_images_and_copies_of_neighbours_stand_in_one_part():
    images = table(*(ref(key) for key in range(8)))
    near = digest(1)[:8] + b"other   "  # begins as the digest of 1 and 6
    known = {1: digest(1), 6: digest(1), 2: digest(3), 3: digest(3), 4: near}
    assert keys(images, parts_of(images, 1, known)) == [[0], [1, 6], [2, 3], [4], [5], [7]]
    images = table(*(ref(key) for key in range(6)))
    copies = diff.ImageCopies(np.arange(6), np.arange(6) % 3)
    parts = diff.make_copy_parts(images, copies, 2)
    assert sorted(part.source_key_K.tolist() for part in parts) == [[0, 0], [1, 1], [2, 2]]
    assert len({part.name for part in parts}) == 3
    assert all(part.source_key_K.tolist() == (part.index_K % 3).tolist() for part in parts)
    backward = diff.ImageCopies(np.arange(6)[::-1], (np.arange(6) % 3)[::-1])
    names = [diff.make_copy_parts(images, each, 6)[0].name for each in (backward, copies)]
    assert names[0] != names[1]
    assert diff.equal_candidates(np.array([10, 20, 10, -1])).tolist() == [True, False, True, True]


def test_parts_are_of_groups_as_a_dict_would_have_them(monkeypatch):
    monkeypatch.setattr(diff, "MAX_GROUP_PARTS", 2)
    draw = np.random.default_rng(0)
    for count, num_digests, part_size in ((0, 1, 4), (1, 1, 4), (300, 40, 1), (300, 7, 4), (300, 300, 16), (50, 1, 3)):
        images = table(*(ref(key) for key in range(count)))
        known = {key: digest(int(draw.integers(num_digests))) for key in range(count) if draw.random() < 0.7}
        groups = {}
        for key in range(count):
            groups.setdefault(known.get(key, key), []).append(key)
        most = 2 * part_size
        chunks = [group[at : at + most] for group in groups.values() for at in range(0, len(group), most)]
        found = keys(images, parts_of(images, part_size, known))
        assert [*chain(*found)] == [*chain(*chunks)]
        ends = np.cumsum([len(part) for part in found]).tolist()
        assert set(ends) <= {0, *np.cumsum([len(chunk) for chunk in chunks]).tolist()}, "no chunk is in two parts"
        assert all(part_size <= len(part) < 2 * part_size + most for part in found[:-1])


@pytest.mark.parametrize("place", [0, 1000, 2500])
def test_parts_stay_where_images_come_or_go_elsewhere(place):
    numbers = list(range(3000))
    before, after = (
        {part.name for part in parts_of(table(*map(ref, each)), 50)}
        for each in (numbers, [*numbers[:place], 9_999, *numbers[place + 5 :]])
    )
    assert 30 < len(before) <= 60
    assert len(before & after) > 0.8 * len(before)


def test_the_name_of_a_part_changes_with_its_images():
    names = [parts_of(table(*refs), 9)[0].name for refs in ([ref(1)], [ref(1), ref(2)], [ref(1, tag="new")])]
    assert len(set(names)) == 3
    assert names[1] == diff.run_id_of([(1, "tag"), (2, "tag")]) == "54e5273c1bd19ad178087255d185cecd"


COUNT = 20_000
BATCH_ROWS = 3000  # as large beside COUNT as the real one beside 100,000
MOST_BYTES_PER_IMAGE = 350  # at the peak: it is 180, most of it one batch; with an object for each image above 430


def uri_of(number):
    return f"{number // 1000:05d}/{number:09d}.jpg"


def tag_of(number):
    return xxhash.xxh3_128_hexdigest(str(number).encode())


def digest_of(key):
    return xxhash.xxh3_128_digest(str(key).encode())


def answers(client, function, calls):
    """The tasks as workers would do them, of images whose digest is that of their key."""
    for place, call in enumerate(calls):
        if function is digest_images:
            yield place, [digest_of(ref.key) for ref in call[0]]
        else:
            yield place, PartReport(num_rows=len(call[2]), num_computed=len(call[2]))


@pytest.fixture(params=[0, 98])
def large_store(request, tmp_path):
    """A store that has so many of a hundred of the images."""
    large_store = new_store(tmp_path)
    if numbers := [number for number in range(COUNT) if number % 100 < request.param]:
        keys = keys_of_uris(uris := [uri_of(number) for number in numbers])
        tags = ["old" if number % 100 == 0 else tag_of(number) for number in numbers]
        put(large_store, keys, uris, map(digest_of, keys.tolist()), tags)
    return large_store


@pytest.mark.long
def test_no_object_is_held_for_an_image(large_store, monkeypatch):
    monkeypatch.setattr("pipeline.images.source.BATCH_ROWS", BATCH_ROWS)
    monkeypatch.setattr(refresh, "run_tasks", answers)
    monkeypatch.setattr(refresh, "describe_network", lambda *_: large_store.info.extractor)
    snapshot = large_store.snapshot()
    settings = PartSettings(large_store.url, "run", "", "", large_store.info.extractor, snapshot.version, 1, 64)
    in_arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        names = map(uri_of, range(COUNT))
        images = ImageTable.of(
            ImageRef(key_of_uri(name), name, f"s3://photos/{name}", tag_of(number), 10_000 + number % 999)
            for number, name in enumerate(names)
        )
        plan = refresh.make_plan(None, images, diff.compare(images, snapshot), snapshot)
        run = refresh.ImageRun(None, large_store, settings, snapshot)
        reports = run.stage(images, plan)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    num_stored = len(snapshot.keys())
    assert len(images) == COUNT
    assert plan.num_unchanged == num_stored - plan.num_touched
    assert sum(report.num_rows for report in reports) == len(plan.compute_C) + plan.num_touched
    assert len(plan.compute_C) == COUNT - num_stored
    assert peak_bytes / COUNT < MOST_BYTES_PER_IMAGE
    assert pa.total_allocated_bytes() - in_arrow < 8 * COUNT
