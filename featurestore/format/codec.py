"""The codec of a store: from numbers to what the store keeps of them, and back. That of int8 has parameters.

Letters of shapes: N rows, D feature width.
"""

import io
import uuid
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.errors import CorruptFileError, InvalidRowsError
from featurestore.format.datafile import digest_of, read_verified
from featurestore.format.npy import read_npy
from featurestore.format.rows import FeatureRows, finite_rows, to_bits, to_float32
from featurestore.spec import STORAGE_DTYPES, CodecSpec, StoreInfo
from featurestore.storage.storage import Storage
from featurestore.text.dtypes import DType

CODECS = "codec"
_BLOCK_NUMBERS = 1 << 16  # in the processor's cache over all passes
_LARGEST_CODE = 255


class Codec:
    """The way in which one store keeps numbers.

    bfloat16, float16 and float32 round to nearest. int8 is faiss's scalar quantiser QT_8bit: dimension d has a range
    that begins at `ranges_2D[0, d]` and is `ranges_2D[1, d]` wide, cut into 255 steps; code c means the middle of
    its step, `offset_D + c * step_D`. What lies outside gets the nearest code. A dimension without width has a step of
    0 and one code. The arrays are empty for the other dtypes.
    """

    def __init__(self, dtype: DType, ranges_2D: npt.NDArray[np.float32] | None = None) -> None:
        self.dtype = dtype
        self.ranges_2D = np.empty((2, 0), np.float32) if ranges_2D is None else ranges_2D
        minimum_D, width_D = self.ranges_2D.astype(np.float64)
        self.step_D: npt.NDArray[np.float32] = (width_D / _LARGEST_CODE).astype(np.float32)
        self.offset_D: npt.NDArray[np.float32] = (minimum_D + width_D * (0.5 / _LARGEST_CODE)).astype(np.float32)

    @property
    def has_codes(self) -> bool:
        """Whether stored features are codes: int8."""
        return self.dtype == "int8"

    def encode(self, values_ND: npt.NDArray[np.floating[Any]]) -> npt.NDArray[Any]:
        """Return `values_ND` as the store keeps them, (N, D) in its storage dtype; right for every dtype.

        Raises InvalidRowsError where the store cannot hold a row; `encode_storable` says which it can.
        """
        bits_ND, storable_N = self.encode_storable(values_ND)
        if not storable_N.all():
            raise InvalidRowsError(f"{self._not_storable(storable_N)} row {np.flatnonzero(~storable_N)[0]}")
        return bits_ND

    def encode_storable(
        self, values_ND: npt.NDArray[np.floating[Any]]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Encode, and return which rows the store can hold, (N,): those finite before and after. Never raises."""
        if not self.has_codes:
            bits_ND = to_bits(values_ND, self.dtype)
            return bits_ND, finite_rows(bits_ND, self.dtype)
        self._check_width(values_ND)
        codes_ND = np.empty(values_ND.shape, np.uint8)
        finite_N = np.empty(len(values_ND), np.bool_)
        minimum_D, width_D = self.ranges_2D
        # Divided by infinity, every number of a dimension without width becomes code 0, as with faiss.
        width_D = np.where(width_D > 0, width_D, np.float32(np.inf))
        rows = max(1, _BLOCK_NUMBERS // values_ND.shape[1])
        for start in range(0, len(values_ND), rows):
            block = np.array(values_ND[start : start + rows], dtype=np.float32)
            finite_N[start : start + rows] = np.isfinite(block).all(axis=1)
            with np.errstate(invalid="ignore", over="ignore"):
                np.subtract(block, minimum_D, out=block)
                np.divide(block, width_D, out=block)
            np.fmin(np.fmax(block, 0, out=block), 1, out=block)  # fmax makes a NaN 0
            np.multiply(block, _LARGEST_CODE, out=block)
            codes_ND[start : start + rows] = block  # cut off, not rounded
        return codes_ND, finite_N

    def encode_rows(self, rows: FeatureRows) -> FeatureRows:
        """Return `rows` with their features encoded, where they are of another float type than the store's own.

        Raises InvalidRowsError naming the key.
        """
        features_ND = rows.features_ND
        if features_ND.dtype.kind != "f" or features_ND.dtype == STORAGE_DTYPES[self.dtype] or features_ND.ndim != 2:
            return rows  # encoded already, or `validate` names what is wrong
        bits_ND, storable_N = self.encode_storable(features_ND)
        if not storable_N.all() and len(storable_N) == len(rows):
            first = int(np.flatnonzero(~storable_N)[0])
            where = f"key {rows.keys_N[first]} ({rows.uris[first]!r})"
            raise InvalidRowsError(f"{self._not_storable(storable_N)} {where}")
        return replace(rows, features_ND=bits_ND)

    def decode(self, bits_ND: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return the numbers behind stored ones, float32 (N, D): exact, except that an int8 code becomes its middle."""
        if not self.has_codes:
            return to_float32(bits_ND, self.dtype)
        self._check_width(bits_ND)
        values_ND = bits_ND.astype(np.float32)
        values_ND *= self.step_D
        values_ND += self.offset_D
        return values_ND

    def num_clipped(self, values_ND: npt.NDArray[np.floating[Any]]) -> int:
        """Count the numbers more than half a step outside of all codes; 0 where the dtype has no range."""
        if not self.has_codes:
            return 0
        low_D = self.offset_D - self.step_D / 2
        high_D = self.offset_D + self.step_D * (_LARGEST_CODE + 0.5)
        # A dimension without range has one code for everything: only its own number is no outlier.
        return int(np.count_nonzero(values_ND < low_D) + np.count_nonzero(values_ND > high_D))

    def _not_storable(self, storable_N: npt.NDArray[np.bool_]) -> str:
        count = int(np.count_nonzero(~storable_N))
        return f"{count} of {len(storable_N)} features are not finite in {self.dtype}; the first is that of"

    def _check_width(self, values_ND: npt.NDArray[Any]) -> None:
        dim = self.ranges_2D.shape[1]
        if values_ND.ndim != 2 or values_ND.shape[1] != dim:
            raise InvalidRowsError(f"features have shape {values_ND.shape}, the store's codec is for (N, {dim})")


def codec_of(info: StoreInfo, storage: Storage) -> Codec:
    """Make the codec of the store of `info`; for int8 one small file is read. Raises CorruptFileError."""
    if info.codec is None:
        return Codec(info.dtype)
    path = storage.full(info.codec.path)
    try:
        data = storage.read_bytes(info.codec.path)
    except FileNotFoundError as error:
        raise CorruptFileError(f"{path} is missing: without it the codes of the store mean nothing") from error
    if digest_of(data, "sha256") != info.codec.sha256:
        raise CorruptFileError(f"{path} is damaged: its sha256 is not the one in store.json")
    ranges_2D = read_npy(data)
    if ranges_2D.shape != (2, info.dim) or ranges_2D.dtype != np.float32:
        raise CorruptFileError(f"{path} holds {ranges_2D.dtype} {ranges_2D.shape} instead of float32 (2, {info.dim})")
    return Codec(info.dtype, ranges_2D)


def write_codec(storage: Storage, codec: Codec) -> CodecSpec | None:
    """Keep the parameters of an int8 codec in a new file, for a store that is made next; None for other dtypes."""
    if not codec.has_codes:
        return None
    buffer = io.BytesIO()
    np.save(buffer, codec.ranges_2D)
    spec = CodecSpec(path=f"{CODECS}/{uuid.uuid4().hex}.npy", sha256=digest_of(buffer.getvalue(), "sha256"))
    storage.write_bytes(spec.path, buffer.getvalue())
    read_verified(storage, spec.path, "sha256", spec.sha256)
    return spec
