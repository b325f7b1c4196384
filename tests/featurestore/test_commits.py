"""Writers that lose races, meet errors, or never hear the answer. Many processes and kills: see chaos."""

import time
from pathlib import Path

import numpy as np
import pytest

from featurestore import FeatureRows, FeatureStore, StoreInfo, log, shard_of
from featurestore.errors import CommitConflictError, KeyCollisionError, StorageError, StoreExistsError
from featurestore.spec import Manifest
from featurestore.storage.storage import Storage
from featurestore.upkeep.compaction import compact
from tests.faulty import Fault, fails, faulty, made_but_lost, opened_faulty
from tests.featurestore.staged import build_shard


def history(store: FeatureStore) -> list[Manifest]:
    versions = log.versions(store.storage)
    assert versions == list(range(1, len(versions) + 1)), "versions have a gap"
    return [log.read_manifest(store.storage, version) for version in versions]


def test_a_writer_that_dies_before_its_commit_leaves_nothing_visible(store: FeatureStore, make_rows) -> None:
    rows = make_rows(20, store.info)
    store.stage_part("run", "p", rows)
    assert build_shard(store, "run", int(shard_of(rows.keys_N, 8)[0]), ["p"]) is not None
    (Path(store.url) / "log").mkdir()
    (Path(store.url) / "log" / ".tmp-dead").write_bytes(b"half a manif")
    assert store.snapshot().version == 0
    assert store.put(rows).version == 1


def test_a_commit_whose_answer_was_lost_is_made_once(store: FeatureStore, make_rows) -> None:
    def made_but_denied(create: Fault, path: str, data: bytes) -> bool:
        create(path, data)
        return False  # the client's own retry met its own object

    for version, answer in enumerate((made_but_denied, made_but_lost), start=1):
        assert faulty(store, create_exclusive=answer).put(make_rows(1, store.info, seed=version)).version == version
    assert [m.version for m in history(store)] == [1, 2]


def test_a_commit_is_found_when_its_read_back_failed_and_others_went_on(store: FeatureStore, make_rows) -> None:
    times = iter([1])

    def fails_once(read: Fault, path: str) -> bytes:
        if path == log.manifest_path(1) and next(times, None):
            store.put(make_rows(1, store.info, seed=9, first=5), "other")
            raise StorageError("timed out")
        return read(path)

    assert faulty(store, read_bytes=fails_once).put(make_rows(1, store.info), "mine").version == 1
    assert [m.operation for m in history(store)] == ["mine", "other"]


def test_a_server_whose_creates_race_is_noticed_by_reading_back(store: FeatureStore, make_rows) -> None:
    times = iter([1])

    def overwritten(create: Fault, path: str, data: bytes) -> bool:
        if not next(times, None):
            return create(path, data)
        store.put(make_rows(1, store.info, first=7), "rival")
        return True  # it says that both were first

    assert faulty(store, create_exclusive=overwritten).put(make_rows(1, store.info), "mine").version == 2
    assert [m.operation for m in history(store)] == ["rival", "mine"]
    assert store.snapshot().num_rows == 2


def test_a_disk_that_refuses_ends_the_commit_with_its_error(store: FeatureStore, make_rows) -> None:
    with pytest.raises(StorageError, match="No space left"):
        faulty(store, create_exclusive=fails("No space left on device")).put(make_rows(1, store.info))
    assert store.snapshot().version == 0


def test_losing_every_race_ends_in_a_conflict(store: FeatureStore, make_rows, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(make_rows(1, store.info))
    monkeypatch.setattr(log, "_MAX_ATTEMPTS", 3)
    monkeypatch.setattr(log, "versions", lambda storage: [])  # it never sees the version that is there
    with pytest.raises(CommitConflictError, match="3 times"):
        store.put(make_rows(1, store.info, first=1))


def test_a_commit_checks_that_its_files_are_whole(store: FeatureStore, make_rows) -> None:
    rows = make_rows(1, store.info)
    shard = int(shard_of(rows.keys_N, 8)[0])
    store.stage_part("run", "p", rows)
    entry = build_shard(store, "run", shard, ["p"])
    assert entry is not None
    path = Path(store.url) / entry.path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Exception, match="bytes instead of"):
        store.commit({shard: entry}, "put")
    assert store.snapshot().version == 0


def test_the_manifest_counts_what_it_names(store: FeatureStore, make_rows, info: StoreInfo) -> None:
    rows = make_rows(30, info)
    store.put(rows)
    manifest = store.delete(rows.keys_N[:4]).manifest
    entries = manifest.entries
    assert manifest.file_rows == sum(entry.rows for entry in entries) == 34
    assert manifest.num_files == len(entries)
    assert manifest.file_bytes == sum(store.storage.size(entry.path) for entry in entries)
    assert sum(entry.num_deleted for entry in entries) == 4
    assert np.isclose(manifest.time_s, time.time(), atol=60)


def test_a_store_whose_answer_was_lost_is_made_once(
    tmp_path: Path, info: StoreInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(create: Fault, path: str, data: bytes) -> bool:
        return bool(made_but_lost(create, path, data) if path == "store.json" else create(path, data))

    def denied(create: Fault, path: str, data: bytes) -> bool:
        return bool(create(path, data)) and path != "store.json"

    for name, answer in (("lost", lost), ("denied", denied)):
        opened_faulty(monkeypatch, {"create_exclusive": answer}, "featurestore.store")
        mine = FeatureStore.create(tmp_path / name, info)
        assert FeatureStore.open(tmp_path / name).info == mine.info
        with pytest.raises(StoreExistsError):  # made alike, but not here
            FeatureStore.create(tmp_path / name, info)


def test_of_two_makers_of_a_store_the_second_is_told(
    tmp_path: Path, info: StoreInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's store appears while this one tries the place."""
    made: list[FeatureStore] = []

    def rival(storage: Storage) -> None:
        monkeypatch.undo()
        made.append(FeatureStore.create(storage.url, info))

    for create in (FeatureStore.create, FeatureStore.open_or_create):
        url = tmp_path / create.__name__
        monkeypatch.setattr("featurestore.store.refuse_unsafe", rival)
        if create == FeatureStore.create:
            with pytest.raises(StoreExistsError):
                create(url, info)
        else:
            assert create(url, info).info == made[-1].info
        assert FeatureStore.open(url).info == made[-1].info


def test_a_uri_of_a_rival_is_found_after_its_file_was_compacted(store: FeatureStore, make_rows) -> None:
    rows = make_rows(200, store.info)
    shard_N = shard_of(rows.keys_N, 8)
    first, second = (rows.take(np.array([place])) for place in np.flatnonzero(shard_N == shard_N[0])[:2])
    store.put(first)
    store.stage_part("run", "p", FeatureRows.of(["other"], second.features_ND, keys=second.keys_N))
    entry = build_shard(store, "run", int(shard_N[0]), ["p"])
    assert entry is not None
    store.put(second)
    compact(store, force=True)  # one file in place of the two that the rival knew
    with pytest.raises(KeyCollisionError):
        store.commit({int(shard_N[0]): entry}, "extract")
