"""Which snapshots a server has open: the newest, and a few older ones that clients ask for."""

import threading
import time
import weakref
from pathlib import Path

import pytest

from featurestore import FeaturePartition, FeatureStore, StoreInfo
from featurestore.errors import CorruptFileError, SnapshotNotFoundError
from featurestore.flight.server import OpenSnapshots, follow
from tests.featurestore.conftest import MakeRows


@pytest.fixture
def filled(store: FeatureStore, info: StoreInfo, make_rows: MakeRows) -> FeatureStore:
    """Five snapshots, of 10, 20, ... rows."""
    for count in range(10, 60, 10):
        store.put(make_rows(count, info, seed=count))
    return store


def opened(store: FeatureStore, tmp_path: Path, **options: object) -> OpenSnapshots:
    return OpenSnapshots(store, cache_dir=tmp_path / "cache", **options)  # type: ignore[arg-type]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The versions that were opened, in order; each takes a moment."""
    load, versions = FeaturePartition.load, []

    def noted(*args: object, **options: object) -> FeaturePartition:
        versions.append(options["version"])
        time.sleep(0.05)
        return load(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(FeaturePartition, "load", noted)
    return versions


def rows_of(snapshots: OpenSnapshots, version: int | None) -> int:
    return snapshots.partition(version).num_rows


def test_the_least_used_one_goes_first_and_the_newest_stays(
    filled: FeatureStore, tmp_path: Path, loads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featurestore.flight.server.MAX_OLDER", 2)
    snapshots = opened(filled, tmp_path)
    asked = (1, 2, 1, None, 3, 1, 5, 2)
    assert [rows_of(snapshots, version) for version in asked] == [10, 20, 10, 50, 30, 10, 50, 20]
    assert loads == [5, 1, 2, 3, 2]


def test_what_is_used_answers_after_others_took_its_place(
    filled: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is unmapped when nobody uses it any more."""
    monkeypatch.setattr("featurestore.flight.server.MAX_OLDER", 1)
    snapshots = opened(filled, tmp_path)
    one, keys = snapshots.partition(1), filled.snapshot(1).keys()
    assert [rows_of(snapshots, version) for version in (2, 3)] == [20, 30]
    assert len(one.lookup(keys).features_UD) == 10
    unmapped = weakref.ref(one)
    del one
    assert unmapped() is None


def test_one_snapshot_alone(filled: FeatureStore, tmp_path: Path) -> None:
    snapshots = opened(filled, tmp_path, version=2)
    assert rows_of(snapshots, None) == rows_of(snapshots, 2) == 20 and not snapshots.follow()
    with pytest.raises(SnapshotNotFoundError, match="snapshot 2 of .* alone"):  # noqa: RUF043
        snapshots.partition(5)


def test_a_snapshot_that_cannot_be_opened_is_tried_again(
    filled: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = opened(filled, tmp_path)
    with monkeypatch.context() as patch:

        def damaged(*_: object, **__: object) -> None:
            raise CorruptFileError("damaged")

        patch.setattr(FeaturePartition, "load", damaged)
        with pytest.raises(CorruptFileError):
            snapshots.partition(3)
    assert rows_of(snapshots, 3) == 30


def test_many_threads_open_one_snapshot_once(filled: FeatureStore, tmp_path: Path, loads: list[int]) -> None:
    snapshots = opened(filled, tmp_path)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(rows_of(snapshots, 4))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == [5, 4] and found == [40] * 8


def test_following_reports_each_thing_once(
    filled: FeatureStore, info: StoreInfo, make_rows: MakeRows, tmp_path: Path
) -> None:
    said: list[str] = []
    snapshots = opened(filled, tmp_path)
    ended = threading.Event()
    follower = threading.Thread(target=follow, args=(snapshots, 0.01, said.append, ended))
    follower.start()
    filled.put(make_rows(70, info, seed=9))
    end = time.monotonic() + 30
    while not said and time.monotonic() < end:
        time.sleep(0.01)
    manifests = tmp_path / "store" / "log"
    (manifests / f"{7:020d}.json").write_text("{}")
    while len(said) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    ended.set()
    follower.join()
    assert said[0] == "offers snapshot 6" and said[1].startswith("stays at snapshot 6: ") and len(said) == 2
    assert rows_of(snapshots, None) == 70
