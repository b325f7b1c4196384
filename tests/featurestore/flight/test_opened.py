"""Which snapshots a server has open: the newest, those that are used, and no more than a few."""

import threading
import time
from pathlib import Path

import pytest

from featurestore import FeaturePartition, FeatureStore, StoreInfo
from featurestore.errors import CorruptFileError, SnapshotNotFoundError, UnavailableError
from featurestore.flight.server import Follower, OpenSnapshots
from tests.featurestore.conftest import MakeRows


@pytest.fixture
def filled(store: FeatureStore, info: StoreInfo, make_rows: MakeRows) -> FeatureStore:
    """Five snapshots, of 10, 20, ... rows."""
    for count in range(10, 60, 10):
        store.put(make_rows(count, info, seed=count))
    return store


def opened(store: FeatureStore, tmp_path: Path, **options: object) -> OpenSnapshots:
    return OpenSnapshots(store, range(8), cache_dir=tmp_path / "cache", **options)  # type: ignore[arg-type]


def rows_of(snapshots: OpenSnapshots, version: int | None) -> int:
    with snapshots.use(version) as partition:
        return partition.num_rows


def test_the_least_used_one_goes_first_and_the_newest_stays(filled: FeatureStore, tmp_path: Path) -> None:
    snapshots = opened(filled, tmp_path, max_open=3)
    assert snapshots.versions == [5]
    assert [rows_of(snapshots, version) for version in (1, 2, 1, None, 3)] == [10, 20, 10, 50, 30]
    assert snapshots.versions == [1, 3, 5]
    snapshots.close()
    assert snapshots.versions == []


def test_what_is_used_is_not_closed_and_too_many_are_refused(filled: FeatureStore, tmp_path: Path) -> None:
    snapshots = opened(filled, tmp_path, max_open=3, keep_s=0)
    with snapshots.use(1) as one, snapshots.use(2) as two:
        with pytest.raises(UnavailableError, match="3 other snapshots"), snapshots.use(3):
            pass
        snapshots.let_go()
        assert snapshots.versions == [1, 2, 5]
        keys = filled.snapshot(1).keys()
        assert len(one.lookup(keys).features_UD) == len(two.lookup(keys).features_UD) == 10
    assert rows_of(snapshots, 3) == 30
    snapshots.let_go()
    assert snapshots.versions == [5]


def test_what_nobody_used_for_a_while_goes(filled: FeatureStore, tmp_path: Path) -> None:
    snapshots = opened(filled, tmp_path, keep_s=1000)
    rows_of(snapshots, 2)
    snapshots.let_go()
    assert snapshots.versions == [2, 5]


def test_one_snapshot_alone(filled: FeatureStore, tmp_path: Path) -> None:
    snapshots = opened(filled, tmp_path, version=2)
    assert rows_of(snapshots, None) == rows_of(snapshots, 2) == 20 and not snapshots.follow()
    with pytest.raises(SnapshotNotFoundError, match="snapshot 2 of .* alone"), snapshots.use(5):  # noqa: RUF043
        pass


def test_a_snapshot_that_cannot_be_opened_is_tried_again(
    filled: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = opened(filled, tmp_path)
    with monkeypatch.context() as patch:

        def damaged(*_: object, **__: object) -> None:
            raise CorruptFileError("damaged")

        patch.setattr(FeaturePartition, "load", damaged)
        with pytest.raises(CorruptFileError), snapshots.use(3):
            pass
    assert snapshots.versions == [5] and rows_of(snapshots, 3) == 30


def test_many_threads_open_one_snapshot_once(
    filled: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = opened(filled, tmp_path)
    load, loads = FeaturePartition.load, []

    def counted(*args: object, **options: object) -> FeaturePartition:
        loads.append(options["version"])
        time.sleep(0.1)
        return load(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(FeaturePartition, "load", counted)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(rows_of(snapshots, 4))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == [4] and found == [40] * 8


def test_a_follower_reports_each_thing_once(
    filled: FeatureStore, info: StoreInfo, make_rows: MakeRows, tmp_path: Path
) -> None:
    said: list[str] = []
    snapshots = opened(filled, tmp_path)
    follower = Follower(snapshots, 0.01, said.append)
    filled.put(make_rows(70, info, seed=9))
    end = time.monotonic() + 30
    while not said and time.monotonic() < end:
        time.sleep(0.01)
    manifests = tmp_path / "store" / "log"
    (manifests / f"{7:020d}.json").write_text("{}")
    while len(said) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    follower.stop()
    assert said[0] == "offers snapshot 6" and said[1].startswith("stays at snapshot 6: ") and len(said) == 2
    assert rows_of(snapshots, None) == 70
