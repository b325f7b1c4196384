"""What a run plans: new, changed, moved and equal images beside those stored, parts that stay the same in a rerun."""

import numpy as np
import pytest

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo
from featurestore.errors import KeyCollisionError
from pipeline.features import diff as plan
from pipeline.features.diff import (
    ImageCopy,
    compare,
    equal_candidates,
    find_digests,
    make_copy_parts,
    make_parts,
    pending_images,
    run_id_of,
    split,
)
from pipeline.images.source import ImageRef


def ref(key, size_bytes=10, tag="tag"):
    return ImageRef(key, f"{key}.jpg", f"file:///{key}.jpg", tag, size_bytes)


def digest(number):
    """16 bytes, some with zeros at the end."""
    return bytes([number % 251 + 1] * 8) + bytes(8) if number % 3 == 0 else number.to_bytes(16, "big")


def keys(parts):
    return [[ref.key for ref in part.refs] for part in parts]


@pytest.fixture
def store(tmp_path):
    """Ten images, key k of digest(k); 3 and 4 were replaced since, 5 was removed."""
    extractor = ExtractorSpec(
        backbone="none", layer="none", weights_digest="0", preprocessing="none", compute_dtype="float32"
    )
    store = FeatureStore.create(
        tmp_path / "features", StoreInfo(dim=2, num_shards=4, dtype="float32", extractor=extractor)
    )

    def put(numbers, tag="tag"):
        rows = FeatureRows.of(
            [f"{number}.jpg" for number in numbers], np.ones((len(numbers), 2), np.float32), keys=numbers,
            content_digests=[digest(number) for number in numbers], source_tags=[tag] * len(numbers),
        )  # fmt: skip
        store.put(rows)

    put(range(1, 11))
    put([3, 4], "newer")
    store.delete([5])
    return store


def test_a_listing_beside_a_store(store):
    images = [ref(4, tag="newer"), ref(1), ref(99), ref(3), ref(5), ref(2, tag="")]
    found = compare(images, store.snapshot())
    assert found.num_stored == 9
    assert found.is_stored_N.tolist() == [True, True, False, True, False, True]
    assert found.is_same_tag_N.tolist() == [True, True, False, False, False, False]
    assert found.gone_keys.tolist() == [6, 7, 8, 9, 10]
    assert [image.key for image in pending_images(images, found)] == [99, 3, 5, 2]
    assert [found.digest_N[place].ljust(16, b"\0") for place in (0, 1, 3, 5)] == [digest(key) for key in (4, 1, 3, 2)]


def test_many_images_beside_a_store_as_a_dict_would_have_it(tmp_path, store):
    numbers = np.random.default_rng(0).permutation(400)[:300].tolist()
    rows = FeatureRows.of(
        [f"{number}.jpg" for number in numbers], np.ones((300, 2), np.float32), keys=numbers, source_tags=["tag"] * 300
    )
    stored = {*store.put(rows).keys().tolist()}
    images = [ref(number, tag="tag" if number % 2 else "other") for number in range(200, 600)]
    found = compare(images, store.snapshot())
    assert found.is_stored_N.tolist() == [image.key in stored for image in images]
    assert found.is_same_tag_N.tolist() == [image.key in stored and image.key % 2 == 1 for image in images]
    assert set(found.gone_keys.tolist()) == stored - {image.key for image in images}


def test_an_empty_store_has_nothing(tmp_path, store):
    empty = FeatureStore.create(tmp_path / "empty", store.info)
    found = compare([ref(1)], empty.snapshot())
    assert (found.num_stored, found.is_stored_N.any(), len(found.gone_keys)) == (0, False, 0)


def test_another_image_under_a_key_is_refused(store):
    with pytest.raises(KeyCollisionError, match=r"key 1 is '1.jpg' in the store and 'other.jpg'"):
        compare([ref(2), ref(1)._replace(uri="other.jpg")], store.snapshot())


def test_digests_are_found_under_their_smallest_key(store):
    asked = [digest(9), digest(2), b"", digest(77), digest(5)]
    assert find_digests(store.snapshot(), asked) == {digest(9): 9, digest(2): 2}
    store.put(FeatureRows.of(["copy"], np.ones((1, 2), np.float32), keys=[-7], content_digests=[digest(9)]))
    assert find_digests(store.snapshot(), asked)[digest(9)] == -7
    assert find_digests(store.snapshot(), [b""]) == {}


def test_each_image_goes_one_way(store):
    images = [ref(1), ref(2, tag="touched"), ref(3, tag="changed"), ref(4, tag="unread"), ref(20), ref(21), ref(22)]
    digests = {2: digest(2), 3: digest(33), 4: b"", 20: digest(9), 21: digest(21)}
    made = split(images, compare(images, store.snapshot()), digests, {digest(9): 9})
    assert made.num_unchanged == 1
    assert made.touched == (ImageCopy(images[1], 2),)
    assert made.duplicates == (ImageCopy(images[4], 9),)
    assert [image.key for image in made.compute] == [3, 4, 21, 22]
    assert made.stored_keys == {3, 4}


def test_an_image_without_a_tag_is_unchanged_when_its_bytes_are(store):
    store.put(FeatureRows.of(["50.jpg"], np.ones((1, 2), np.float32), keys=[50], content_digests=[digest(50)]))
    images = [ref(50, tag="")]
    found = compare(images, store.snapshot())
    assert pending_images(images, found) == images
    assert split(images, found, {50: digest(50)}, {digest(50): 50}).num_unchanged == 1
    assert split(images, found, {50: digest(51)}, {}).compute == tuple(images)


def test_an_image_whose_file_could_not_be_looked_at_is_unchanged_when_its_bytes_are(store):
    images = [ref(1, tag=""), ref(2, tag="")]
    made = split(images, compare(images, store.snapshot()), {1: digest(1), 2: digest(33)}, {digest(1): 1})
    assert (made.num_unchanged, made.touched, made.compute) == (1, (), (images[1],))


def test_equal_images_stand_in_one_part():
    refs = [ref(key) for key in range(7)]
    digests = {1: b"same", 6: b"same", 2: b"two", 3: b"two"}
    parts = make_parts(refs, lambda ref: digests.get(ref.key, b""), 2)
    assert keys(parts) == [[0, 1, 6], [2, 3], [4, 5]]


def test_too_many_equal_images_are_split(monkeypatch):
    monkeypatch.setattr(plan, "MAX_GROUP_PARTS", 2)
    parts = make_parts([ref(key) for key in range(10)], lambda ref: b"same", 2)
    assert keys(parts) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_name_of_a_part_changes_with_its_images():
    names = [make_parts(refs, lambda ref: b"", 9)[0].name for refs in ([ref(1)], [ref(1), ref(2)], [ref(1, tag="new")])]
    assert len(set(names)) == 3
    assert names[0] == make_parts([ref(1)], lambda ref: b"", 9)[0].name


def test_copies_of_neighbours_stand_in_one_part():
    copies = [ImageCopy(ref(key), key % 3) for key in range(6)]
    parts = make_copy_parts(copies, 2, "copies")
    assert sorted([copy.source_key for copy in part.copies] for part in parts) == [[0, 0], [1, 1], [2, 2]]
    assert len({part.name for part in parts}) == 3
    assert make_copy_parts(copies[::-1], 6, "copies") != make_copy_parts(copies[:5], 6, "copies")


def test_only_images_of_equal_or_unknown_size_may_be_equal():
    refs = [ref(1, 10), ref(2, 20), ref(3, 10), ref(4, -1)]
    assert [candidate.key for candidate in equal_candidates(refs)] == [1, 3, 4]


def test_the_run_id_is_of_the_inputs():
    base = run_id_of("info", "images", 256)
    assert base == run_id_of("info", "images", 256)
    assert len({base, run_id_of("other", "images", 256), run_id_of("info", "images", 128)}) == 3
