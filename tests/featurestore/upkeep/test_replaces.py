"""Commits that replace files: what is asked to go must be there still, and order is kept."""

import pytest

from featurestore import FeatureStore
from featurestore.errors import CommitConflictError
from featurestore.upkeep.compaction import compact
from tests.featurestore.staged import build_shard


@pytest.fixture
def filled(store: FeatureStore, make_rows) -> FeatureStore:
    """Four files in each shard."""
    for seed in range(4):
        store.put(make_rows(60, store.info, seed=seed))
    return store


def test_files_go_without_a_new_one(filled: FeatureStore) -> None:
    files = filled.snapshot().manifest.files(2)
    snapshot = filled.commit({}, "x", replaces={2: files[:2]})
    assert [file.path for file in snapshot.manifest.files(2)] == [file.path for file in files[2:]]


def test_none_goes_from_above_an_older_file_whose_rows_it_may_delete(filled: FeatureStore, make_rows) -> None:
    """As where a restore brings the older one back while a compaction finds that no row lives in the others."""
    filled.delete(make_rows(60, filled.info).keys_N)
    files = filled.snapshot().manifest.files(2)
    for gone in (files[1:], [files[0], files[2]], files[-1:]):
        with pytest.raises(CommitConflictError):
            filled.commit({}, "x", replaces={2: gone})
    assert filled.snapshot().manifest.files(2) == files and filled.snapshot().num_rows == 0


def test_a_new_one_in_the_middle_keeps_its_place(filled: FeatureStore, make_rows) -> None:
    files = filled.snapshot().manifest.files(2)
    rows = make_rows(80, filled.info, seed=6)
    filled.stage_part("run", "p", rows)
    entry = build_shard(filled, "run", 2, ["p"])
    assert entry is not None and len(files) == 4
    with pytest.raises(CommitConflictError):
        filled.commit({2: entry.model_copy(update={"kind": "base"})}, "x", replaces={2: files[1:3]})
    with pytest.raises(CommitConflictError):
        filled.commit({2: entry}, "x", replaces={2: [files[1], files[3]]})
    snapshot = filled.commit({2: entry}, "x", replaces={2: files[1:3]})
    paths = [file.path for file in snapshot.manifest.files(2)]
    assert paths == [files[0].path, entry.path, files[3].path]
    assert [file.kind for file in snapshot.manifest.files(2)] == ["base", "delta", "delta"]


def test_files_that_are_not_there_are_a_conflict(filled: FeatureStore) -> None:
    files = filled.snapshot().manifest.files(2)
    compact(filled)
    with pytest.raises(CommitConflictError, match=files[1].path):
        filled.commit({}, "x", replaces={2: files[1:2]})
    assert filled.snapshot().version == 5
