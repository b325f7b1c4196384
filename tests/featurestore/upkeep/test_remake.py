"""Stores made of another one, in another dtype or compact: every row, one commit, and one begun again after a kill."""

import hashlib
import json
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
from threadpoolctl import threadpool_limits

from featurestore import FeaturePartition, FeatureRows, FeatureStore, QuarantineRow, StoreInfo, errors
from featurestore.problems import Problem
from featurestore.spec import FileEntry
from featurestore.storage.storage import Storage
from featurestore.text import DType
from featurestore.upkeep import remake as module
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.remake import CoMoments, principal_components, read_report, remake, sample
from featurestore.upkeep.verify import verify
from tests.featurestore.conftest import INFO, make_rows, put
from tests.featurestore.contents import metadata_of, run, spoil
from tests.raised import raises

pytestmark = pytest.mark.long

DIM, ROWS = 40, 600


def drawn(count: int, seed: int = 0) -> np.ndarray:
    """Rows far from zero that vary along a few directions, and a little along all."""
    draw = np.random.default_rng(seed)
    directions = np.random.default_rng(99).standard_normal((8, DIM)) * np.geomspace(4, 0.3, 8)[:, None]
    rows = draw.standard_normal((count, 8)) @ directions + 0.05 * draw.standard_normal((count, DIM)) + 20
    return rows.astype(np.float32)


def rows_of(first: int, count: int, seed: int = 0) -> FeatureRows:
    return replace(make_rows(count, INFO, seed, first), features_ND=drawn(count, seed))


@pytest.fixture
def store(tmp_path: Path, info: StoreInfo) -> FeatureStore:
    return FeatureStore.create(tmp_path / "source", info.model_copy(update={"dim": DIM, "dtype": "float32"}))


@pytest.fixture
def source(filled_by: Callable[..., FeatureStore]) -> FeatureStore:
    """Three snapshots: 600 rows, 50 of them replaced, 30 others deleted."""

    def three_commits(store: FeatureStore) -> None:
        rows = rows_of(0, ROWS)
        store.put(rows)
        store.put(rows_of(100, 50, seed=1))
        store.delete(rows.keys_N[500:530])

    return filled_by(three_commits)


def full_rows(store: FeatureStore) -> tuple[np.ndarray, np.ndarray]:
    keys = store.snapshot().keys()
    return keys, store.codec.decode(store.snapshot().get(keys))


@pytest.mark.parametrize("panel", [512, 16])
def test_components_are_those_of_an_svd(source: FeatureStore, monkeypatch: pytest.MonkeyPatch, panel: int) -> None:
    monkeypatch.setattr(module, "_PANEL", panel)
    _, values = full_rows(source)
    exact = values.astype(np.float64)
    centred = exact - exact.mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    basis = principal_components(source.snapshot(), 12)
    np.testing.assert_allclose(basis.mean_D, exact.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(basis.spectrum_K, singular[:12] ** 2 / len(values), rtol=1e-10)
    np.testing.assert_allclose(np.abs(basis.components_KD @ directions[:12].T), np.eye(12), atol=1e-7)
    np.testing.assert_allclose(basis.components_KD @ basis.components_KD.T, np.eye(12), atol=1e-13)
    np.testing.assert_allclose(basis.origin.total_variance, centred.var(axis=0).sum(), rtol=1e-12)
    largest = np.take_along_axis(basis.components_KD, np.abs(basis.components_KD).argmax(axis=1)[:, None], 1)
    assert (largest > 0).all() and basis.origin.num_rows == ROWS - 30


def test_a_compaction_changes_no_bit_of_the_components(source: FeatureStore) -> None:
    before = principal_components(source.snapshot(), 12)
    compact(source, force=True)
    after = principal_components(source.snapshot(), 12)
    assert np.array_equal(before.components_KD, after.components_KD) and np.array_equal(before.mean_D, after.mean_D)


def test_rows_are_streamed_with_the_same_bits(tmp_path: Path, info: StoreInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40,000 rows of 320 numbers, whose products BLAS would divide among threads, what is held is the matrix, the
    keys and some blocks of 64 rows: not the 51 MB that all rows are."""
    kind = {"dim": 320, "dtype": "float32", "num_shards": 4}
    wide = FeatureStore.create(tmp_path / "wide", info.model_copy(update=kind))
    put(wide, 40_000)
    with threadpool_limits(1, "blas"):
        alone = principal_components(wide.snapshot(), 12, threads=1)
    with threadpool_limits(2, "blas"):
        shared = principal_components(wide.snapshot(), 12, threads=2)
    assert alone.to_bytes() == shared.to_bytes()
    monkeypatch.setattr("featurestore.upkeep.compaction.row_group_rows", lambda *_: 64)
    snapshot, add, in_arrow = wide.snapshot(), CoMoments.add, [pa.total_allocated_bytes()]

    def noted(moments: CoMoments, values_ND: np.ndarray) -> None:
        in_arrow.append(pa.total_allocated_bytes())
        add(moments, values_ND)

    monkeypatch.setattr(CoMoments, "add", noted)
    tracemalloc.start()
    try:
        principal_components(snapshot, 12, threads=2)
        _, in_numpy = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(in_arrow) > 150
    assert in_numpy + max(in_arrow) - in_arrow[0] < 32e6


def test_the_basis_is_what_the_page_of_the_format_says(source: FeatureStore, tmp_path: Path) -> None:
    """docs/FORMAT.md alone is enough to read it."""
    remake(source, tmp_path / "new", dims=8, dtype="float32")
    fields = json.loads((tmp_path / "new" / "store.json").read_bytes())["reduction"]
    data = (tmp_path / "new" / fields["path"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == fields["sha256"] == Path(fields["path"]).stem
    assert fields["full_dim"] == DIM
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    arrays = {}
    for name in ("mean", "components", "spectrum"):
        start, end = header[name]["data_offsets"]
        raw = data[8 + header_bytes + start : 8 + header_bytes + end]
        assert header[name]["dtype"] == "F64"
        arrays[name] = np.frombuffer(raw, "<f8").reshape(header[name]["shape"])
    keys, values = full_rows(source)
    coordinates = (values - arrays["mean"]) @ arrays["components"].T
    stored = FeatureStore.open(tmp_path / "new").snapshot().get(keys)
    np.testing.assert_array_equal(stored, coordinates.astype(np.float32))
    np.testing.assert_allclose(arrays["spectrum"], coordinates.var(axis=0), rtol=1e-9)
    origin = json.loads(header["__metadata__"]["origin"])
    assert origin["store_id"] == source.info.store_id and origin["num_rows"] == len(keys) and origin["version"] == 3
    assert origin["extractor"] == source.info.extractor.model_dump() and origin["total_variance"] > 0


def test_mistakes_are_named(source: FeatureStore, tmp_path: Path, info: StoreInfo) -> None:
    def refused(problem: Problem, store: FeatureStore = source, dims: int = 8, place: str = "new", **told: Any) -> None:
        kind = errors.StoreExistsError if place != "new" else errors.InvalidRowsError
        with raises(kind, problem, **{"where": store.url, **told}):
            remake(store, tmp_path / place, dims=dims)
        assert not (tmp_path / "new").exists() or Storage(tmp_path / "new").entries() == []

    refused(Problem.TOO_MANY_DIMS, dims=41, value=41, dim=40)
    refused(Problem.IS_THE_SOURCE, place="source")
    refused(Problem.INSIDE_THE_SOURCE, place="source/data/small", where=tmp_path / "source/data/small")
    empty = FeatureStore.create(tmp_path / "empty", source.info.model_copy(update={"store_id": ""}))
    refused(Problem.TOO_FEW_ROWS, empty, rows=0)
    empty.put(rows_of(0, 6))
    refused(Problem.TOO_FEW_ROWS, empty, 6, value=6, rows=6, limit=5)
    flat = FeatureStore.create(tmp_path / "flat", info.model_copy(update={"dim": DIM, "dtype": "float32"}))
    flat.put(FeatureRows.of([f"{i}" for i in range(50)], np.ones((50, DIM), np.float32)))
    refused(Problem.TOO_FEW_DIRECTIONS, flat, limit=0)
    plane = FeatureStore.create(tmp_path / "plane", info.model_copy(update={"dim": DIM, "dtype": "float32"}))
    two = np.random.default_rng(0).integers(-8, 8, (50, 2)).astype(np.float32)
    plane.put(FeatureRows.of([f"{i}" for i in range(50)], np.tile(two, DIM // 2)))
    refused(Problem.TOO_FEW_DIRECTIONS, plane, 3, value=3, limit=2)
    assert remake(plane, tmp_path / "plane2", dims=2).variance_kept == pytest.approx(1)
    found = {"where": tmp_path / "plane2", "value": "float32, 2 of 40 numbers"}
    with raises(errors.InvalidRowsError, Problem.COMPACT_ALREADY, **found):
        remake(FeatureStore.open(tmp_path / "plane2"), tmp_path / "plane1", dims=1)


def test_rows_of_two_bases_never_mix(source: FeatureStore, tmp_path: Path) -> None:
    remake(source, tmp_path / "a", dims=8)
    source.put(rows_of(2000, 40, seed=5))
    remake(source, tmp_path / "b", dims=8)
    a, b = FeatureStore.open(tmp_path / "a"), FeatureStore.open(tmp_path / "b")
    assert (a.info.dim, a.info.dtype, a.info.extractor) == (b.info.dim, b.info.dtype, b.info.extractor)
    entry = b.snapshot().manifest.entries[0]
    shard = next(shard for shard, files in b.snapshot().manifest.shards.items() if entry in files)
    (tmp_path / "a" / entry.path).write_bytes((tmp_path / "b" / entry.path).read_bytes())
    differs = re.compile(r"reduction\.sha256 is .* instead of")
    with raises(errors.SpecMismatchError, Problem.ANOTHER_KIND, value=differs):
        a.commit({shard: entry}, "copied")
    with raises(errors.SpecMismatchError, Problem.ANOTHER_KIND, where=re.compile(a.url), value=differs):
        FeatureStore.open_or_create(a.url, b.info)
    manifest = b.snapshot().manifest
    a.storage.write_bytes("log/00000000000000000002.json", b.storage.read_bytes(f"log/{manifest.version:020}.json"))
    with pytest.raises((errors.SpecMismatchError, errors.CorruptFileError)):
        FeaturePartition.load(a.url, rank=0, num_ranks=1, cache_dir=tmp_path / "cache")
    made = {"version": 3, "source": source.url, "value": "float32, 8 of 40 numbers"}
    with raises(errors.StoreExistsError, Problem.OTHER_ROWS_IN_THE_WAY, where=a.url, **made):
        remake(source, tmp_path / "a", dims=8)
    with raises(errors.StoreExistsError, Problem.OTHER_ROWS_IN_THE_WAY, where=b.url):
        remake(source, tmp_path / "b", dims=9)


def test_a_compact_store_in_another_dtype_has_the_same_basis(source: FeatureStore, tmp_path: Path) -> None:
    remake(source, tmp_path / "a", dims=8)
    report = remake(FeatureStore.open(tmp_path / "a"), tmp_path / "b", dtype="float16")
    a, b = FeatureStore.open(tmp_path / "a"), FeatureStore.open(tmp_path / "b")
    assert a.info.reduction == b.info.reduction and b.info.dtype == "float16" and report.num_rows == ROWS - 30
    assert a.basis is not None and b.basis is not None and a.basis.to_bytes() == b.basis.to_bytes()
    assert verify(b).problems == []


def test_the_command_says_what_is_kept(source: FeatureStore, tmp_path: Path) -> None:
    output = run("remake", source.url, tmp_path / "new", "--dims", 8, "--dtype", "float16").output
    table = {cells[0]: cells[1:] for line in output.splitlines() if (cells := re.findall(r"[^│┃]+(?=[│┃])", line))}
    shown = {name.strip(): [cell.strip() for cell in cells] for name, cells in table.items()}
    report = read_report(Storage(tmp_path / "new"))
    assert report is not None
    assert shown["numbers of a row"] == ["40", "8"] and shown["bytes of a row, as a share"] == ["1", "0.1000"]
    assert shown["rows"] == ["570", "570"] and shown["bytes"] == [f"{report.source_bytes:,}", f"{report.bytes:,}"]
    assert shown["variance kept"] == ["", f"{report.variance_kept:.4%}"]
    assert shown["relative error, mean"] == ["", f"{report.accuracy.relative_error_mean:.6f}"]
    assert shown["10 nearest neighbours found again"] == ["", f"{report.accuracy.recall_at_10:.6f}"]
    assert "compared 570 rows, 57 of them as queries" in output
    info = run("info", tmp_path / "new").output
    assert re.search(r"dim +8 of 40\n", info) and re.search(r"reduced from +snapshot 3 of store \w+, 570 rows", info)


@pytest.mark.parametrize("dims", [None, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_live_row_is_there(source: FeatureStore, tmp_path: Path, dtype: DType, dims: int | None) -> None:
    """As it was, or as coordinates, with what is known of it."""
    source.add_quarantine([QuarantineRow(1, "bad.jpg", "truncated", 0.0)])
    seen: list[tuple[int, int]] = []
    report = remake(
        source, tmp_path / "new", dims=dims, dtype=dtype, progress=lambda done, total: seen.append((done, total))
    )
    new, (keys, values) = FeatureStore.open(tmp_path / "new"), full_rows(source)
    snapshot, steps = new.snapshot(), 16 if dims else 8
    assert seen == [(number, steps) for number in range(1, steps + 1)]
    assert snapshot.version == 1 and report.num_rows == snapshot.num_rows == snapshot.manifest.file_rows == ROWS - 30
    assert all(len(files) == 1 and files[0].kind == "base" for files in snapshot.manifest.shards.values())
    assert metadata_of(snapshot).equals(metadata_of(source.snapshot()))
    assert new.quarantine_rows() == source.quarantine_rows() and verify(new).problems == []
    assert (report.source_dim, report.dim, new.info.dim, new.info.dtype) == (DIM, dims or DIM, dims or DIM, dtype)
    assert report.row_bytes_share == new.info.row_bytes / (DIM * 4)
    if dims is None:
        assert np.array_equal(snapshot.get(keys), new.codec.encode(values))
        assert new.info.model_copy(update={"dtype": "float32"}).kind == source.info.kind
        return
    assert new.info.full_dim == DIM and new.basis is not None
    assert new.info.extractor == source.info.extractor and new.info.num_shards == source.info.num_shards
    projected = (values - new.basis.mean_D) @ new.basis.components_KD.T
    assert np.array_equal(snapshot.get(keys), new.codec.encode(projected.astype(np.float32)))
    restored = new.basis.restored(new.codec.decode(snapshot.get(keys)))
    left = ((values - restored).astype(np.float64) ** 2).sum() / ((values - new.basis.mean_D) ** 2).sum()
    assert left == pytest.approx(1 - report.variance_kept, abs=1e-3) and report.variance_kept > 0.99
    assert report.accuracy.relative_error_p99 is not None and report.accuracy.relative_error_p99 < 0.04
    assert read_report(new.storage) == report == remake(source, tmp_path / "new", dims=8, dtype=dtype)


def test_the_report_measures_what_was_lost(source: FeatureStore, tmp_path: Path) -> None:
    """All rows are compared here, so the figures can be worked out again from all rows."""
    report = remake(source, tmp_path / "small", dtype="float16")
    small = FeatureStore.open(tmp_path / "small")
    keys, exact = full_rows(source)
    kept = small.codec.decode(small.snapshot().get(keys)).astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1)
    error_N = np.linalg.norm(exact - kept, axis=1) / lengths
    assert report.accuracy.num_compared == ROWS - 30 and report.accuracy.num_queries == 57
    assert report.accuracy.relative_error_mean == pytest.approx(error_N.mean(), rel=1e-4)
    assert report.accuracy.relative_error_p99 == pytest.approx(np.percentile(error_N, 99), rel=1e-4)
    assert report.accuracy.recall_at_10 is not None and report.accuracy.recall_at_10 > 0.97
    assert report.bytes == small.snapshot().manifest.file_bytes and read_report(small.storage) == report
    exact_report = remake(source, tmp_path / "copy", dtype="float32")
    assert exact_report.accuracy.recall_at_10 == 1 and exact_report.accuracy.relative_error_p99 == 0
    remake(small, tmp_path / "back", dtype="float32")
    assert np.array_equal(full_rows(FeatureStore.open(tmp_path / "back"))[1], kept)


def test_a_sample_is_of_live_rows_and_reads_from_many_shards(source: FeatureStore) -> None:
    snapshot = source.snapshot()
    keys, values = sample(snapshot, 100, seed=1)
    assert len(np.unique(keys)) == len(keys) == 100
    assert np.array_equal(values, snapshot.get(keys))
    other, _ = sample(snapshot, 100, seed=2)
    assert len(np.intersect1d(keys, other)) < 50
    assert len(sample(snapshot, 5000, seed=1)[0]) == ROWS - 30


def test_finished_is_finished_and_another_store_is_not_touched(source: FeatureStore, tmp_path: Path) -> None:
    report = remake(source, tmp_path / "new", dtype="bfloat16")
    files = sorted((tmp_path / "new").rglob("*"))
    assert remake(source, tmp_path / "new", dtype="bfloat16") == report
    made = {"where": tmp_path / "new", "version": 3, "source": source.url, "value": re.compile("^bfloat16")}
    with raises(errors.StoreExistsError, Problem.OTHER_ROWS_IN_THE_WAY, **made):
        remake(source, tmp_path / "new", dtype="float16")
    source.put(rows_of(2000, 10))
    with raises(errors.StoreExistsError, Problem.OTHER_ROWS_IN_THE_WAY, **made):
        remake(source, tmp_path / "new", dtype="bfloat16")
    with raises(errors.SnapshotNotFoundError, Problem.NO_SNAPSHOT, where=source.url, value=9):
        remake(source, tmp_path / "more", dtype="bfloat16", version=9)
    assert sorted((tmp_path / "new").rglob("*")) == files
    assert remake(source, tmp_path / "first", dtype="bfloat16", version=1).num_rows == ROWS


def test_rows_put_meanwhile_stay(source: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = module.write_shard_file

    def others_put(storage: Storage, info: StoreInfo, shard: int, *arguments: Any) -> FileEntry:
        if shard == 7:
            FeatureStore.create(storage.url, info).put(rows_of(0, 5, seed=9))
        return write(storage, info, shard, *arguments)

    monkeypatch.setattr(module, "write_shard_file", others_put)
    with raises(errors.CommitConflictError, Problem.ANOTHER_NEWEST, where=tmp_path / "new", value=1, wanted=0):
        remake(source, tmp_path / "new", dtype="bfloat16")
    new = FeatureStore.open(tmp_path / "new")
    assert new.snapshot().num_rows == 5
    with raises(errors.StoreExistsError, Problem.STORE_IN_THE_WAY, where=tmp_path / "new"):
        remake(source, tmp_path / "new", dtype="bfloat16")  # though the report says what was asked


def test_what_cannot_be_remade_is_said(
    source: FeatureStore, tmp_path: Path, info: StoreInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = rows_of(3000, 1)
    bad.features_ND[0, 4] = 1e6
    source.put(bad)
    with raises(errors.InvalidRowsError, Problem.BEYOND_DTYPE, where=re.compile(r"3000\.jpg$"), dtype="float16"):
        remake(source, tmp_path / "half", dtype="float16")
    empty = FeatureStore.create(tmp_path / "empty", info)
    report = remake(empty, tmp_path / "bits", dtype="float32")
    assert report.num_rows == 0 and report.accuracy.recall_at_10 is None and report.accuracy.relative_error_p99 is None
    entry = source.snapshot().manifest.files(2)[0]
    spoil(source, entry.path)
    with raises(errors.CorruptFileError, Problem.DIGEST_DIFFERS, where=source.storage.full(entry.path)):
        remake(source, tmp_path / "broken", dtype="bfloat16")
    with raises(errors.StoreNotFoundError, Problem.NO_STORE, where=tmp_path / "broken"):
        FeatureStore.open(tmp_path / "broken")
    spoil(source, entry.path)  # back
    monkeypatch.setattr("featurestore.format.datafile.finite_rows", lambda bits, dtype: np.ones(len(bits), np.bool_))
    bad.features_ND[0, 3] = np.nan
    source.put(bad)
    with raises(errors.InvalidRowsError, Problem.SHARD_NOT_FINITE, where=source.url, shard=re.compile(r"^\d$")):
        remake(source, tmp_path / "new", dims=8)


def test_an_unsafe_place_is_refused(source: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = Mock(side_effect=errors.UnsafeBackendError("two were told that they were first"))
    for name in ("store", "upkeep.remake"):
        monkeypatch.setattr(f"featurestore.{name}.refuse_unsafe", refuse, raising=False)
    with pytest.raises(errors.UnsafeBackendError):
        remake(source, tmp_path / "new", dtype="bfloat16")
    assert Storage(tmp_path / "new").entries() == []


def test_in_memory_and_rows_of_zeros(memory_url: str, info: StoreInfo) -> None:
    source = FeatureStore.create(f"{memory_url}/source", info)
    source.put(FeatureRows.of([f"{i}" for i in range(30)], np.zeros((30, info.dim), np.float32)))
    report = remake(source, f"{memory_url}/small", dtype="bfloat16")
    assert report.accuracy.relative_error_p99 is None and report.accuracy.relative_error_mean is None
    new = FeatureStore.open(f"{memory_url}/small")
    assert new.snapshot().num_rows == 30
    assert not full_rows(new)[1].any() and not new.snapshot().statistics().std_D.any()
    assert remake(source, f"{memory_url}/small", dtype="bfloat16") == report
