"""The quarantine: rows leave it when they are settled, and none gets lost on the way."""

import subprocess
import sys

import pytest

from featurestore import FeatureStore, staging
from featurestore.errors import StorageError
from featurestore.staging import QuarantineRow
from featurestore.storage.storage import Storage
from tests.faulty import FaultyStorage, fails


def row(key, time_s, reason="broken"):
    return QuarantineRow(key, f"{key}.jpg", reason, time_s)


@pytest.fixture
def storage(tmp_path):
    storage = Storage(tmp_path)
    staging.add(storage, [row(1, 1.0), row(2, 1.0)])
    staging.add(storage, [row(1, 2.0, "still broken"), row(3, 2.0)])
    return storage


def test_settled_rows_go_and_the_others_stand_in_one_file(storage):
    staging.resolve(storage, [row(1, 2.0, "still broken"), row(7, 9.0)])
    assert staging.read(storage) == [row(2, 1.0), row(3, 2.0)]
    assert len(storage.list("quarantine")) == 1
    staging.resolve(storage, [])
    staging.resolve(storage, [row(9, 9.0)])
    assert staging.read(storage) == [row(2, 1.0), row(3, 2.0)]
    staging.resolve(storage, staging.read(storage))
    assert staging.read(storage) == [] == storage.list("quarantine")


def test_what_another_adds_meanwhile_stays(storage):
    read = staging.read(storage)
    staging.add(storage, [row(1, 3.0, "broken again")])
    staging.resolve(storage, read)
    assert staging.read(storage) == [row(1, 3.0, "broken again")]


def test_rows_are_not_lost_when_it_stops_half_way(storage):
    with pytest.raises(StorageError):
        staging.resolve(FaultyStorage(storage, {"delete": fails("the power went out")}), [row(1, 2.0)])
    assert {found.key for found in staging.read(storage)} == {1, 2, 3}


def test_a_file_that_vanishes_while_others_are_read_is_no_damage(storage):
    calls = []

    def stale(names, path):
        calls.append(path)
        return [*names(path), "gone.parquet"] if len(calls) == 1 else names(path)

    assert {found.key for found in staging.read(FaultyStorage(storage, {"list": stale}))} == {1, 2, 3}
    assert len(calls) == 2


def test_a_reading_starts_no_threads(store: FeatureStore) -> None:
    """Threads of Arrow that were still starting when the command was done have aborted it (134)."""
    store.add_quarantine([QuarantineRow(1, "a", "bad", 1.0)])
    read = """
import os, sys
from featurestore import FeatureStore
store = FeatureStore.open(sys.argv[1])
before = len(os.listdir("/proc/self/task"))
assert len(store.quarantine_rows()) == 1
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", read, store.url], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
