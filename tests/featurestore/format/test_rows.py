"""Rows and their files: rounded to a store's dtype or refused, written in one block or many, read as Arrow tables."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pytest
import torch

from featurestore import Codec, FeatureRows, FeatureStore, StoreInfo, keys_of_uris, to_bits, to_float32
from featurestore.errors import CorruptFileError, InvalidRowsError, KeyCollisionError
from featurestore.format.codec import Moments, read_npy
from featurestore.format.datafile import matrix_of, open_entry
from featurestore.format.shard import read_moments, write_shard_file
from featurestore.index import nearest
from featurestore.keys import shard_of
from featurestore.problems import Problem
from featurestore.spec import FileEntry, Manifest, seal, unseal
from featurestore.staging import sorted_table
from featurestore.storage.local import DiskFiles
from featurestore.text import DType
from tests.featurestore.conftest import make_rows, put
from tests.featurestore.contents import flip, spoil
from tests.raised import raises, told

DIM = 24
ALL_DTYPES = ["bfloat16", "float16", "float32"]


def drawn(count: int = 900) -> np.ndarray:
    """Like what networks make: dimensions far from zero, after a ReLU, without any change, and small ones."""
    values = np.random.default_rng(3).standard_normal((count, DIM)).astype(np.float32)
    values[:, 0] += 50
    values[:, 1:4] = np.maximum(values[:, 1:4], 0)
    values[:, 4] = 0
    values[:, 5] = -2.7
    values[:, 6] *= 1e-20
    return values


def test_neighbours_are_the_exact_ones() -> None:
    values = drawn()
    distances = ((values[:20, None].astype(np.float64) - values[None, 20:]) ** 2).sum(2)
    assert np.array_equal(nearest(values[20:], values[:20], 10), np.argsort(distances, axis=1)[:, :10])


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_whatever_the_dtype(dtype: DType, bad: float) -> None:
    codec, values = Codec(dtype), drawn(5)
    values[2, 7] = bad
    with raises(InvalidRowsError, Problem.ROW_NOT_FINITE, where=2, dtype=dtype):
        codec.encode(values)
    bits, storable = codec.encode_storable(values)
    assert storable.tolist() == [True, True, False, True, True]
    assert np.array_equal(bits[storable], codec.encode(drawn(5)[storable]))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_rows_may_come_as_float32(tmp_path: Path, info: StoreInfo, dtype: DType) -> None:
    store = FeatureStore.create(tmp_path / dtype, info.model_copy(update={"dim": DIM, "dtype": dtype}))
    values = drawn(40)
    rows = FeatureRows.of([f"{i}" for i in range(40)], values)
    expected = to_bits(values, dtype)
    assert np.array_equal(store.put(rows).get(rows.keys_N), expected)
    store.put(FeatureRows.of(rows.uris, expected))  # or as the store keeps them
    store.stage_part("run", "part", rows)
    snapshot = store.commit(store.build_shards("run", range(3, 4), ["part"]), "extract")
    assert np.array_equal(snapshot.get(rows.keys_N), expected)
    values[7, 3] = np.nan
    found = {"number": 1, "count": 40, "where": rows.keys_N[7], "uri": "7"}
    with raises(InvalidRowsError, Problem.FEATURES_NOT_FINITE, **found):
        store.put(FeatureRows.of(rows.uris, values))


def written(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (written(np.zeros(3)), b""),
        (written(np.zeros(3)), b"no array"),
        (b"\x93NUMPY", b"PK\x03\x04"),
        (b"'<f8'", b"'|O '"),
        (b"(3,)", b"((3,"),
        (b"(3,)", b"3   "),
        (b"(3,), }" + b" " * 11, b"(999999999999,), }"),
    ],
)
def test_other_bytes_damaged_headers_and_pickles_are_refused(old: bytes, new: bytes) -> None:
    data = written(np.zeros(3))
    assert old in data
    with pytest.raises(ValueError):
        read_npy(data.replace(old, new))


@pytest.mark.parametrize("array", [np.zeros(()), np.zeros(2), np.zeros((2, 3), np.int64)])
def test_statistics_of_another_shape_are_damaged(array: np.ndarray) -> None:
    with raises(CorruptFileError, Problem.NOT_TWO_ROWS, where="x.stats.npy", value=array.dtype, shape=array.shape):
        Moments.from_bytes(written(array), 1, "x.stats.npy")


def test_bfloat16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)
    values = np.concatenate([bits, bits & 0xFFFF0000 | 0x8000]).view(np.float32)  # ties among them
    values = np.append(values[~np.isnan(values)], np.array([np.inf, -np.inf, -0.0], np.float32))
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(to_bits(values, "bfloat16"), expected)
    nans = np.array([0x7FC00000, 0xFFFFFFFF], np.uint32).view(np.float32)  # the second would round over into zero
    assert np.isnan(to_float32(to_bits(nans, "bfloat16"), "bfloat16")).all()


def test_shape_dtype_lengths_and_uris_are_checked(info: StoreInfo) -> None:
    rows = make_rows(4, info)
    rows.validate(info)
    with raises(InvalidRowsError, Problem.WRONG_FEATURE_SHAPE, value=(4, 7), count=4, dim=8):
        replace(rows, features_ND=rows.features_ND[:, :7]).validate(info)
    with raises(InvalidRowsError, Problem.WRONG_FEATURE_DTYPE, value="float32", dtype="bfloat16"):
        replace(rows, features_ND=rows.features_ND.astype(np.float32)).validate(info)
    with raises(InvalidRowsError, Problem.UNEQUAL_COLUMNS):
        replace(rows, uris=rows.uris[:3]).validate(info)
    with raises(InvalidRowsError, Problem.WRONG_DIGEST_LENGTH, value=15):
        FeatureRows.of(["a"], rows.features_ND[:1], content_digests=[b"x" * 15])
    with raises(KeyCollisionError, Problem.KEY_OF_TWO_URIS, where=7, first="a", second="b"):
        replace(make_rows(["a", "b"], info), keys_N=np.array([7, 7])).validate(info)
    make_rows(["a", "a"], info).validate(info)  # one uri twice is no mistake


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_decoded_and_as_stored(dtype: DType, info: StoreInfo, tmp_path: Path) -> None:
    """Against `get`, after a key was replaced and another removed."""
    info = info.model_copy(update={"dtype": dtype})
    store = FeatureStore.create(tmp_path / "store", info)
    uris = [f"{number}.jpg" for number in range(100)]
    rng = np.random.default_rng(0)
    store.put(FeatureRows.of(uris, rng.standard_normal((100, 8)).astype(np.float32), widths=np.arange(100)))
    store.put(FeatureRows.of(uris[:9], rng.standard_normal((9, 8)).astype(np.float32), widths=np.full(9, 7)))
    store.delete(keys_of_uris(uris[5:8]))
    snapshot = store.snapshot()
    table, stored = snapshot.to_arrow(), snapshot.to_arrow(["feature", "key"], decode=False)
    kept = uris[:5] + uris[8:]
    assert sorted(table["uri"].to_pylist()) == sorted(kept) and len(stored) == len(kept) == snapshot.num_rows
    keys_M = table["key"].to_numpy()
    np.testing.assert_array_equal(keys_M, keys_of_uris(table["uri"].to_pylist()))
    expected_MD = snapshot.get(keys_M)
    np.testing.assert_array_equal(np.array(table["feature"].to_pylist(), np.float32), to_float32(expected_MD, dtype))
    assert stored.schema.names == ["feature", "key"]
    assert stored["feature"].to_pylist() == [bytes(row) for row in snapshot.get(stored["key"].to_numpy())]
    widths = dict(zip(table["uri"].to_pylist(), table["width"].to_pylist(), strict=True))
    assert [widths[uri] for uri in (uris[0], uris[8], uris[9], uris[99])] == [7, 7, 9, 99]
    assert snapshot.arrow_reader().read_all().equals(table)


def test_types_columns_and_the_name_of_a_damaged_file(store: FeatureStore) -> None:
    put(store, 200)
    snapshot = store.snapshot()
    table = snapshot.to_arrow()
    assert table.schema.names == ["key", "uri", "content_digest", "source_tag", "width", "height", "feature"]
    assert table.schema.field("feature").type == pa.list_(pa.float32(), 8)
    assert snapshot.to_arrow(decode=False).schema.field("feature").metadata == {b"dtype": b"bfloat16", b"shape": b"[8]"}
    assert snapshot.to_arrow(["width"]).schema.names == ["width"]
    known = re.compile("key, uri.*")
    for columns in (["deleted"], ["key", "key"], [], ["x"]):
        with pytest.raises(ValueError, match=told(Problem.UNKNOWN_COLUMNS, value=columns, known=known)):
            snapshot.to_arrow(columns)
    path = snapshot.manifest.entries[0].path
    spoil(store, path, 230)
    with raises(CorruptFileError, Problem.DAMAGED, where=store.storage.full(path)):
        snapshot.to_arrow()


@pytest.mark.long
def test_a_stream_holds_a_part_of_the_rows(info: StoreInfo, tmp_path: Path) -> None:
    wide = FeatureStore.create(tmp_path / "wide", info.model_copy(update={"dim": 4096}))
    put(wide, 2_000)
    before = pa.total_allocated_bytes()
    most, count = 0, 0
    for batch in wide.snapshot().arrow_reader(["key", "feature"]):
        count += len(batch)
        most = max(most, pa.total_allocated_bytes() - before)
    assert count == 2_000 and most < 2_000 * wide.info.dim * 4 / 2


@pytest.fixture
def one(tmp_path: Path, info: StoreInfo, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    monkeypatch.setattr("featurestore.format.shard._CHUNK_BYTES", 1000)  # files are checked in pieces
    return FeatureStore.create(tmp_path / "one", info.model_copy(update={"num_shards": 1}))


@pytest.fixture
def table(one: FeatureStore) -> pa.Table:
    return sorted_table(make_rows(100, one.info), one.info)


def write(store: FeatureStore, *blocks: pa.Table) -> FileEntry:
    return write_shard_file(store.storage, store.info, 0, blocks, "delta", 7)


@pytest.mark.parametrize("sizes", [(100,), (1, 99), (30, 0, 30, 40), (0, 100)])
def test_in_one_block_or_many(one: FeatureStore, table: pa.Table, sizes: tuple[int, ...]) -> None:
    starts = np.cumsum([0, *sizes])
    entry = write(one, *(table.slice(start, size) for start, size in zip(starts, sizes, strict=False)))
    assert (entry.rows, entry.num_deleted, entry.based_on, entry.kind) == (100, 0, 7, "delta")
    for check in ("sha256", "xxh3_128"):
        with open_entry(one.storage, one.info, entry, check) as file:
            assert file.read().equals(table)
    assert entry.bytes == one.storage.size(entry.path)
    moments, expected = read_moments(one.storage, entry), Moments.of(matrix_of(table, one.info), one.info.dtype)
    assert moments is not None and moments.count == 100
    np.testing.assert_allclose(moments.mean_D, expected.mean_D, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.m2_D, expected.m2_D, rtol=1e-6)


def test_no_rows_are_a_file_too(one: FeatureStore, table: pa.Table) -> None:
    entry = write(one, table.slice(0, 0))
    assert (entry.rows, entry.statistics_path) == (0, None)
    with open_entry(one.storage, one.info, entry, "sha256") as file:
        assert file.read().equals(table.slice(0, 0))


def test_statistics_are_kept_where_they_are_small_beside_the_rows(one: FeatureStore, table: pa.Table) -> None:
    per_row, statistics = one.info.row_bytes, Moments.empty(one.info.dim).size_bytes
    enough = -(-4 * statistics // per_row)
    assert write(one, table.slice(0, enough)).statistics_path is not None
    assert write(one, table.slice(0, enough - 1)).statistics_path is None


def test_rows_of_other_shards_are_refused_and_no_file_appears(store: FeatureStore) -> None:
    with raises(InvalidRowsError, Problem.STRAY_KEYS, where=0):
        write(store, sorted_table(make_rows(50, store.info), store.info))
    assert store.storage.entries("data") == []


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 1 << 20])
@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_a_disk_that_keeps_other_bytes_is_noticed(
    one: FeatureStore, table: pa.Table, monkeypatch: pytest.MonkeyPatch, suffix: str, chunk_bytes: int
) -> None:
    open_output = DiskFiles.open_output

    @contextmanager
    def flipping(self: DiskFiles, path: str) -> Iterator[IO[bytes]]:
        with open_output(self, path) as file:
            yield file
        if path.endswith(suffix):
            flip(self.path(path))

    monkeypatch.setattr(DiskFiles, "open_output", flipping)
    monkeypatch.setattr("featurestore.format.shard._CHUNK_BYTES", chunk_bytes)
    with raises(CorruptFileError, Problem.DIGEST_DIFFERS, where=re.compile(rf"\{suffix}$")):
        write(one, table)


def test_a_shard_knows_its_keys_and_their_uris(store: FeatureStore, info: StoreInfo) -> None:
    keys = np.arange(40)
    empty = store.snapshot().shard_reader(0)
    assert not empty.contains(keys).any() and empty.uris(keys)[1] == []
    features = to_bits(np.ones((len(keys), info.dim), np.float32), info.dtype)
    rows = FeatureRows.of([f"{key}.jpg" for key in keys], features, keys=keys)
    store.put(rows)
    store.delete(np.arange(10, 15))
    store.put(rows.take(np.array([12])))
    reader = store.snapshot().shard_reader(0)
    here = keys[shard_of(keys, info.num_shards) == 0]
    live = np.array([key for key in here.tolist() if key not in (10, 11, 13, 14)])
    np.testing.assert_array_equal(np.sort(reader.keys()), live)
    asked = np.array([live[-1], 10, 10_000, live[0], live[-1]])
    found, uris = reader.uris(asked)
    assert found.tolist() == [live[-1], live[0], live[-1]]
    assert uris == [f"{key}.jpg" for key in found]
    np.testing.assert_array_equal(reader.contains(asked), [True, False, False, True, True])
    assert reader.uris(np.array([10_000]))[1] == []
    assert not reader.contains(np.empty(0, np.int64)).any()


@pytest.mark.parametrize("size", [10**13, 2**63 - 1])
def test_a_manifest_that_names_a_huge_file_asks_for_no_memory(store: FeatureStore, size: int) -> None:
    put(store, 4)
    entry = store.snapshot().manifest.entries[0].model_copy(update={"bytes": size})
    with raises(
        CorruptFileError, Problem.WRONG_NUMBER, where=store.storage.full(entry.path), unit="bytes", wanted=size
    ):
        open_entry(store.storage, store.info, entry, "xxh3_128").__enter__()


@pytest.mark.parametrize("name", ["bytes", "rows", "num_deleted"])
def test_a_count_below_zero_is_damage(store: FeatureStore, name: str) -> None:
    manifest = store.put(make_rows(4, store.info)).manifest
    shard = next(iter(manifest.shards))
    entry = manifest.shards[shard][0].model_copy(update={name: -1})
    damaged = manifest.model_copy(update={"shards": manifest.shards | {shard: (entry,)}})
    with raises(CorruptFileError, Problem.DAMAGED, where="log", reason=re.compile(rf"\b{name}=-1\b")):
        unseal(seal(damaged), Manifest, "log")


def test_what_a_network_has_not_is_not_written(info: StoreInfo) -> None:
    """So the digest of its description is that of before there was such a field."""
    assert "int8" not in info.extractor.model_dump()
    assert "reduction" not in info.model_dump()
