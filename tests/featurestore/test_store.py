"""What every store does, whatever it lies on; writers that lose races; versions, quarantine and lack of memory."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore import FeatureRows, FeatureStore, QuarantineRow, StoreInfo, errors, log, shard_of, staging, to_float32
from featurestore.log import manifest_path, version_of, versions
from featurestore.problems import Problem
from featurestore.spec import MAX_VERSION
from featurestore.storage.storage import Storage
from featurestore.store import SnapshotId
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import restore
from featurestore.upkeep.verify import verify
from tests.cli import ran
from tests.faulty import Fault, FaultyStorage, fails, faulty, made_but_lost, opened_faulty
from tests.featurestore.conftest import make_rows, put
from tests.featurestore.contents import metadata_of, rows_of, run
from tests.raised import raises


class TestOnEveryPlace:
    @pytest.fixture
    def store(self, place_url: str, info: StoreInfo) -> FeatureStore:
        return FeatureStore.create(place_url, info)

    def test_create_and_open(self, place_url: str, info: StoreInfo) -> None:
        with raises(errors.StoreNotFoundError, Problem.NO_STORE, where=place_url, file="store.json"):
            FeatureStore.open(place_url)
        FeatureStore.create(place_url, info)
        with raises(errors.StoreExistsError, Problem.STORE_EXISTS, where=place_url):
            FeatureStore.create(place_url, info)
        stored = FeatureStore.open(place_url).info
        assert stored.store_id and stored.kind == info
        assert FeatureStore.open_or_create(place_url, info).info == stored

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_rows_come_back_as_they_were(self, place_url: str, info: StoreInfo, dtype: str) -> None:
        info = info.model_copy(update={"dtype": dtype})
        rows = make_rows(60, info)
        snapshot = FeatureStore.create(place_url, info).put(rows)
        assert (snapshot.version, snapshot.num_rows) == (1, 60)
        assert np.array_equal(snapshot.get(rows.keys_N), rows.features_ND)
        assert np.array_equal(snapshot.keys(), np.sort(rows.keys_N))
        for shard in range(8):
            part = rows_of(snapshot.shard_reader(shard).read(), info)
            assert set(part.keys_N.tolist()) == set(rows.keys_N[shard_of(rows.keys_N, 8) == shard].tolist())
            places = np.array([rows.keys_N.tolist().index(key) for key in part.keys_N.tolist()])
            for name, values in rows.take(places).__dict__.items():
                np.testing.assert_array_equal(getattr(part, name), values)

    def test_two_uris_under_one_key_are_refused_across_commits(self, store: FeatureStore) -> None:
        rows = put(store, 3)
        other = FeatureRows.of(["other"], rows.features_ND[:1], keys=rows.keys_N[1:2])
        key = rows.keys_N[1]
        with raises(errors.KeyCollisionError, Problem.KEY_OF_TWO_URIS, where=key, first="images/1.jpg", second="other"):
            store.put(other)
        assert store.snapshot().version == 1
        store.delete(rows.keys_N[1:2])
        store.put(other)  # the key is free again

    def test_neighbouring_shards_are_built_together(self, store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("featurestore.staging._GROUP_BYTES", 3 * store.info.row_bytes)
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

    def test_files_of_another_store_are_refused(self, store: FeatureStore, place_url: str, info: StoreInfo) -> None:
        layer = info.extractor.model_copy(update={"layer": "fc7"})
        other = FeatureStore.create(place_url + "-other", info.model_copy(update={"extractor": layer}))
        entry = other.put(make_rows(40, other.info)).manifest.files(0)[0]
        store.storage.write_bytes(entry.path, other.storage.read_bytes(entry.path))
        with raises(errors.SpecMismatchError, Problem.ANOTHER_KIND, value="extractor.layer is 'fc7' instead of 'fc6'"):
            store.commit({0: entry}, "put")
        with raises(errors.InvalidRowsError, Problem.FILE_OF_ANOTHER_SHARD, where=entry.path, shard=1):
            store.commit({1: entry}, "put")
        store.storage.write_bytes("staging/run/p.parquet", other.storage.read_bytes(entry.path))
        with raises(errors.SpecMismatchError, Problem.ANOTHER_KIND, value=re.compile("^extractor[.]layer ")):
            store.build_shards("run", range(1), ["p"])


def test_another_spec_is_refused_and_each_field_named(store: FeatureStore, info: StoreInfo) -> None:
    extractor = info.extractor.model_copy(update={"backbone": "resnet50"})
    other = info.model_copy(update={"dtype": "float16", "extractor": extractor})
    differ = "dtype is 'bfloat16' instead of 'float16'; extractor.backbone is 'vgg16' instead of 'resnet50'"
    with raises(errors.SpecMismatchError, Problem.ANOTHER_KIND, value=differ):
        FeatureStore.open_or_create(store.url, other)


def test_an_empty_store_is_version_0(store: FeatureStore) -> None:
    snapshot = store.snapshot()
    assert (snapshot.version, snapshot.num_rows) == (0, 0)
    assert len(snapshot.keys()) == 0
    assert metadata_of(snapshot).num_rows == 0
    assert snapshot.statistics().count == 0
    with raises(errors.SnapshotNotFoundError, Problem.NO_SNAPSHOT, where=store.url, value=3, newest=0):
        store.snapshot(3)


def test_what_cannot_be_stored_leaves_no_snapshot(store: FeatureStore) -> None:
    rows = make_rows(3, store.info)
    with raises(errors.InvalidRowsError, Problem.FEATURES_NOT_FINITE, number=3):  # before anything is written
        store.put(replace(rows, features_ND=np.full_like(rows.features_ND, 0x7F80)))
    assert store.storage.list("data") == []
    with pytest.raises(errors.StorageError, match="No space left"):
        faulty(store, create_exclusive=fails("No space left on device")).put(rows)
    entries = store.write(rows)
    path = Path(store.url) / next(entry.path for entry in entries.values())
    path.write_bytes(path.read_bytes()[:-1])
    with raises(errors.CorruptFileError, Problem.WRONG_NUMBER, where=path, value=path.stat().st_size, unit="bytes"):
        store.commit(entries, "put")
    assert store.snapshot().version == 0


def test_building_checks_uris_between_parts(store: FeatureStore) -> None:
    rows = make_rows(1, store.info)
    store.stage_part("run", "a", rows)
    store.stage_part("run", "b", FeatureRows.of(["other"], rows.features_ND, keys=rows.keys_N))
    with raises(errors.KeyCollisionError, Problem.KEY_OF_TWO_URIS, where=rows.keys_N[0]):
        store.build_shards("run", range(8), ["a", "b"])


def test_a_part_that_was_never_staged_is_named(store: FeatureStore) -> None:
    with raises(errors.InvalidRowsError, Problem.NEVER_STAGED, where=f"{store.url}/staging/run/nope.parquet"):
        store.build_shards("run", range(1), ["nope"])
    with raises(errors.InvalidRowsError, Problem.BAD_RUN_NAME):
        store.staged_parts("../data")


def test_a_commit_whose_read_back_failed_is_made_once(store: FeatureStore) -> None:
    times = iter([1])

    def fails_once(read: Fault, path: str) -> bytes:
        if path == manifest_path(1) and next(times, None):
            store.put(make_rows(1, store.info, seed=9, first=5), "other")
            raise errors.StorageError("timed out")
        return read(path)

    assert faulty(store, read_bytes=fails_once).put(make_rows(1, store.info), "mine").version == 1
    assert [store.snapshot(version).manifest.operation for version in (1, 2)] == ["mine", "other"]


def test_a_server_whose_creates_race_is_noticed_by_reading_back(store: FeatureStore) -> None:
    times = iter([1])

    def overwritten(create: Fault, path: str, data: bytes) -> bool:
        if not next(times, None):
            return create(path, data)
        store.put(make_rows(1, store.info, first=7), "rival")
        return True  # it says that both were first

    assert faulty(store, create_exclusive=overwritten).put(make_rows(1, store.info), "mine").version == 2
    assert [store.snapshot(version).manifest.operation for version in (1, 2)] == ["rival", "mine"]
    assert store.snapshot().num_rows == 2


def test_lost_answers_make_one_store(tmp_path: Path, info: StoreInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(create: Fault, path: str, data: bytes) -> bool:
        return bool(made_but_lost(create, path, data) if path == "store.json" else create(path, data))

    def denied(create: Fault, path: str, data: bytes) -> bool:
        return bool(create(path, data)) and path != "store.json"

    for name, answer in (("lost", lost), ("denied", denied)):
        opened_faulty(monkeypatch, {"create_exclusive": answer}, "featurestore.store")
        mine = FeatureStore.create(tmp_path / name, info)
        assert FeatureStore.open(tmp_path / name).info == mine.info
        with raises(errors.StoreExistsError, Problem.STORE_EXISTS, where=mine.url):  # made alike, but not here
            FeatureStore.create(tmp_path / name, info)


@pytest.mark.parametrize("create", [FeatureStore.create, FeatureStore.open_or_create], ids=["create", "open or create"])
def test_of_two_makers_the_second_is_told(
    create: Callable[..., FeatureStore], tmp_path: Path, info: StoreInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's store appears while this one tries the place."""
    made: list[FeatureStore] = []

    def rival(storage: Storage) -> None:
        monkeypatch.undo()
        made.append(FeatureStore.create(storage.url, info))

    monkeypatch.setattr("featurestore.store.refuse_unsafe", rival)
    if create == FeatureStore.create:
        with raises(errors.StoreExistsError, Problem.STORE_EXISTS, where=tmp_path):
            create(tmp_path, info)
    else:
        assert create(tmp_path, info).info == made[0].info
    assert FeatureStore.open(tmp_path).info == made[0].info


@pytest.mark.parametrize("rival", ["put", "put and compact", "put and expire", "restore"])
def test_a_uri_that_another_writer_brought_meanwhile_is_found_on_rebase(store: FeatureStore, rival: str) -> None:
    """Whatever has become of the files that were there when the rows were built."""
    rows = make_rows(200, store.info)
    shard_N = shard_of(rows.keys_N, 8)
    first, mine = (rows.take(np.array([place])) for place in np.flatnonzero(shard_N == shard_N[0])[:2])
    store.put(first)
    if rival == "restore":
        store.put(mine)
        store.delete(mine.keys_N)
    entries = store.write(FeatureRows.of(["other"], mine.features_ND, keys=mine.keys_N))
    restore(store, 2) if rival == "restore" else store.put(mine)
    if rival == "put and compact":
        compact(store, force=True)
    if rival == "put and expire":
        expire(store, keep_last=1, keep_days=0)
        store.storage.delete(log.EXPIRED)
    version = store.snapshot().version
    with raises(errors.KeyCollisionError, Problem.KEY_OF_TWO_URIS, where=mine.keys_N[0]):
        store.commit(entries, "extract")
    assert store.snapshot().version == version


IMPOSSIBLE = [
    "99999999999999999999.json",
    "09223372036854775808.json",  # 2**63
    "100000000000000000000.json",
    "00000000000000000000.json",
    "3.json",
    "٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٣.json",
    "00000000000000000003.json.bak",
]


def test_the_largest_version_is_the_last_name_that_counts() -> None:
    assert version_of(f"{MAX_VERSION:020d}.json") == MAX_VERSION == 2**63 - 1
    assert [version_of(name) for name in IMPOSSIBLE] == [None] * len(IMPOSSIBLE)


def row(key, time_s, reason="broken"):
    return QuarantineRow(key, f"{key}.jpg", reason, time_s)


@pytest.fixture
def storage(tmp_path):
    storage = Storage(tmp_path)
    staging.add(storage, [row(1, 1.0), row(2, 1.0)])
    staging.add(storage, [row(1, 2.0, "still broken"), row(3, 2.0)])
    return storage


def test_settled_rows_go_and_the_others_stand_in_one_file(storage):
    assert staging.read(storage) == [row(2, 1.0), row(1, 2.0, "still broken"), row(3, 2.0)]
    staging.resolve(storage, [row(1, 2.0, "still broken"), row(7, 9.0)])
    assert staging.read(storage) == [row(2, 1.0), row(3, 2.0)]
    assert len(storage.list("quarantine")) == 1
    staging.resolve(storage, [])
    staging.resolve(storage, [row(9, 9.0)])
    read = staging.read(storage)
    assert read == [row(2, 1.0), row(3, 2.0)]
    staging.add(storage, [row(2, 3.0, "broken again")])  # meanwhile
    staging.resolve(storage, read)
    assert staging.read(storage) == [row(2, 3.0, "broken again")]
    staging.resolve(storage, staging.read(storage))
    assert staging.read(storage) == [] == storage.list("quarantine")


def test_rows_are_not_lost_when_it_stops_half_way(storage):
    with pytest.raises(errors.StorageError):
        staging.resolve(FaultyStorage(storage, {"delete_files": fails("the power went out")}), [row(1, 2.0)])
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
    assert ran(sys.executable, "-c", read, store.url).stdout == "0\n"


def test_lack_of_memory_is_no_damage_to_verify(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, 2)
    lacks = Mock(side_effect=pa.ArrowMemoryError("malloc of size 8388608 failed"))
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lacks)
    with pytest.raises(MemoryError, match="malloc"):
        verify(store)


def test_a_commit_says_what_it_mirrors_and_later_ones_keep_it(store: FeatureStore, tmp_path: Path) -> None:
    """A store whose rows are made of another store's says of which snapshot, in each of its manifests."""
    source = FeatureStore.create(tmp_path / "features", store.info.kind)
    one, two = (SnapshotId.of(source.put(make_rows(1, source.info, seed=seed))).as_source() for seed in (0, 1))
    rows = make_rows(2, store.info)
    assert store.put(rows.take(np.array([0]))).manifest.mirrors is None
    assert store.commit(store.write(rows.take(np.array([1]))), "publish", mirrors=one).manifest.mirrors == one
    assert store.delete(rows.keys_N[:1]).manifest.mirrors == one
    compact(store, force=True)
    assert store.snapshot().manifest.mirrors == one
    assert store.commit({}, "publish", mirrors=two).manifest.mirrors == two
    assert restore(store, 2).manifest.mirrors == one, "what the old snapshot mirrored"
    assert restore(store, 1).manifest.mirrors is None
    without, with_it = (json.loads(store.storage.read_bytes(manifest_path(version))) for version in (1, 2))
    assert "mirrors" not in without and list(with_it)[-2:] == ["mirrors", "digest"]
    assert with_it["mirrors"] == one.model_dump()


def test_a_listing_that_took_long_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suspended process sees of a folder neither what came meanwhile nor what went."""
    now_s, listings = [0.0], [[], [manifest_path(2).partition("/")[2]]]

    def listed(self: Storage, path: str = "") -> list[str]:
        now_s[0] += 100.0
        return listings.pop(0)

    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    monkeypatch.setattr(Storage, "list", listed)
    assert versions(Storage(tmp_path)) == [2]


@pytest.fixture
def shown(store: FeatureStore) -> FeatureStore:
    store.put(make_rows(40, store.info), "extract")
    store.add_quarantine([QuarantineRow(1, "bad.jpg", "truncated", 0.0)])
    return store


def test_info_and_quarantine_show_what_a_store_holds(shown: FeatureStore) -> None:
    output = run("info", shown.url, code=0).output
    told = dict(line.split(maxsplit=1) for line in output.splitlines() if not line.startswith("extractor"))
    wanted = {"dim": "8", "dtype": "bfloat16", "rows": "40", "quarantined": "1", "snapshot": "1 (extract)"}
    assert told.items() >= {**wanted, "store": shown.url}.items()
    assert "extractor backbone       vgg16\n" in output
    shown.add_quarantine([QuarantineRow(-2, "a/empty.jpg", "0 bytes: no image", 86400.0)])
    lines = run("quarantine", shown.url, code=0).output.splitlines()
    _, first, second = (line.rstrip().split(maxsplit=2) for line in lines)
    assert first[:2] == ["-2", "a/empty.jpg"] and first[2].startswith("1970-01-02")
    assert first[2].endswith("0 bytes: no image") and second[1] == "bad.jpg" and second[2].endswith("truncated")


def test_get_prints_or_writes_float32(shown: FeatureStore, tmp_path: Path) -> None:
    rows = make_rows(40, shown.info)
    negative = int(rows.keys_N[rows.keys_N < 0][0])
    expected = to_float32(shown.snapshot().get([negative]), "bfloat16")[0]
    for arguments in ([negative], ["--", negative], ["--uri", rows.uris[rows.keys_N.tolist().index(negative)]]):
        result = run("get", shown.url, *arguments)
        key, values = result.output.split(": ")
        assert int(key) == negative
        np.testing.assert_allclose([float(v) for v in values.split()], expected, rtol=1e-5)
    out = tmp_path / "x.npy"
    assert run("get", shown.url, negative, "--uri", rows.uris[0], "--out", out).exit_code == 0
    written = np.load(out)
    assert written.dtype == np.float32 and written.shape == (2, 8)
    assert np.array_equal(written[0], expected)
