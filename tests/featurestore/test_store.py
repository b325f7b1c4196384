"""What every store does, whatever it lies on: one class of tests, inherited once for each kind of storage."""

import pickle
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featurestore import FeatureRows, FeatureStore, QuarantineRow, StoreInfo, shard_of, to_float32
from featurestore.errors import (
    InvalidRowsError,
    KeyCollisionError,
    MissingKeysError,
    SnapshotNotFoundError,
    SpecMismatchError,
    StoreExistsError,
    StoreNotFoundError,
)
from featurestore.format.datafile import schema_of
from featurestore.staging import read_shards_of_parts
from tests.faulty import faulty
from tests.featurestore.staged import build_shard
from tests.metadata import metadata_of


class StoreContract:
    """Inherit, and give a fixture `url` of an address where nothing is yet."""

    @pytest.fixture
    def store(self, url: str, info: StoreInfo) -> FeatureStore:
        return FeatureStore.create(url, info)

    def test_create_and_open(self, url: str, info: StoreInfo) -> None:
        with pytest.raises(StoreNotFoundError, match=r"store\.json"):
            FeatureStore.open(url)
        FeatureStore.create(url, info)
        with pytest.raises(StoreExistsError):
            FeatureStore.create(url, info)
        stored = FeatureStore.open(url).info
        assert stored.store_id and stored.kind == info
        assert FeatureStore.open_or_create(url, info).info == stored

    def test_another_spec_is_refused_and_each_field_named(self, store: FeatureStore, info: StoreInfo) -> None:
        other = info.model_copy(
            update={"dtype": "float16", "extractor": info.extractor.model_copy(update={"backbone": "resnet50"})}
        )
        with pytest.raises(SpecMismatchError) as caught:
            FeatureStore.open_or_create(store.url, other)
        assert "dtype is 'bfloat16' instead of 'float16'" in str(caught.value)
        assert "extractor.backbone is 'vgg16' instead of 'resnet50'" in str(caught.value)
        assert "dim" not in str(caught.value)

    def test_an_empty_store_is_version_0(self, store: FeatureStore) -> None:
        snapshot = store.snapshot()
        assert (snapshot.version, snapshot.num_rows) == (0, 0)
        assert len(snapshot.keys()) == 0
        assert metadata_of(snapshot).num_rows == 0
        assert len(snapshot.read_shard(0)) == 0
        assert snapshot.statistics().count == 0
        with pytest.raises(SnapshotNotFoundError, match="no snapshot 3; the newest is 0"):
            store.snapshot(3)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_rows_come_back_as_they_were(self, url: str, info: StoreInfo, make_rows, dtype: str) -> None:
        info = info.model_copy(update={"dtype": dtype})
        rows = make_rows(60, info)
        snapshot = FeatureStore.create(url, info).put(rows)
        assert (snapshot.version, snapshot.num_rows) == (1, 60)
        assert np.array_equal(snapshot.get(rows.keys_N), rows.features_ND)
        assert np.array_equal(snapshot.keys(), np.sort(rows.keys_N))
        seen = {}
        for shard in range(8):
            part = snapshot.read_shard(shard)
            assert (shard_of(part.keys_N, 8) == shard).all()
            seen.update({key: (part, i) for i, key in enumerate(part.keys_N.tolist())})
        for i, key in enumerate(rows.keys_N.tolist()):
            part, j = seen[key]
            assert part.uris[j] == rows.uris[i]
            assert part.source_tag[j] == rows.source_tag[i]
            assert part.content_digest_N[j] == rows.content_digest_N[i]
            assert (part.width_N[j], part.height_N[j]) == (rows.width_N[i], rows.height_N[i])
            assert np.array_equal(part.features_ND[j], rows.features_ND[i])

    @pytest.mark.parametrize("count", [0, 1])
    def test_no_row_and_one_row(self, store: FeatureStore, make_rows, count: int) -> None:
        rows = make_rows(count, store.info)
        snapshot = store.put(rows)
        assert (snapshot.version, snapshot.num_rows) == (1, count)
        assert np.array_equal(snapshot.get(rows.keys_N), rows.features_ND)

    def test_the_newest_row_of_a_key_wins_and_a_tombstone_removes(self, store: FeatureStore, make_rows) -> None:
        old, new = make_rows(40, store.info, seed=1), make_rows(10, store.info, seed=2)
        store.put(old)
        store.put(new)
        store.delete(old.keys_N[5:15])
        again = make_rows(["images/7.jpg"], store.info, seed=3)
        snapshot = store.put(again)
        assert snapshot.num_rows == 31
        assert np.array_equal(snapshot.get(old.keys_N[:5]), new.features_ND[:5])
        assert np.array_equal(snapshot.get(old.keys_N[15:]), old.features_ND[15:])
        assert np.array_equal(snapshot.get([old.keys_N[7]]), again.features_ND)
        with pytest.raises(MissingKeysError, match="1 key has"):
            snapshot.get(old.keys_N[5:6])

    def test_of_a_key_twice_in_one_batch_the_last_row_stays(self, store: FeatureStore, make_rows) -> None:
        rows = make_rows(["a", "b", "a"], store.info)
        snapshot = store.put(rows)
        assert snapshot.num_rows == 2
        assert np.array_equal(snapshot.get(rows.keys_N[[1, 2]]), rows.features_ND[1:])

    def test_a_reader_keeps_its_snapshot(self, store: FeatureStore, make_rows) -> None:
        rows = make_rows(20, store.info, seed=1)
        before = store.put(rows)
        store.put(make_rows(20, store.info, seed=2))
        store.delete(rows.keys_N)
        assert store.snapshot().num_rows == 0
        assert before.num_rows == 20
        assert np.array_equal(before.get(rows.keys_N), rows.features_ND)
        assert np.array_equal(store.snapshot(1).get(rows.keys_N), rows.features_ND)

    def test_deleting_what_is_not_there_is_no_error(self, store: FeatureStore) -> None:
        assert store.delete([1, 2, 3]).num_rows == 0

    def test_missing_keys_are_named(self, store: FeatureStore, make_rows) -> None:
        snapshot = store.put(make_rows(3, store.info))
        with pytest.raises(MissingKeysError, match=r"7 keys .*: 1, 2, 3, 4, 5, …"):
            snapshot.get([1, 2, 3, 4, 5, 6, 7])

    def test_two_uris_under_one_key_are_refused_across_commits(self, store: FeatureStore, make_rows) -> None:
        rows = make_rows(3, store.info)
        store.put(rows)
        with pytest.raises(KeyCollisionError, match=r"'images/1\.jpg' and 'other'"):
            store.put(FeatureRows.of(["other"], rows.features_ND[:1], keys=rows.keys_N[1:2]))
        assert store.snapshot().version == 1
        store.delete(rows.keys_N[1:2])
        store.put(FeatureRows.of(["other"], rows.features_ND[:1], keys=rows.keys_N[1:2]))  # the key is free again

    def test_bad_rows_are_refused_before_anything_is_written(self, store: FeatureStore, make_rows) -> None:
        rows = make_rows(3, store.info)
        with pytest.raises(InvalidRowsError):
            store.put(replace(rows, features_ND=np.full_like(rows.features_ND, 0x7F80)))
        assert store.storage.list("data") == []
        assert store.snapshot().version == 0

    def test_staged_parts_become_shards(self, store: FeatureStore, make_rows) -> None:
        first, second = make_rows(50, store.info, seed=1), make_rows(50, store.info, seed=2, first=40)
        store.stage_part("run", "p-0", first)
        store.stage_part("run", "p-1", second)
        store.stage_part("run", "p-0", first)
        assert store.staged_parts("run") == ["p-0", "p-1"]
        assert store.staged_parts("another") == []
        built = {shard: build_shard(store, "run", shard, ["p-0", "p-1"]) for shard in range(8)}
        assert store.snapshot().version == 0
        snapshot = store.commit({s: e for s, e in built.items() if e}, "extract", num_quarantined=3)
        assert snapshot.num_rows == 90
        assert snapshot.manifest.num_quarantined == 3
        assert np.array_equal(snapshot.get(first.keys_N[:40]), first.features_ND[:40])
        assert np.array_equal(snapshot.get(second.keys_N), second.features_ND)
        assert all(entry.kind == "base" for files in snapshot.manifest.shards.values() for entry in files)
        store.discard_staging("run")
        assert store.staged_parts("run") == []

    def test_neighbouring_shards_are_built_together(self, store: FeatureStore, make_rows) -> None:
        parts = [make_rows(50, store.info, seed=seed, first=40 * seed) for seed in range(3)]
        for number, rows in enumerate(parts):
            store.stage_part("run", f"p{number}", rows)
        opened: list[str] = []
        noting = faulty(store, open_input=lambda open_input, path: opened.append(path) or open_input(path))
        names = ["p0", "p1", "p2"]
        built = [noting.build_shards("run", shards, names) for shards in (range(3), range(3, 4), range(4, 8))]
        assert sum("staging" in path for path in opened) == 9
        assert [set(entries) for entries in built] == [{0, 1, 2}, {3}, {4, 5, 6, 7}]
        snapshot = store.commit({s: e for entries in built for s, e in entries.items()}, "extract")
        assert snapshot.num_rows == 130
        for rows in (parts[2], parts[1].take(np.arange(40)), parts[0].take(np.arange(40))):
            assert np.array_equal(snapshot.get(rows.keys_N), rows.features_ND)
        assert store.build_shards("run", range(8), []) == {}

    def test_a_part_is_read_by_row_groups(
        self, store: FeatureStore, make_rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("featurestore.staging._GROUP_BYTES", 3 * store.info.row_bytes)
        rows = make_rows(50, store.info)
        store.stage_part("run", "p", rows)
        entries = {s: e for s in range(8) if (e := build_shard(store, "run", s, ["p"]))}
        assert np.array_equal(store.commit(entries, "extract").get(rows.keys_N), rows.features_ND)

    def test_parts_are_read_side_by_side_and_only_their_rows_stay_in_memory(
        self, store: FeatureStore, make_rows
    ) -> None:
        parts = [f"p{number}" for number in range(4)]
        for number, part in enumerate(parts):
            store.stage_part("run", part, make_rows(400, store.info, seed=number))
        together = threading.Barrier(len(parts), timeout=10)
        meeting = faulty(store, open_input=lambda open_input, path: together.wait() < 9 and open_input(path))
        tables = read_shards_of_parts(meeting.storage, store.info, "run", parts, range(3, 4))
        assert list(tables) == [3] and 0 < len(tables[3]) < 400 * len(parts) / 4
        assert tables[3].get_total_buffer_size() < 2 * tables[3].nbytes  # the rows around them would be much more

    def test_building_checks_uris_against_the_store_and_between_parts(self, store: FeatureStore, make_rows) -> None:
        rows = make_rows(1, store.info)
        shard = int(shard_of(rows.keys_N, 8)[0])
        store.stage_part("run", "a", rows)
        store.stage_part("run", "b", FeatureRows.of(["other"], rows.features_ND, keys=rows.keys_N))
        with pytest.raises(KeyCollisionError):
            build_shard(store, "run", shard, ["a", "b"])
        store.put(rows)
        with pytest.raises(KeyCollisionError):
            build_shard(store, "run", shard, ["b"])

    def test_a_part_that_was_never_staged_is_named(self, store: FeatureStore) -> None:
        with pytest.raises(InvalidRowsError, match="nope"):
            build_shard(store, "run", 0, ["nope"])
        with pytest.raises(InvalidRowsError, match="cannot have this name"):
            store.staged_parts("../data")

    def test_two_racing_first_extracts_make_a_base_and_a_delta(self, store: FeatureStore, make_rows) -> None:
        rows = make_rows(1, store.info, seed=1)
        shard = int(shard_of(rows.keys_N, 8)[0])
        for seed, run in enumerate(["r1", "r2"]):
            store.stage_part(run, "p", make_rows(1, store.info, seed=seed))
        entries = [build_shard(store, run, shard, ["p"], kind="base") for run in ["r1", "r2"]]
        for entry in entries:
            assert entry is not None
            store.commit({shard: entry}, "extract")
        assert [entry.kind for entry in store.snapshot().manifest.files(shard)] == ["base", "delta"]
        assert np.array_equal(store.snapshot().get(rows.keys_N), rows.features_ND)

    def test_a_uri_that_another_writer_brought_meanwhile_is_found_on_rebase(
        self, store: FeatureStore, make_rows
    ) -> None:
        rows = make_rows(1, store.info)
        shard = int(shard_of(rows.keys_N, 8)[0])
        store.stage_part("run", "p", FeatureRows.of(["other"], rows.features_ND, keys=rows.keys_N))
        entry = build_shard(store, "run", shard, ["p"])
        assert entry is not None
        store.put(rows)
        with pytest.raises(KeyCollisionError):
            store.commit({shard: entry}, "extract")
        assert store.snapshot().version == 1

    def test_files_of_another_store_are_refused(
        self, store: FeatureStore, url: str, info: StoreInfo, make_rows
    ) -> None:
        other = FeatureStore.create(
            url + "-other", info.model_copy(update={"extractor": info.extractor.model_copy(update={"layer": "fc7"})})
        )
        entry = other.put(make_rows(40, other.info)).manifest.files(0)[0]
        store.storage.write_bytes(entry.path, other.storage.read_bytes(entry.path))
        with pytest.raises(SpecMismatchError, match=r"extractor\.layer is 'fc7' instead of 'fc6'"):
            store.commit({0: entry}, "put")
        with pytest.raises(InvalidRowsError, match="not a file of shard 1"):
            store.commit({1: entry}, "put")
        store.storage.write_bytes("staging/run/p.parquet", other.storage.read_bytes(entry.path))
        with pytest.raises(SpecMismatchError, match=r"extractor\.layer"):
            build_shard(store, "run", 0, ["p"])

    def test_statistics_are_those_of_the_live_rows(self, store: FeatureStore, make_rows) -> None:
        rows = make_rows(2000, store.info, seed=5)
        for step in range(3):
            snapshot = [
                lambda: store.put(rows),
                lambda: store.put(make_rows(100, store.info, seed=6)),
                lambda: store.delete(rows.keys_N[50:300]),
            ][step]()
            live = to_float32(snapshot.get(snapshot.keys()), "bfloat16").astype(np.float64)
            statistics = snapshot.statistics()
            assert statistics.count == len(live) == snapshot.num_rows
            np.testing.assert_allclose(statistics.mean_D, live.mean(axis=0), rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(statistics.std_D, live.std(axis=0), rtol=1e-6)

    def test_quarantine_keeps_the_newest_reason(self, store: FeatureStore) -> None:
        assert store.quarantine_rows() == []
        store.add_quarantine([QuarantineRow(1, "a", "old", 1.0), QuarantineRow(2, "b", "broken", 2.0)])
        store.add_quarantine([])
        store.add_quarantine([QuarantineRow(1, "a", "new", 3.0)])
        assert store.quarantine_rows() == [QuarantineRow(2, "b", "broken", 2.0), QuarantineRow(1, "a", "new", 3.0)]

    def test_a_store_travels_between_processes(self, store: FeatureStore, make_rows) -> None:
        rows = make_rows(5, store.info)
        store.put(rows)
        copy = pickle.loads(pickle.dumps(store))
        assert np.array_equal(copy.snapshot().get(rows.keys_N), rows.features_ND)


class TestDiskStore(StoreContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path / "store")


class TestFileUrlStore:
    def test_a_file_url_is_the_folder(self, tmp_path: Path, info: StoreInfo) -> None:
        FeatureStore.create(f"file://{tmp_path}/store", info)
        assert FeatureStore.open(tmp_path / "store").info.kind == info


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def url(self, memory_url: str) -> str:
        return memory_url


class TestS3Store(StoreContract):
    @pytest.fixture
    def url(self, s3_url: str) -> str:
        return f"{s3_url}/store"


def test_other_tools_find_dtype_and_shape_of_the_feature(info: StoreInfo) -> None:
    field = schema_of(info).field("feature")
    assert field.metadata == {b"dtype": b"bfloat16", b"shape": b"[8]"}
