"""What an extraction plans: new, changed and equal images, parts that stay the same when it runs again."""

import pytest

from featurestore.errors import KeyCollisionError
from pipeline import plan
from pipeline.plan import equal_candidates, make_parts, run_id_of
from pipeline.source import ImageRef


def ref(key, size_bytes=10, tag="tag"):
    return ImageRef(key, f"{key}.jpg", f"file:///{key}.jpg", tag, size_bytes)


def keys(parts):
    return [[ref.key for ref in part.refs] for part in parts]


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


def test_only_images_of_equal_or_unknown_size_may_be_equal():
    refs = [ref(1, 10), ref(2, 20), ref(3, 10), ref(4, -1)]
    assert [candidate.key for candidate in equal_candidates(refs)] == [1, 3, 4]


def test_the_run_id_is_of_the_inputs():
    refs = [ref(1), ref(2)]
    base = run_id_of(refs, "spec", "bfloat16", 256)
    assert base == run_id_of(refs, "spec", "bfloat16", 256)
    others = [
        run_id_of([ref(1), ref(2, tag="new")], "spec", "bfloat16", 256),
        run_id_of(refs, "other", "bfloat16", 256),
        run_id_of(refs, "spec", "float32", 256),
        run_id_of(refs, "spec", "bfloat16", 128),
    ]
    assert len({base, *others}) == 5


def test_pending_are_new_and_changed_images():
    class Stored:
        def metadata_table(self):
            import pyarrow as pa

            return pa.table({"key": [1, 2, 3], "uri": ["1.jpg", "2.jpg", "3.jpg"], "source_tag": ["tag", "old", ""]})

    pending = plan.pending_images([ref(1), ref(2), ref(3, tag=""), ref(4)], Stored())
    assert [image.key for image in pending] == [2, 3, 4]
    with pytest.raises(KeyCollisionError, match=r"key 1 is '1.jpg' in the store and 'other.jpg'"):
        plan.pending_images([ref(1)._replace(uri="other.jpg")], Stored())
