"""Pins keep snapshots, and writers and readers get along with a log out of which manifests go."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from featurestore import FeatureRows, FeatureStore, StoreInfo, log
from featurestore.errors import (
    CorruptFileError,
    KeyCollisionError,
    PinError,
    SnapshotNotFoundError,
    StorageError,
)
from featurestore.storage.storage import Storage
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import pin, read_pins, restore, unpin
from tests.faulty import faulty, made_but_lost, preceded_by
from tests.featurestore.staged import build_shard


def expire_all_but_the_newest(store: FeatureStore) -> None:
    expire(store, keep_last=1, keep_days=0)


def store_versions(store: FeatureStore, folder: str = log.LOG) -> list[int]:
    return log.versions(store.storage, folder)


@pytest.fixture
def nine(store: FeatureStore, make_rows) -> FeatureStore:
    """Versions 1 to 9 of one row."""
    for version in range(1, 10):
        store.put(make_rows(1, store.info, seed=version))
    return store


class TestPins:
    def test_a_pin_keeps_a_snapshot_until_it_is_removed(self, nine: FeatureStore) -> None:
        assert pin(nine, "model-4", 4).version == 4
        assert pin(nine, "model-4", 4).version == 4
        assert pin(nine, "now").version == 9
        expire_all_but_the_newest(nine)
        assert store_versions(nine) == [4, 9]
        unpin(nine, "model-4")
        expire_all_but_the_newest(nine)
        assert store_versions(nine) == [9]
        assert [made.name for made in read_pins(nine.storage)] == ["now"]

    def test_mistakes_are_named(self, nine: FeatureStore) -> None:
        pin(nine, "a", 4)
        with pytest.raises(PinError, match="'a' keeps snapshot 4 already"):
            pin(nine, "a", 5)
        with pytest.raises(PinError, match="no pin 'b'; it has a"):
            unpin(nine, "b")
        for name in ("", ".hidden", "a/b", "a b", "x" * 101):
            with pytest.raises(PinError, match="not the name of a pin"):
                pin(nine, name, 4)
        with pytest.raises(SnapshotNotFoundError, match="no snapshot 12"):
            pin(nine, "c", 12)
        assert [made.name for made in read_pins(nine.storage)] == ["a"]

    def test_an_empty_store_has_nothing_to_pin(self, store: FeatureStore) -> None:
        with pytest.raises(SnapshotNotFoundError, match="0 is the empty store"):
            pin(store, "a")

    def test_a_lost_answer_is_looked_up(self, nine: FeatureStore) -> None:
        assert pin(faulty(nine, create_exclusive=made_but_lost), "a", 4).version == 4

    def test_a_pin_that_comes_after_the_copy_is_refused(
        self, nine: FeatureStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`expire` reads the pins after it has copied: in between, the pin must see the copy."""
        refused = []

        def pin_in_between(storage: Storage) -> list:
            if log.versions(storage, log.EXPIRED) and not refused:
                with pytest.raises(SnapshotNotFoundError, match="expiring just now"):
                    pin(nine, "late", 4)
                refused.append(True)
            return read_pins(storage)

        monkeypatch.setattr("featurestore.upkeep.history.read_pins", pin_in_between)
        expire_all_but_the_newest(nine)
        assert refused and store_versions(nine) == [9] and read_pins(nine.storage) == []

    def test_a_pin_that_comes_before_the_copy_keeps_its_snapshot(
        self, nine: FeatureStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []

        def pin_right_after(storage: Storage) -> list:
            found = read_pins(storage)
            if not calls:
                calls.append(pin(nine, "early", 4))
            return found

        monkeypatch.setattr("featurestore.upkeep.history.read_pins", pin_right_after)
        expire_all_but_the_newest(nine)
        assert store_versions(nine) == [4, 9]
        assert store_versions(nine, log.EXPIRED) == [1, 2, 3, 5, 6, 7, 8]


def test_a_damaged_pin_is_named(nine: FeatureStore) -> None:
    pin(nine, "a", 4)
    path = Path(nine.url) / "pins" / "a.json"
    path.write_bytes(path.read_bytes().replace(b'"version": 4', b'"version": 5'))
    with pytest.raises(CorruptFileError, match=r"pins/a\.json is damaged.*unpin .* a, and pin"):
        read_pins(nine.storage)
    unpin(nine, "a")
    assert read_pins(nine.storage) == []


class TestALogOutOfWhichManifestsGo:
    def test_the_newest_is_listed_again_when_it_went_meanwhile(self, nine: FeatureStore, make_rows) -> None:
        def goes_meanwhile() -> None:
            nine.put(make_rows(1, nine.info, first=3))
            expire_all_but_the_newest(nine)

        assert faulty(nine, read_bytes=preceded_by(goes_meanwhile)).snapshot().version == 10

    def test_a_writer_that_slept_does_not_commit_into_the_past(self, nine: FeatureStore, make_rows) -> None:
        """Between its reading of snapshot 9 and its creation of 10 others commit 10, 11 and 12, and 10 and 11 go."""

        def others() -> None:
            for first in (20, 30, 40):
                nine.put(make_rows(1, nine.info, first=first), "others")
            expire_all_but_the_newest(nine)

        mine = make_rows(1, nine.info, first=50)
        assert faulty(nine, create_exclusive=preceded_by(others)).put(mine, "mine").version == 13
        assert store_versions(nine) == [12, 13]
        snapshot = nine.snapshot()
        assert np.array_equal(snapshot.get(mine.keys_N), mine.features_ND)
        assert snapshot.num_rows == 5

    @pytest.mark.parametrize("pinned", [False, True])
    def test_a_writer_that_slept_for_weeks(self, nine: FeatureStore, make_rows, pinned: bool) -> None:
        """Even the copies are gone. Without pins its version would have been the first to go, so it does not count."""

        def others() -> None:
            for first in (20, 30, 40):
                nine.put(make_rows(1, nine.info, first=first), "others")
            if pinned:
                pin(nine, "other")
            expire_all_but_the_newest(nine)
            nine.storage.delete(log.EXPIRED)

        slow = faulty(nine, create_exclusive=preceded_by(others))
        if pinned:
            with pytest.raises(StorageError, match=r"cannot find out whether .*10\.json is in the log"):
                slow.put(make_rows(1, nine.info, first=50), "mine")
        else:
            assert slow.put(make_rows(1, nine.info, first=50), "mine").version == 13
            assert store_versions(nine) == [12, 13]

    def test_uris_are_checked_though_the_snapshot_that_was_built_on_is_gone(
        self, store: FeatureStore, make_rows
    ) -> None:
        rows = make_rows(1, store.info)
        store.put(make_rows(["elsewhere"], store.info))
        store.stage_part("run", "p", FeatureRows.of(["other"], rows.features_ND, keys=rows.keys_N))
        entry = next(entry for s in range(8) if (entry := build_shard(store, "run", s, ["p"])))
        store.put(rows)
        expire_all_but_the_newest(store)
        store.storage.delete(log.EXPIRED)
        with pytest.raises(KeyCollisionError):
            store.commit({int(entry.path.split("/")[1]): entry}, "put")


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_the_same_on_an_object_store(request: pytest.FixtureRequest, info: StoreInfo, make_rows, kind: str) -> None:
    url = request.getfixturevalue(f"{kind}_url")
    store = FeatureStore.create(f"{url}/store", info.model_copy(update={"num_shards": 1}))
    rows = make_rows(5, info, seed=1)
    first = store.put(rows)
    store.put(make_rows(5, info, seed=2))
    store.delete(rows.keys_N[:2])
    pin(store, "a", 1)
    with pytest.raises(PinError, match="keeps snapshot 1 already"):
        pin(store, "a", 2)
    expire_all_but_the_newest(store)
    assert store_versions(store) == [1, 3]
    assert np.array_equal(restore(store, 1).get(rows.keys_N), rows.features_ND)
    assert store.snapshot(at=datetime.now(UTC)).version == 4
    with pytest.raises(SnapshotNotFoundError, match="or before"):
        store.snapshot(at=datetime.fromtimestamp(first.manifest.time_s - 1, UTC))
    unpin(store, "a")
    expire_all_but_the_newest(store)
    assert store_versions(store) == [4]
