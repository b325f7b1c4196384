"""Compaction changes nothing that a reader can see, and takes nothing away from other writers."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from featurestore import FeatureRows, FeatureStore, StoreInfo, shard_of
from featurestore.errors import CommitConflictError, CorruptFileError
from featurestore.problems import Problem
from featurestore.spec import FileEntry
from featurestore.store import Snapshot
from featurestore.upkeep.compaction import compact, merged_blocks, needs_compaction
from tests.faulty import faulty
from tests.featurestore.conftest import make_rows, put
from tests.featurestore.contents import metadata_of, needs, paths_in, run, spoil
from tests.raised import raises

pytestmark = pytest.mark.long


def assert_same(old: Snapshot, new: Snapshot) -> None:
    assert np.array_equal(old.keys(), new.keys()) and old.num_rows == new.num_rows
    assert np.array_equal(old.get(old.keys()), new.get(old.keys())) and metadata_of(old).equals(metadata_of(new))
    mine, theirs = old.statistics(), new.statistics()
    assert mine.count == theirs.count
    np.testing.assert_allclose(mine.mean_D, theirs.mean_D, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(mine.std_D, theirs.std_D, rtol=1e-6)


def test_it_reports_what_became_of_the_files(filled: FeatureStore) -> None:
    """`StoreMachine` says that results are identical, after any order of commits, in blocks of some rows."""
    before = filled.snapshot()
    report = compact(filled)
    after = filled.snapshot()
    assert report.version == after.version == before.version + 1
    assert after.manifest.operation == "compact"
    assert [(len(files), files[0].kind, files[0].num_deleted) for files in after.manifest.shards.values()] == [
        (1, "base", 0)
    ] * 8
    assert (report.num_files_before, report.num_files_after) == (before.manifest.num_files, 8)
    assert (report.num_bytes_before, report.num_bytes_after) == (before.manifest.file_bytes, after.manifest.file_bytes)
    assert_same(before, after)
    assert compact(filled, force=True).shards == () and filled.snapshot().version == after.version


def test_an_empty_store_and_one_that_is_compact_get_no_commit(store: FeatureStore) -> None:
    assert compact(store).version == 0
    put(store, 50)
    assert compact(store, force=True).version == 1 == store.snapshot().version


class TestWhatIsDue:
    @pytest.mark.parametrize(
        ("base", "deltas", "is_due"),
        [(10**6, [1] * 8, False), (10**6, [1] * 9, True), (75, [25], False), (75, [26], True), (75, [], False)],
    )
    def test_more_than_8_deltas_or_a_quarter_of_the_bytes(self, base: int, deltas: list[int], is_due: bool) -> None:
        entry = FileEntry(
            path="p", bytes=1, rows=1, num_deleted=0, sha256="", xxh3_128="", kind="delta", info_digest="",
            statistics_path=None, statistics_sha256=None,
        )  # fmt: skip
        assert needs_compaction([entry.model_copy(update={"bytes": size}) for size in (base, *deltas)]) == is_due

    def test_only_what_is_due_is_done_unless_forced(self, store: FeatureStore) -> None:
        rows = put(store, 3000)
        put(store, ["images/5.jpg"], seed=2)
        assert compact(store).shards == ()
        shard = int(shard_of(rows.keys_N[5:6], 8)[0])
        assert compact(store, force=True).shards == (shard,)

    def test_force_takes_tombstones_out_of_a_single_file(self, store: FeatureStore) -> None:
        store.delete(make_rows(40, store.info).keys_N)
        assert compact(store).shards == ()
        assert len(compact(store, force=True).shards) == 8
        assert store.snapshot().manifest.shards == {}

    def test_chosen_shards(self, filled: FeatureStore) -> None:
        assert compact(filled, shards=[4, 2]).shards == (2, 4)
        assert [len(filled.snapshot().manifest.files(shard)) for shard in (2, 4)] == [1, 1]
        assert len(filled.snapshot().manifest.files(3)) > 1


@pytest.mark.parametrize("shards", [[1, 2], None], ids=["some", "all"])
def test_of_two_that_share_shards_each_does_its_part(filled: FeatureStore, shards: list[int] | None) -> None:
    """Histories in tests/simulated have what else others may do meanwhile."""
    before = filled.snapshot()

    def other(done: int, total: int) -> None:
        if done == total:  # between the building of the last file and the commit
            compact(filled, shards=shards)

    if shards is None:
        with raises(CommitConflictError, Problem.REPLACED_MEANWHILE):
            compact(filled, progress=other)
    else:
        report = compact(filled, progress=other)
        assert (report.version, report.shards, report.lost) == (5, (0, 3, 4, 5, 6, 7), (1, 2))
    assert filled.snapshot().manifest.num_files == 8
    assert_same(before, filled.snapshot())
    assert paths_in(filled, "data") == needs(before) | needs(filled.snapshot()), "files of the loser stay"


def test_a_key_that_gets_another_uri_meanwhile_is_no_collision(filled: FeatureStore) -> None:
    key = filled.snapshot().keys()[:1]
    other = FeatureRows.of(["other"], np.zeros((1, 8), np.uint16), keys=key)

    def meanwhile(done: int, total: int) -> None:
        if done == total:
            filled.delete(key)
            filled.put(other)

    compact(filled, progress=meanwhile)
    shard = int(shard_of(key, 8)[0])
    assert filled.snapshot().shard_reader(shard).uris(key)[1] == ["other"]


def test_a_flipped_bit_never_gets_into_the_new_file(filled: FeatureStore) -> None:
    entry = filled.snapshot().manifest.files(5)[1]
    path = Path(filled.url) / entry.path
    for byte in range(0, entry.bytes, entry.bytes // 40):
        spoil(filled, entry.path, byte)
        with pytest.raises(CorruptFileError) as caught:
            compact(filled, shards=[5])
        assert caught.value.values["where"] == str(path)
        spoil(filled, entry.path, byte)
    path.unlink()
    with raises(CorruptFileError, Problem.MISSING, where=path):
        compact(filled, shards=[5])
    assert filled.snapshot().version == 3


def test_a_file_is_read_as_rows_are_needed(tmp_path: Path, info: StoreInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the whole of it before the first block is there: else memory would grow with the shard."""
    wide = info.model_copy(update={"num_shards": 1, "dim": 512})
    store = FeatureStore.create(tmp_path / "wide", wide)
    monkeypatch.setattr("featurestore.format.datafile.BLOCK_BYTES", 100 * wide.row_bytes)
    for module in ("upkeep.compaction", "format.datafile"):
        monkeypatch.setattr(f"featurestore.{module}.row_group_rows", lambda *_: 100)
    put(store, 4000)
    put(store, 9, seed=1)
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
    with monkeypatch.context() as patch:
        patch.setattr("featurestore.upkeep.compaction.check_digest", lambda *arguments: None)
        blocks = merged_blocks(reader)
        assert len(next(blocks)) == 100
        size_bytes = sum(entry.bytes for entry in reader.entries)
        assert 0 < num_read < size_bytes / 4
        assert sum(map(len, blocks)) == 3900 and num_read > size_bytes * 0.9
    compact(store, force=True)
    groups = pq.ParquetFile(Path(store.url) / store.snapshot().manifest.files(0)[0].path).metadata
    assert [groups.row_group(number).num_rows for number in range(groups.num_row_groups)] == [100] * 40


def test_the_command_says_what_it_did(filled: FeatureStore) -> None:
    num_files, before = filled.snapshot().manifest.num_files, paths_in(filled)
    dry = run("compact", filled.url, "--dry-run").output
    assert dry.startswith(f"would compact 8 shards of {num_files} files, ")
    assert paths_in(filled) == before
    done = run("compact", filled.url).output
    assert done.startswith("snapshot 4: 8 shards of ") and "became 8 files, " in done
    assert run("compact", filled.url).output == "nothing to compact in snapshot 4\n"
