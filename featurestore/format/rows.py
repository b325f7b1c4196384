"""Rows in memory, on their way into a store or out of it.

Letters of shapes: N rows, D feature width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.errors import InvalidRowsError, KeyCollisionError
from featurestore.keys import AnyArray, BoolArray, Float32Array, Int64Array, keys_of_uris
from featurestore.spec import STORAGE_DTYPES, StoreInfo
from featurestore.text import DType

DIGEST_DTYPE = np.dtype("V16")
_NO_DIGEST = bytes(16)


@dataclass(frozen=True)
class FeatureRows:
    """N rows of a store, features as it keeps them: bfloat16 as its bits in uint16.

    `FeatureStore.put` and `stage_part` take features in float32 too, for a store of any dtype.
    """

    keys_N: Int64Array
    uris: list[str]
    features_ND: AnyArray
    content_digest_N: npt.NDArray[np.void]  # 16 bytes each: xxh3-128 of the image's bytes
    source_tag: list[str]  # etag, or size and time of the source
    width_N: npt.NDArray[np.int32]
    height_N: npt.NDArray[np.int32]
    deleted_N: BoolArray

    @classmethod
    def of(
        cls,
        uris: Sequence[str],
        features_ND: AnyArray,
        *,
        keys: npt.ArrayLike | None = None,
        content_digests: Sequence[bytes] | None = None,
        source_tags: Iterable[str] | None = None,
        widths: npt.ArrayLike | None = None,
        heights: npt.ArrayLike | None = None,
    ) -> "FeatureRows":
        """Make live rows from plain values; keys default to those of the uris, everything else to empty."""
        count = len(uris)
        digests = content_digests if content_digests is not None else [_NO_DIGEST] * count
        if wrong := [digest for digest in digests if len(digest) != 16]:
            raise InvalidRowsError(f"a content digest has {len(wrong[0])} bytes instead of 16")
        return cls(
            keys_N=keys_of_uris(uris) if keys is None else np.asarray(keys, dtype=np.int64),
            uris=list(uris),
            features_ND=features_ND,
            content_digest_N=np.frombuffer(b"".join(digests), DIGEST_DTYPE),
            source_tag=list(source_tags) if source_tags is not None else [""] * count,
            width_N=np.zeros(count, np.int32) if widths is None else np.asarray(widths, np.int32),
            height_N=np.zeros(count, np.int32) if heights is None else np.asarray(heights, np.int32),
            deleted_N=np.zeros(count, np.bool_),
        )

    @classmethod
    def tombstones(cls, keys: npt.ArrayLike, info: StoreInfo) -> "FeatureRows":
        """Make rows that remove `keys` from the store."""
        keys_N = np.asarray(keys, dtype=np.int64)
        blank = cls.of([""] * len(keys_N), np.zeros((len(keys_N), info.dim), info.storage_dtype), keys=keys_N)
        return cls(**{**blank.__dict__, "deleted_N": np.ones(len(keys_N), np.bool_)})

    def __len__(self) -> int:
        return len(self.keys_N)

    def take(self, index_M: AnyArray) -> "FeatureRows":
        """Return the rows at `index_M`, in that order."""
        taken: dict[str, Any] = {name: getattr(self, name)[index_M] for name in self.__dict__ if name[-1].isupper()}
        taken |= {name: [getattr(self, name)[i] for i in index_M] for name in ("uris", "source_tag")}
        return FeatureRows(**taken)

    def validate(self, info: StoreInfo) -> None:
        """Raise InvalidRowsError unless a store of `info` may hold these rows; KeyCollisionError: two uris, one key."""
        count = len(self.keys_N)
        lengths = {name: len(value) for name, value in self.__dict__.items()}
        if set(lengths.values()) != {count}:
            raise InvalidRowsError(f"columns of different lengths: {lengths}")
        if self.features_ND.shape != (count, info.dim):
            raise InvalidRowsError(
                f"features have shape {self.features_ND.shape}, the store wants ({count}, {info.dim})"
            )
        if self.features_ND.dtype != info.storage_dtype:
            raise InvalidRowsError(
                f"features are {self.features_ND.dtype}, the store holds {info.dtype}"
                f" ({info.storage_dtype} in numpy): convert them by the encode of the store's codec"
            )
        finite_N = finite_rows(self.features_ND, info.dtype)
        if not finite_N.all():
            first = int(np.flatnonzero(~finite_N)[0])
            raise InvalidRowsError(
                f"{count - int(finite_N.sum())} of {count} features are not finite in {info.dtype}; the first is that"
                f" of key {self.keys_N[first]} ({self.uris[first]!r})"
            )
        live_M = np.flatnonzero(~self.deleted_N)
        check_collisions(self.keys_N[live_M], [self.uris[i] for i in live_M])


def check_collisions(keys_N: Int64Array, uris: Sequence[str]) -> None:
    """Raise KeyCollisionError where one key comes with two uris."""
    order_N = np.argsort(keys_N, kind="stable")
    sorted_N = keys_N[order_N]
    for place in np.flatnonzero(sorted_N[1:] == sorted_N[:-1]):
        first, second = uris[order_N[place]], uris[order_N[place + 1]]
        if first != second:
            raise KeyCollisionError(f"key {sorted_N[place]} belongs to two uris, {first!r} and {second!r}: rename one")


def to_bits(values: npt.NDArray[np.floating[Any]], dtype: DType) -> AnyArray:
    """Return `values` as a store of `dtype` keeps them: for bfloat16 its bits as uint16, rounded to nearest even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):  # an overflow becomes inf, which validate refuses
            return values.astype(STORAGE_DTYPES[dtype], copy=False)
    single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    is_nan = np.isnan(single)
    if is_nan.any():  # adding to the bits of a NaN may carry into the sign
        rounded[is_nan] = 0x7FC0
    return rounded


def to_float32(bits: AnyArray, dtype: DType) -> Float32Array:
    """Return the values behind `to_bits`, as float32; exact."""
    if dtype != "bfloat16":
        return bits.astype(np.float32, copy=False)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def finite_rows(features_ND: AnyArray, dtype: DType) -> BoolArray:
    """Return which stored rows are free of NaN and infinity, (N,)."""
    if dtype == "bfloat16":  # not finite: all bits of the exponent are set
        exponent = np.uint16(0x7F80)
        return np.asarray(((features_ND & exponent) != exponent).all(axis=1))
    return np.asarray(np.isfinite(features_ND).all(axis=1))
