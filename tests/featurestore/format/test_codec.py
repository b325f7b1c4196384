"""Codecs: numbers rounded to a store's dtype, and what a store takes and gives."""

from pathlib import Path

import numpy as np
import pytest

from featurestore import Codec, FeatureRows, FeatureStore, StoreInfo, to_bits, to_float32
from featurestore.errors import InvalidRowsError
from featurestore.index import nearest
from featurestore.text import DType
from tests.featurestore.staged import build_shard

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
    with pytest.raises(InvalidRowsError, match=r"1 of 5 .* row 2"):
        codec.encode(values)
    bits, storable = codec.encode_storable(values)
    assert storable.tolist() == [True, True, False, True, True]
    assert np.array_equal(bits[storable], codec.encode(drawn(5)[storable]))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_codes_are_bits(dtype: DType) -> None:
    bits = Codec(dtype).encode(drawn())
    assert np.array_equal(bits, to_bits(drawn(), dtype))
    assert np.array_equal(Codec(dtype).decode(bits), to_float32(bits, dtype))
    assert Codec(dtype).encode(np.empty((0, DIM), np.float32)).shape == (0, DIM)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_rows_may_come_as_float32(tmp_path: Path, info: StoreInfo, dtype: DType) -> None:
    store = FeatureStore.create(tmp_path / dtype, info.model_copy(update={"dim": DIM, "dtype": dtype}))
    values = drawn(40)
    rows = FeatureRows.of([f"{i}" for i in range(40)], values)
    expected = store.codec.encode(values)
    assert np.array_equal(store.put(rows).get(rows.keys_N), expected)
    store.put(FeatureRows.of(rows.uris, expected))  # or as the store keeps them
    store.stage_part("run", "part", rows)
    entry = build_shard(store, "run", 3, ["part"])
    assert entry is not None
    snapshot = store.commit({3: entry}, "extract")
    assert np.array_equal(snapshot.get(rows.keys_N), expected)
    values[7, 3] = np.nan
    with pytest.raises(InvalidRowsError, match=rf"1 of 40 features are not finite.*key {rows.keys_N[7]} \('7'\)"):
        store.put(FeatureRows.of(rows.uris, values))
