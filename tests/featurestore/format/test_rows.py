"""Rows in memory: rounding to bfloat16, and every kind of rows that a store refuses."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore import FeatureRows, StoreInfo, to_bits, to_float32
from featurestore.errors import InvalidRowsError, KeyCollisionError
from featurestore.text import DType


def nearest_even_bfloat16(value: np.float32) -> int:
    """By its definition: of the two neighbours the nearer one, of equally near ones that with an even last bit."""
    bits = int(np.float32(value).view(np.uint32))
    low, rest = bits >> 16, bits & 0xFFFF
    return low + (rest > 0x8000 or (rest == 0x8000 and low % 2 == 1))


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False))
def test_bfloat16_rounds_to_nearest_even(value: float) -> None:
    single = np.float32(value)
    bits = to_bits(np.array([single]), "bfloat16")
    assert bits.dtype == np.uint16
    assert int(bits[0]) == nearest_even_bfloat16(single)


def test_bfloat16_ties_and_specials() -> None:
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], dtype=np.uint32).view(np.float32)
    assert [hex(b) for b in to_bits(ties, "bfloat16")] == ["0x3f80", "0x3f82", "0x3f81", "0x3f80"]
    specials = np.array([np.inf, -np.inf, np.nan, -0.0], dtype=np.float32)
    back = to_float32(to_bits(specials, "bfloat16"), "bfloat16")
    assert back[0] == np.inf and back[1] == -np.inf and np.isnan(back[2]) and np.signbit(back[3])
    all_ones = np.array([0xFFFFFFFF], dtype=np.uint32).view(np.float32)  # a NaN that would round over into zero
    assert np.isnan(to_float32(to_bits(all_ones, "bfloat16"), "bfloat16"))[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_conversion_there_and_back_is_exact(dtype: DType) -> None:
    stored = to_bits(np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32), dtype)
    assert np.array_equal(to_bits(to_float32(stored, dtype), dtype), stored)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(info: StoreInfo, make_rows, dtype: DType, bad: float) -> None:
    info = info.model_copy(update={"dtype": dtype})
    values = np.zeros((3, 8), np.float32)
    values[1, 7] = bad
    rows = FeatureRows.of(["a", "b", "c"], to_bits(values, dtype))
    with pytest.raises(InvalidRowsError, match=r"1 of 3 features are not finite.*'b'"):
        rows.validate(info)


def test_a_float16_overflow_is_refused(info: StoreInfo) -> None:
    info = info.model_copy(update={"dtype": "float16"})
    with pytest.raises(InvalidRowsError, match="not finite"):
        FeatureRows.of(["a"], to_bits(np.full((1, 8), 1e6, np.float32), "float16")).validate(info)


def test_shape_dtype_and_lengths_are_checked(info: StoreInfo, make_rows) -> None:
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


def test_two_uris_under_one_key_are_refused_and_one_uri_twice_is_not(info: StoreInfo, make_rows) -> None:
    rows = make_rows(["a", "b"], info)
    with pytest.raises(KeyCollisionError, match=r"key 7 .*'a' and 'b'"):
        replace(rows, keys_N=np.array([7, 7])).validate(info)
    make_rows(["a", "a"], info).validate(info)


def test_take_keeps_every_column(info: StoreInfo, make_rows) -> None:
    rows = make_rows(5, info)
    taken = rows.take(np.array([4, 1]))
    taken.validate(info)
    assert taken.uris == [rows.uris[4], rows.uris[1]]
    assert taken.width_N.tolist() == [4, 1]
    assert taken.content_digest_N[1].tobytes() == bytes([1] * 15 + [0])
