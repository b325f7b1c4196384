"""Codecs and rows: numbers rounded to a store's dtype, rows that a store refuses, live rows as Arrow tables."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from featurestore import Codec, FeatureRows, FeatureStore, StoreInfo, keys_of_uris, to_bits, to_float32
from featurestore.errors import CorruptFileError, InvalidRowsError, KeyCollisionError
from featurestore.format.codec import Moments, read_npy
from featurestore.index import nearest
from featurestore.text import DType
from tests.featurestore.conftest import make_rows, put
from tests.featurestore.contents import spoil

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
    with pytest.raises(InvalidRowsError, match="row 2 is not finite"):
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
    with pytest.raises(InvalidRowsError, match=rf"1 of 40 features are not finite.*key {rows.keys_N[7]} \('7'\)"):
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
    with pytest.raises(CorruptFileError, match="not two rows"):
        Moments.from_bytes(written(array), 1, "x.stats.npy")


def test_bfloat16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)
    values = np.concatenate([bits, bits & 0xFFFF0000 | 0x8000]).view(np.float32)  # ties among them
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(to_bits(values, "bfloat16"), expected)


def test_bfloat16_ties_and_specials() -> None:
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], dtype=np.uint32).view(np.float32)
    assert [hex(b) for b in to_bits(ties, "bfloat16")] == ["0x3f80", "0x3f82", "0x3f81", "0x3f80"]
    specials = np.array([np.inf, -np.inf, np.nan, -0.0], dtype=np.float32)
    back = to_float32(to_bits(specials, "bfloat16"), "bfloat16")
    assert back[0] == np.inf and back[1] == -np.inf and np.isnan(back[2]) and np.signbit(back[3])
    all_ones = np.array([0xFFFFFFFF], dtype=np.uint32).view(np.float32)  # a NaN that would round over into zero
    assert np.isnan(to_float32(to_bits(all_ones, "bfloat16"), "bfloat16"))[0]


def test_shape_dtype_lengths_and_uris_are_checked(info: StoreInfo) -> None:
    rows = make_rows(4, info)
    rows.validate(info)
    with pytest.raises(InvalidRowsError, match=r"shape \(4, 7\), the store wants \(4, 8\)"):
        replace(rows, features_ND=rows.features_ND[:, :7]).validate(info)
    with pytest.raises(InvalidRowsError, match=r"features are float32, the store holds bfloat16.*encode"):
        replace(rows, features_ND=rows.features_ND.astype(np.float32)).validate(info)
    with pytest.raises(InvalidRowsError, match="different lengths"):
        replace(rows, uris=rows.uris[:3]).validate(info)
    with pytest.raises(InvalidRowsError, match="15 bytes instead of 16"):
        FeatureRows.of(["a"], rows.features_ND[:1], content_digests=[b"x" * 15])
    with pytest.raises(KeyCollisionError, match=r"key 7 .*'a' and 'b'"):
        replace(make_rows(["a", "b"], info), keys_N=np.array([7, 7])).validate(info)
    make_rows(["a", "a"], info).validate(info)  # one uri twice is no mistake


def test_take_keeps_every_column(info: StoreInfo) -> None:
    rows = make_rows(5, info)
    taken = rows.take(np.array([4, 1]))
    taken.validate(info)
    assert taken.uris == [rows.uris[4], rows.uris[1]]
    assert taken.width_N.tolist() == [4, 1]
    assert taken.content_digest_N[1].tobytes() == bytes([1] * 15 + [0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
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
    for columns in (["deleted"], ["key", "key"], [], ["x"]):
        with pytest.raises(ValueError, match="choose from key, uri"):
            snapshot.to_arrow(columns)
    path = snapshot.manifest.entries[0].path
    spoil(store, path, 230)
    with pytest.raises(CorruptFileError, match=path):
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
