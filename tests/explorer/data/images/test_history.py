"""The rows of an image over snapshots, against each snapshot read by itself."""

import itertools

import numpy as np
import pytest

from explorer.data.images.rows import row_of, row_spans
from featurestore import key_of_uri
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from tests.explorer.stores import digest_of, storied


@pytest.mark.parametrize("uri", ["a/0.jpg", "a/5.jpg", "a/10.jpg", "a/11.jpg", "b/0.jpg", "nowhere"])
def test_spans_say_of_every_snapshot_what_it_has(tmp_path, uri):
    store, key = storied(tmp_path / "store"), key_of_uri(uri)
    spans = row_spans(store, key)
    said = {version: span.row for span in spans for version in range(span.first, span.last + 1)}
    for version in range(1, 5):
        table = store.snapshot(version).to_arrow().to_pylist()
        row = next((row for row in table if row["key"] == key), None)
        mine = said.get(version)
        assert (mine is None) == (row is None)
        assert mine == row_of(store, store.snapshot(version).manifest, key)
        if row and mine:
            assert (mine.uri, mine.digest) == (row["uri"], row["content_digest"].hex())
            assert mine.norm == pytest.approx(np.linalg.norm(row["feature"]))
    assert all(one.row != other.row for one, other in itertools.pairwise(spans))


def test_spans_of_changes_removals_and_returns(tmp_path):
    store = storied(tmp_path / "store")
    assert [(span.first, span.last) for span in row_spans(store, key_of_uri("a/0.jpg"))] == [(1, 1), (2, 4)]
    back = row_spans(store, key_of_uri("a/10.jpg"))
    assert [(span.first, span.last, span.row is None, span.operation) for span in back] == [
        (1, 2, False, "extract"),
        (3, 3, True, "delete"),
        (4, 4, False, "refresh"),
    ]
    assert (back[0].row.digest, back[2].row.digest) == (digest_of(11).hex(), digest_of(20).hex())


def test_compaction_is_no_change_and_expired_snapshots_are_left_out(tmp_path):
    store = storied(tmp_path / "store")
    compact(store, force=True)
    assert [(span.first, span.last) for span in row_spans(store, key_of_uri("a/0.jpg"))] == [(1, 1), (2, 5)]
    expire(store, keep_last=2, keep_days=0, grace_days=0)
    assert [(span.first, span.last) for span in row_spans(store, key_of_uri("a/0.jpg"))] == [(4, 5)]
