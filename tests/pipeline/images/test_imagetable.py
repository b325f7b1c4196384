"""The mapped columns of a listing against plain lists: order, places, repeated rows, collisions, a full disk."""

import numpy as np
import pytest

from featurestore.errors import KeyCollisionError
from pipeline.errors import SourceError
from pipeline.images import source
from pipeline.images.source import ImageRef, ImageTable
from tests.faulty import full_from


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(source, "BATCH_ROWS", 4)


def ref(number, uri=None, **fields):
    uri = uri or f"{number}.jpg"
    return ImageRef(number, uri, f"file:///in/{uri}", f"tag {number}", 10 * number)._replace(**fields)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 23])
def test_rows_come_back_in_their_order(count):
    refs = [ref(number) for number in np.random.default_rng(0).permutation(count).tolist()]
    for base in ("file:///in/", "s3://elsewhere/"):
        table = ImageTable.of(iter(refs), base)
        assert [*table] == refs == table.refs(np.arange(count)) and len(table) == count
        assert table.keys().tolist() == [each.key for each in refs]
        assert table.sizes().tolist() == [each.size_bytes for each in refs]


def test_rows_are_sorted_by_uri_as_python_does():
    names = ["b", "a", "a/b", "a-b", "\U0001f600", "\ue000", "Z", "é", "", "aa", "a\0"]
    refs = [ref(number, f"{name}.jpg") for number, name in enumerate(names)]
    assert [*ImageTable.of(refs, by_uri=True)] == sorted(refs, key=lambda each: each.uri)


def test_places_may_be_asked_in_any_order_and_what_a_row_lacks_stays_away():
    refs = [ref(number) for number in range(23)]
    table = ImageTable.of(refs)
    index = np.random.default_rng(0).integers(23, size=50)
    assert table.refs(index) == [refs[place] for place in index]
    found = table.take(index, "size_bytes", "uri")
    assert found.column_names == ["size_bytes", "uri"]
    assert found["size_bytes"].to_pylist() == [10 * place for place in index]
    assert table.take(index[:0], "key").num_rows == 0 and table.refs(index[:0]) == []
    refs = [ref(1, source_tag="", size_bytes=-1), ref(2, location=""), ref(3, location="/x/3.jpg")]
    table = ImageTable.of(refs, "file:///in/")
    assert [*table] == refs
    assert table.has_tag().tolist() == [False, True, True]


def test_the_first_of_equal_rows_stays_and_the_first_collision_is_told():
    order = [3, 1, 1, 3, 2, 0, 3, 5, 1, 4, 1]
    table = ImageTable.of(ref(number, size_bytes=place) for place, number in enumerate(order))
    assert [(each.key, each.size_bytes) for each in table] == [(3, 0), (1, 1), (2, 4), (0, 5), (5, 7), (4, 9)]
    assert len(ImageTable.of(ref(7) for _ in range(30))) == 1
    rows = [*(ref(number) for number in range(9)), *(ref(number) for number in range(5)), ref(3, "x"), ref(2, "y")]
    with pytest.raises(KeyCollisionError, match=r"key 3 belongs to two images, '3.jpg' and 'x': rename one"):
        ImageTable.of(rows)
    with pytest.raises(KeyCollisionError, match=r"key 1 belongs to two images, 'a' and 'b'"):
        ImageTable.of([ref(1, "b"), ref(1, "a")], by_uri=True)


def test_a_full_disk_is_told_with_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(source, "BATCH_ROWS", 4096)
    told = rf"cannot keep the listing in {tmp_path}: File too large; set TMPDIR"
    with full_from(100_000), pytest.raises(SourceError, match=told):
        ImageTable.of(ref(number) for number in range(20_000))
    assert not list(tmp_path.iterdir())
