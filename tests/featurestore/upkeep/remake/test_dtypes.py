"""A store in another dtype: every row, one commit, a report that is right, and a remake that continues after a kill."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from featurestore import FeatureRows, FeatureStore, QuarantineRow, StoreInfo
from featurestore.__main__ import app
from featurestore.errors import (
    CommitConflictError,
    CorruptFileError,
    InvalidRowsError,
    SnapshotNotFoundError,
    StorageError,
    StoreExistsError,
    UnsafeBackendError,
)
from featurestore.spec import FileEntry
from featurestore.storage.storage import Storage
from featurestore.text import DType
from featurestore.upkeep import remake as module
from featurestore.upkeep.remake import read_report, remake, sample
from featurestore.upkeep.verify import verify
from tests.featurestore.upkeep.remake.killed import kill_at
from tests.metadata import metadata_of

pytestmark = pytest.mark.long

DIM = 32


def drawn(count: int, seed: int = 0) -> np.ndarray:
    """Rows that have neighbours, as features have."""
    draw = np.random.default_rng(seed)
    return (draw.standard_normal((count, 6)) @ draw.standard_normal((6, DIM))).astype(np.float32) + 1


def rows_of(first: int, count: int, seed: int = 0) -> FeatureRows:
    return FeatureRows.of(
        [f"{i}.jpg" for i in range(first, first + count)],
        drawn(count, seed),
        content_digests=[i.to_bytes(15, "big") + b"\0" for i in range(first, first + count)],
        source_tags=[f"tag-{i}" for i in range(first, first + count)],
        widths=np.arange(count),
        heights=np.arange(count) + 1,
    )


@pytest.fixture
def source(tmp_path: Path, info: StoreInfo) -> FeatureStore:
    """Three snapshots: 900 rows, 50 of them replaced, 30 others deleted."""
    store = FeatureStore.create(tmp_path / "source", info.model_copy(update={"dim": DIM, "dtype": "float32"}))
    rows = rows_of(0, 900)
    store.put(rows)
    store.put(rows_of(100, 50, seed=1))
    store.delete(rows.keys_N[500:530])
    return store


def all_of(store: FeatureStore) -> tuple[np.ndarray, np.ndarray]:
    snapshot = store.snapshot()
    return snapshot.keys(), store.codec.decode(snapshot.get(snapshot.keys()))


def cli(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_live_row_is_there_in_one_snapshot(source: FeatureStore, tmp_path: Path, dtype: DType) -> None:
    source.add_quarantine([QuarantineRow(1, "bad.jpg", "truncated", 0.0)])
    seen: list[tuple[int, int]] = []
    report = remake(source, tmp_path / "new", dtype=dtype, progress=lambda done, total: seen.append((done, total)))
    new = FeatureStore.open(tmp_path / "new")
    snapshot = new.snapshot()
    assert snapshot.version == 1 and report.num_rows == snapshot.num_rows == snapshot.manifest.file_rows == 870
    assert all(len(files) == 1 and files[0].kind == "base" for files in snapshot.manifest.shards.values())
    assert seen == [(n, 8) for n in range(1, 9)]
    assert metadata_of(snapshot).equals(metadata_of(source.snapshot()))
    keys, values = all_of(source)
    assert np.array_equal(new.snapshot().get(keys), new.codec.encode(values))
    same_kind = new.info.model_copy(update={"dtype": "float32"}).kind
    assert same_kind == source.info.kind and new.quarantine_rows() == source.quarantine_rows()
    assert new.storage.list("staging/remake") == [] and verify(new).problems == []


def test_the_report_measures_what_was_lost(source: FeatureStore, tmp_path: Path) -> None:
    """All rows are compared here, so the figures can be worked out again from all rows."""
    report = remake(source, tmp_path / "small", dtype="bfloat16")
    small = FeatureStore.open(tmp_path / "small")
    keys, exact = all_of(source)
    kept = small.codec.decode(small.snapshot().get(keys)).astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1)
    errors = np.linalg.norm(exact - kept, axis=1) / lengths
    assert report.accuracy.num_compared == 870 and report.accuracy.num_queries == 87
    assert report.accuracy.relative_error_mean == pytest.approx(errors.mean(), rel=1e-4)
    assert report.accuracy.relative_error_p99 == pytest.approx(np.percentile(errors, 99), rel=1e-4)
    assert report.accuracy.recall_at_10 is not None and report.accuracy.recall_at_10 > 0.97
    assert report.bytes == small.snapshot().manifest.file_bytes and read_report(small.storage) == report
    exact_report = remake(source, tmp_path / "copy", dtype="float32")
    assert exact_report.accuracy.recall_at_10 == 1 and exact_report.accuracy.relative_error_p99 == 0
    remake(small, tmp_path / "back", dtype="float32")
    assert np.array_equal(all_of(FeatureStore.open(tmp_path / "back"))[1], kept)


def test_a_sample_is_of_live_rows_and_reads_from_many_shards(source: FeatureStore) -> None:
    snapshot = source.snapshot()
    keys, values = sample(snapshot, 100, seed=1)
    assert len(np.unique(keys)) == len(keys) == 100
    assert np.array_equal(values, snapshot.get(keys))
    other, _ = sample(snapshot, 100, seed=2)
    assert len(np.intersect1d(keys, other)) < 50
    assert len(sample(snapshot, 5000, seed=1)[0]) == 870


def test_a_remake_that_was_cut_off_continues(
    source: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = module.write_shard_file, []

    def fails_in_the_fifth(storage: Storage, info: StoreInfo, shard: int, *rest: object) -> object:
        if len(written) == 4:
            raise StorageError("the disk is full")
        entry = write(storage, info, shard, *rest)  # type: ignore[arg-type]
        written.append(shard)
        return entry

    monkeypatch.setattr(module, "write_shard_file", fails_in_the_fifth)
    with pytest.raises(StorageError, match="full"):
        remake(source, tmp_path / "new", dtype="bfloat16", threads=1)
    monkeypatch.setattr(module, "write_shard_file", write)
    new = FeatureStore.open(tmp_path / "new")
    assert new.snapshot().version == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "new" / "data").rglob("*.parquet")}
    assert len(before) == 4
    keys, values = all_of(source)
    source.put(rows_of(2000, 10))  # the snapshot that was begun with is kept to
    for wrong in ({"dtype": "float16"}, {"dtype": "bfloat16", "version": 1}):
        with pytest.raises(StoreExistsError, match=r"becoming a store of snapshot 3 .* as bfloat16"):
            remake(source, tmp_path / "new", **wrong)
    seen: list[int] = []
    report = remake(source, tmp_path / "new", dtype="bfloat16", progress=lambda done, _: seen.append(done))
    assert seen == [5, 6, 7, 8] and report.source_version == 3
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "new" / "data").rglob("*.parquet")}
    assert before.items() <= after.items() and len(after) == 8
    assert np.array_equal(new.snapshot().keys(), keys)
    assert np.array_equal(new.snapshot().get(keys), new.codec.encode(values))


def test_cut_off_after_the_commit(source: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(module, "measure_accuracy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remake(source, tmp_path / "new", dtype="bfloat16")
    new = FeatureStore.open(tmp_path / "new")
    assert new.snapshot().version == 1
    report = remake(source, tmp_path / "new", dtype="bfloat16")
    assert new.snapshot().version == 1 and report.num_rows == 870 and new.storage.list("staging/remake") == []


@pytest.mark.long
def test_kill_9_again_and_again(source: FeatureStore, tmp_path: Path) -> None:
    """Before the store is made, between a shard's file and the note of it, and after the commit."""
    call, methods = partial(remake, dtype="bfloat16", threads=1), ("create_exclusive", "open_output")
    for prefix, writes, num_noted in (("store.json", 0, 0), ("staging/remake/shard", 3, 3), ("reports", 0, 8)):
        kill_at(prefix, writes, source.url, str(tmp_path / "new"), call, methods)
        assert len(list((tmp_path / "new").rglob("shard-*.json"))) == num_noted
    assert remake(source, tmp_path / "new", dtype="bfloat16").num_rows == 870
    new = FeatureStore.open(tmp_path / "new")
    keys, values = all_of(source)
    assert new.snapshot().version == 1 and np.array_equal(new.snapshot().keys(), keys)
    assert np.array_equal(new.snapshot().get(keys), new.codec.encode(values))
    assert verify(new).problems == [] and new.storage.list("staging/remake") == []


def test_finished_is_finished_and_another_store_is_not_touched(source: FeatureStore, tmp_path: Path) -> None:
    report = remake(source, tmp_path / "new", dtype="bfloat16")
    files = sorted((tmp_path / "new").rglob("*"))
    assert remake(source, tmp_path / "new", dtype="bfloat16") == report
    with pytest.raises(StoreExistsError, match=r"made of snapshot 3 of .*source as bfloat16"):
        remake(source, tmp_path / "new", dtype="float16")
    source.put(rows_of(2000, 10))
    with pytest.raises(StoreExistsError, match="made of snapshot 3"):
        remake(source, tmp_path / "new", dtype="bfloat16")
    with pytest.raises(StoreExistsError, match="the source itself"):
        remake(source, source.url, dtype="bfloat16")
    with pytest.raises(SnapshotNotFoundError, match="9"):
        remake(source, tmp_path / "more", dtype="bfloat16", version=9)
    assert sorted((tmp_path / "new").rglob("*")) == files
    assert remake(source, tmp_path / "first", dtype="bfloat16", version=1).num_rows == 900


def test_rows_put_before_the_end_are_not_overwritten(
    source: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module.write_shard_file

    def others_put(storage: Storage, info: StoreInfo, shard: int, *arguments: Any) -> FileEntry:
        if shard == 7:
            FeatureStore.open(storage.url).put(rows_of(0, 5, seed=9))
        return write(storage, info, shard, *arguments)

    monkeypatch.setattr(module, "write_shard_file", others_put)
    with pytest.raises(CommitConflictError, match="other rows before its remake was done"):
        remake(source, tmp_path / "new", dtype="bfloat16")
    new = FeatureStore.open(tmp_path / "new")
    assert new.snapshot().num_rows == 5


def test_what_cannot_be_remade_is_said(source: FeatureStore, tmp_path: Path, info: StoreInfo) -> None:
    large = rows_of(3000, 1)
    large.features_ND[0, 4] = 1e6
    source.put(large)
    with pytest.raises(InvalidRowsError, match=r"3000\.jpg and others have numbers that float16 cannot hold"):
        remake(source, tmp_path / "half", dtype="float16")
    empty = FeatureStore.create(tmp_path / "empty", info)
    report = remake(empty, tmp_path / "bits", dtype="float32")
    assert report.num_rows == 0 and report.accuracy.recall_at_10 is None and report.accuracy.relative_error_p99 is None
    entry = source.snapshot().manifest.files(2)[0]
    data = bytearray(source.storage.read_bytes(entry.path))
    data[len(data) // 2] ^= 4
    source.storage.write_bytes(entry.path, bytes(data))
    with pytest.raises(CorruptFileError, match=re.escape(entry.path)):
        remake(source, tmp_path / "broken", dtype="bfloat16")
    assert FeatureStore.open(tmp_path / "broken").snapshot().version == 0


def test_an_unsafe_place_is_refused_before_anything_is_written(
    source: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Storage) -> None:
        raise UnsafeBackendError("two were told that they were first")

    for name in ("store", "upkeep.remake"):
        monkeypatch.setattr(f"featurestore.{name}.refuse_unsafe", refuse, raising=False)
    with pytest.raises(UnsafeBackendError):
        remake(source, tmp_path / "new", dtype="bfloat16")
    assert Storage(tmp_path / "new").entries() == []


@pytest.mark.parametrize("place", ["memory_url", "s3_url"])
def test_in_object_stores_and_rows_of_zeros(place: str, request: pytest.FixtureRequest, info: StoreInfo) -> None:
    url = request.getfixturevalue(place)
    source = FeatureStore.create(f"{url}/source", info)
    source.put(FeatureRows.of([f"{i}" for i in range(30)], np.zeros((30, info.dim), np.float32)))
    report = remake(source, f"{url}/small", dtype="bfloat16")
    assert report.accuracy.relative_error_p99 is None and report.accuracy.relative_error_mean is None
    new = FeatureStore.open(f"{url}/small")
    assert new.snapshot().num_rows == 30 and new.storage.list("staging/remake") == []
    assert not all_of(new)[1].any() and not new.snapshot().statistics().std_D.any()
    assert remake(source, f"{url}/small", dtype="bfloat16") == report


def test_the_command(source: FeatureStore, tmp_path: Path) -> None:
    code, output = cli("remake", source.url, tmp_path / "new", "--dtype", "bfloat16")
    assert code == 0, output
    table = {cells[0]: cells[1:] for line in output.splitlines() if (cells := re.findall(r"[^│┃]+(?=[│┃])", line))}
    shown = {name.strip(): [cell.strip() for cell in cells] for name, cells in table.items()}
    report = read_report(Storage(tmp_path / "new"))
    assert report is not None
    assert shown["rows"] == ["870", "870"] and shown["bytes"] == [f"{report.source_bytes:,}", f"{report.bytes:,}"]
    assert shown["relative error, mean"] == ["", f"{report.accuracy.relative_error_mean:.6f}"]
    assert shown["10 nearest neighbours found again"] == ["", f"{report.accuracy.recall_at_10:.6f}"]
    assert "compared 870 rows, 87 of them as queries" in output
    new = FeatureStore.open(tmp_path / "new")
    key = int(new.snapshot().keys()[0])
    code, output = cli("get", new.url, "--out", tmp_path / "row.npy", "--", key)
    assert code == 0, output
    assert np.array_equal(np.load(tmp_path / "row.npy"), new.codec.decode(new.snapshot().get([key])))
    assert cli("verify", new.url)[0] == 0
    code, output = cli("remake", source.url, new.url, "--dtype", "float16")
    assert code == 2 and output.startswith("error: ") and len(output.splitlines()) == 1
    for wrong in (["--dtype", "int4"], ["--dims", "0"]):
        assert cli("remake", source.url, tmp_path / "other", *wrong)[0] == 2
    code, output = cli("remake", "--help")
    assert code == 0 and "Example" in output
