"""Compaction changes nothing that a reader can see, and takes nothing away from other writers."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from featurestore import FeatureRows, FeatureStore, StoreInfo, shard_of
from featurestore.errors import CommitConflictError, CorruptFileError
from featurestore.spec import FileEntry
from featurestore.store import Snapshot
from featurestore.upkeep.compaction import MAX_DELTAS, compact, merged_blocks, needs_compaction
from tests.faulty import faulty
from tests.featurestore.shardrows import read_shard
from tests.featurestore.staged import metadata_of, run
from tests.featurestore.upkeep.damaged import needs, spoil

pytestmark = pytest.mark.long


def fill(store: FeatureStore, make_rows) -> FeatureRows:
    """A base, two deltas over it, and tombstones: 68 of 80 rows live."""
    rows = make_rows(80, store.info, seed=1)
    store.put(rows)
    store.put(make_rows(30, store.info, seed=2))
    store.put(make_rows([f"images/{i}.jpg" for i in range(0, 80, 3)], store.info, seed=3))
    store.delete(rows.keys_N[20:32])
    return rows


@pytest.fixture
def filled(filled_by, make_rows) -> FeatureStore:
    return filled_by(lambda store: fill(store, make_rows))


def assert_same(old: Snapshot, new: Snapshot) -> None:
    keys = old.keys()
    assert np.array_equal(keys, new.keys()) and old.num_rows == new.num_rows
    assert np.array_equal(old.get(keys), new.get(keys))
    assert metadata_of(old).equals(metadata_of(new))
    mine, theirs = old.statistics(), new.statistics()
    assert mine.count == theirs.count
    np.testing.assert_allclose(mine.mean_D, theirs.mean_D, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(mine.std_D, theirs.std_D, rtol=1e-6)


def data_files(store: FeatureStore) -> set[str]:
    return {entry.path for entry in store.storage.entries("data")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_results_are_identical(tmp_path: Path, info: StoreInfo, make_rows, dtype: str) -> None:
    """`StoreMachine` says so of any order of commits, in memory and on S3 too."""
    store = FeatureStore.create(tmp_path / "store", info.model_copy(update={"dtype": dtype}))
    fill(store, make_rows)
    before = store.snapshot()
    report = compact(store)
    after = store.snapshot()
    assert report.version == after.version == before.version + 1
    assert after.manifest.operation == "compact"
    assert [(len(files), files[0].kind, files[0].num_deleted) for files in after.manifest.shards.values()] == [
        (1, "base", 0)
    ] * 8
    assert_same(before, after)
    assert (report.num_files_before, report.num_files_after) == (before.manifest.num_files, 8)
    assert (report.num_bytes_before, report.num_bytes_after) == (
        before.manifest.file_bytes,
        after.manifest.file_bytes,
    )
    assert compact(store, force=True).shards == () and store.snapshot().version == after.version


def test_an_empty_store_and_one_that_is_compact_get_no_commit(store: FeatureStore, make_rows) -> None:
    assert compact(store).version == 0
    store.put(make_rows(50, store.info))
    assert compact(store, force=True).version == 1 == store.snapshot().version


class TestWhatIsDue:
    @staticmethod
    def files(*sizes: int) -> list[FileEntry]:
        entry = FileEntry(
            path="p", bytes=1, rows=1, num_deleted=0, sha256="", xxh3_128="", kind="delta", info_digest="",
            statistics_path=None, statistics_sha256=None,
        )  # fmt: skip
        return [entry.model_copy(update={"bytes": size}) for size in sizes]

    def test_more_than_8_deltas(self) -> None:
        assert not needs_compaction(self.files(10**6, *[1] * 8))
        assert needs_compaction(self.files(10**6, *[1] * 9))
        assert MAX_DELTAS == 8

    def test_more_than_a_quarter_of_the_bytes_in_deltas(self) -> None:
        assert not needs_compaction(self.files(75, 25))
        assert needs_compaction(self.files(75, 26))
        assert not needs_compaction(self.files(75)) and not needs_compaction([])

    def test_only_what_is_due_is_done_unless_forced(self, store: FeatureStore, make_rows) -> None:
        rows = make_rows(3000, store.info)
        store.put(rows)
        store.put(make_rows(["images/5.jpg"], store.info, seed=2))
        assert compact(store).shards == ()
        shard = int(shard_of(rows.keys_N[5:6], 8)[0])
        assert compact(store, force=True).shards == (shard,)

    def test_force_takes_tombstones_out_of_a_single_file(self, store: FeatureStore, make_rows) -> None:
        store.delete(make_rows(40, store.info).keys_N)
        assert compact(store).shards == ()
        assert len(compact(store, force=True).shards) == 8
        assert store.snapshot().manifest.shards == {}

    def test_chosen_shards(self, filled: FeatureStore) -> None:
        assert compact(filled, shards=[4, 2]).shards == (2, 4)
        assert [len(filled.snapshot().manifest.files(shard)) for shard in (2, 4)] == [1, 1]
        assert len(filled.snapshot().manifest.files(3)) > 1


def when_built(work: Callable[[], object], num_shards: int = 8) -> Callable[[int, int], None]:
    """A progress that does `work` between the building of the last file and the commit."""

    def progress(done: int, total: int) -> None:
        assert total == num_shards
        if done == total:
            work()

    return progress


class TestBesideOthers:
    def test_a_key_that_gets_another_uri_meanwhile_is_no_collision(self, store: FeatureStore, make_rows) -> None:
        rows = make_rows(40, store.info)
        store.put(rows)
        store.put(make_rows(40, store.info, seed=2))
        other = FeatureRows.of(["other"], rows.features_ND[:1], keys=rows.keys_N[:1])

        def meanwhile() -> None:
            store.delete(rows.keys_N[:1])
            store.put(other)

        compact(store, progress=when_built(meanwhile))
        shard = int(shard_of(rows.keys_N[:1], 8)[0])
        live = read_shard(store.snapshot(), shard)
        assert live.uris[live.keys_N.tolist().index(rows.keys_N[0])] == "other"

    def test_another_compaction_was_first(self, filled: FeatureStore) -> None:
        before = filled.snapshot()
        with pytest.raises(CommitConflictError, match="read the newest snapshot and retry"):
            compact(filled, progress=when_built(lambda: compact(filled)))
        assert filled.snapshot().version == 5
        assert_same(before, filled.snapshot())
        assert data_files(filled) == needs(before) | needs(filled.snapshot()), "files of the loser stay"

    def test_of_two_that_share_some_shards_each_does_its_part(self, filled: FeatureStore) -> None:
        before = filled.snapshot()
        report = compact(filled, progress=when_built(lambda: compact(filled, shards=[1, 2])))
        assert (report.version, report.shards, report.lost) == (6, (0, 3, 4, 5, 6, 7), (1, 2))
        assert filled.snapshot().manifest.num_files == 8
        assert_same(before, filled.snapshot())
        assert data_files(filled) == needs(before) | needs(filled.snapshot()), "files of the loser stay"


def test_a_flipped_bit_never_gets_into_the_new_file(filled: FeatureStore) -> None:
    entry = filled.snapshot().manifest.files(5)[1]
    path = Path(filled.url) / entry.path
    for byte in range(0, entry.bytes, entry.bytes // 40):
        spoil(filled, entry.path, byte)
        with pytest.raises(CorruptFileError, match=entry.path):
            compact(filled, shards=[5])
        spoil(filled, entry.path, byte)
    path.unlink()
    with pytest.raises(CorruptFileError, match="missing"):
        compact(filled, shards=[5])
    assert filled.snapshot().version == 4


class TestBlockByBlock:
    @pytest.fixture
    def small_blocks(self, monkeypatch: pytest.MonkeyPatch, info: StoreInfo) -> None:
        monkeypatch.setattr("featurestore.format.datafile.BLOCK_BYTES", 5 * info.row_bytes)
        for module in ("upkeep.compaction", "format.datafile"):
            monkeypatch.setattr(f"featurestore.{module}.row_group_rows", lambda *_: 7)

    def test_results_are_identical(self, filled: FeatureStore, small_blocks: None) -> None:
        before = filled.snapshot()
        compact(filled)
        assert_same(before, filled.snapshot())
        entry = filled.snapshot().manifest.files(1)[0]
        groups = pq.ParquetFile(Path(filled.url) / entry.path).metadata
        assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups - 1)] == [7] * (entry.rows // 7)

    def test_a_file_is_read_as_its_rows_are_needed(
        self, tmp_path: Path, info: StoreInfo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not the whole of it before the first block is there: else memory would grow with the shard."""
        wide = info.model_copy(update={"num_shards": 1, "dim": 512})
        store = FeatureStore.create(tmp_path / "wide", wide)
        monkeypatch.setattr("featurestore.format.datafile.BLOCK_BYTES", 100 * wide.row_bytes)
        chance = np.random.default_rng(0)
        names = [f"{i}" for i in range(4000)]
        for module in ("upkeep.compaction", "format.datafile"):
            monkeypatch.setattr(f"featurestore.{module}.row_group_rows", lambda *_: 100)
        store.put(FeatureRows.of(names, chance.integers(0, 0x4000, (4000, 512)).astype(np.uint16)))
        store.put(FeatureRows.of(names[:9], chance.integers(0, 0x4000, (9, 512)).astype(np.uint16)))
        num_read = 0

        class Counted(io.FileIO):
            def read(self, size: int | None = -1) -> bytes:
                nonlocal num_read
                data = super().read(size)
                num_read += len(data)
                return data

        counting = faulty(store, open_input=lambda _, path: Counted(f"{store.url}/{path}"))
        reader = counting.snapshot().shard_reader(0)
        assert len(reader.keys()) == 4000
        num_read = 0
        monkeypatch.setattr("featurestore.upkeep.compaction.check_digest", lambda *arguments: None)
        blocks = merged_blocks(reader)
        assert len(next(blocks)) == 100
        size_bytes = sum(entry.bytes for entry in reader.entries)
        assert 0 < num_read < size_bytes / 4
        assert sum(map(len, blocks)) == 3900 and num_read > size_bytes * 0.9


class TestCommand:
    def test_it_says_what_it_did(self, filled: FeatureStore) -> None:
        num_files, before = filled.snapshot().manifest.num_files, [entry.path for entry in filled.storage.entries()]
        dry = run("compact", filled.url, "--dry-run").output
        assert dry.startswith(f"would compact 8 shards of {num_files} files, ")
        assert [entry.path for entry in filled.storage.entries()] == before
        done = run("compact", filled.url).output
        assert done.startswith("snapshot 5: 8 shards of ") and "became 8 files, " in done
        assert run("compact", filled.url).output == "nothing to compact in snapshot 5\n"
