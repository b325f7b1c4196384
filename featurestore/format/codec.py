"""Codecs of features: float types, int8 and the basis of compact stores.

Letters of shapes: N rows, D feature width.

Letters of shapes: N rows, D width of the wider rows, K components, which is the width of the compact ones.
"""

import io
import threading
import uuid
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors import numpy as tensors

from featurestore.errors import CorruptFileError, InvalidRowsError
from featurestore.format.datafile import digest_of, read_verified
from featurestore.format.rows import FeatureRows, finite_rows, to_bits, to_float32
from featurestore.spec import STORAGE_DTYPES, CodecSpec, ExtractorSpec, Frozen, OptionalId, ReductionSpec, StoreInfo
from featurestore.storage.storage import Storage
from featurestore.text import DType, first_mistake, parse_json

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


ENDING = ".safetensors"
_ABOUT = "origin"  # the one key of the file's metadata: safetensors writes several in any order
_BLOCK_ROWS = 1024

Float64Array = npt.NDArray[np.float64]


class BasisOrigin(Frozen):
    """What a basis was made of: a snapshot by its ids, the network whose rows it has, and their number and variance."""

    store_id: OptionalId
    version: int
    commit_id: OptionalId
    extractor: ExtractorSpec
    num_rows: int
    total_variance: float
    """Sum over all D dimensions."""


@dataclass(frozen=True)
class Basis:
    """The K directions in which rows vary most, the first one most of all; all in float64.

    `components_KD` are orthonormal, the largest number of each above zero; `spectrum_K` are the variances of the rows
    along them (of the population), descending.
    """

    mean_D: Float64Array
    components_KD: Float64Array
    spectrum_K: Float64Array
    origin: BasisOrigin

    @property
    def full_dim(self) -> int:
        """Width of a full row, D."""
        return int(self.components_KD.shape[1])

    @property
    def dim(self) -> int:
        """Number of components, K."""
        return int(self.components_KD.shape[0])

    @property
    def variance_kept(self) -> float:
        """Share of the total variance that the components have; 1 where nothing varies."""
        total = self.origin.total_variance
        return min(1.0, float(self.spectrum_K.sum()) / total) if total else 1.0

    def first(self, dims: int) -> "Basis":
        """Return the basis of the first `dims` components."""
        return replace(self, components_KD=self.components_KD[:dims], spectrum_K=self.spectrum_K[:dims])

    def project(self, values_ND: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
        """Return the coordinates (N, K) of full rows (N, D): of their distance from the mean along each component.

        Computed in float64, rounded once. Numbers that are not finite give such coordinates. Raises InvalidRowsError
        for another width. Cost: N x K x D multiplications.
        """
        self._check_width(values_ND, self.full_dim)
        out_NK = np.empty((len(values_ND), self.dim), np.float32)
        for start in range(0, len(values_ND), _BLOCK_ROWS):
            centred = values_ND[start : start + _BLOCK_ROWS] - self.mean_D
            with np.errstate(invalid="ignore", over="ignore"):
                out_NK[start : start + _BLOCK_ROWS] = centred @ self.components_KD.T
        return out_NK

    def restored(self, coordinates_NK: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
        """Return the full rows (N, D) that coordinates (N, K) describe: nothing is left of other directions."""
        self._check_width(coordinates_NK, self.dim)
        rows_ND = coordinates_NK.astype(np.float64) @ self.components_KD + self.mean_D
        return rows_ND.astype(np.float32)

    def to_bytes(self) -> bytes:
        """Return a safetensors file with `mean`, `components`, `spectrum`, and the origin as JSON in its metadata."""
        arrays = {"mean": self.mean_D, "components": self.components_KD, "spectrum": self.spectrum_K}
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return tensors.save(contiguous, metadata={_ABOUT: self.origin.model_dump_json()})

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> "Basis":
        """Read what `to_bytes` wrote. Raises CorruptFileError naming `path`."""
        try:
            arrays = tensors.load(data)
            mean_D, components_KD, spectrum_K = (arrays[name] for name in ("mean", "components", "spectrum"))
            origin = BasisOrigin.model_validate_json(file_metadata(data)[_ABOUT])
        except (SafetensorError, KeyError, ValueError) as error:
            why = first_mistake(error) if isinstance(error, ValidationError) else error
            raise CorruptFileError(f"{path} is no basis of a compact store: {why}") from error
        shapes = (components_KD.shape[1:], components_KD.shape[:1])
        if components_KD.ndim != 2 or (mean_D.shape, spectrum_K.shape) != shapes:
            raise CorruptFileError(
                f"{path} is no basis of a compact store: mean {mean_D.shape}, components {components_KD.shape} and"
                f" spectrum {spectrum_K.shape} do not fit together"
            )
        if any(each.dtype != np.float64 or not np.isfinite(each).all() for each in arrays.values()):
            raise CorruptFileError(f"{path} is no basis of a compact store: not all of its numbers are finite float64")
        return cls(mean_D, components_KD, spectrum_K, origin)

    def _check_width(self, rows: npt.NDArray[Any], width: int) -> None:
        if rows.ndim != 2 or rows.shape[1] != width:
            raise InvalidRowsError(
                f"rows have shape {rows.shape}, and the basis is of (N, {self.full_dim}) for (N, {self.dim}): it takes"
                f" (N, {width}) here"
            )


def basis_of(info: StoreInfo, storage: Storage) -> Basis | None:
    """Read the basis of the store of `info`; None where it is not compact. Raises CorruptFileError."""
    if info.reduction is None:
        return None
    path = storage.full(info.reduction.path)
    try:
        data = read_verified(storage, info.reduction.path, "sha256", info.reduction.sha256)
    except FileNotFoundError as error:
        raise CorruptFileError(f"{path} is missing: without it nobody can make rows for the store") from error
    basis = Basis.from_bytes(data, path)
    if (basis.dim, basis.full_dim) != (info.dim, info.full_dim):
        raise CorruptFileError(
            f"{path} is a basis of {basis.full_dim} numbers for {basis.dim}, and the store's is of {info.full_dim} for"
            f" {info.dim}"
        )
    return basis


def reduction_of(basis: Basis) -> ReductionSpec:
    """Return what the spec of a store of this basis says: equal for equal numbers and origins."""
    sha256 = digest_of(basis.to_bytes(), "sha256")
    return ReductionSpec(path=f"{CODECS}/{sha256}{ENDING}", sha256=sha256, full_dim=basis.full_dim)


def write_basis(storage: Storage, basis: Basis) -> ReductionSpec:
    """Keep a basis in a file named by its digest, for a store that is made next; the same one again changes nothing."""
    spec = reduction_of(basis)
    storage.write_bytes(spec.path, basis.to_bytes())
    read_verified(storage, spec.path, "sha256", spec.sha256)
    return spec


def file_metadata(data: bytes) -> dict[str, str]:
    """Return the texts in the header of a safetensors file, which `tensors.load` leaves out."""
    length = int.from_bytes(data[:8], "little")
    found: dict[str, str] = parse_json(data[8 : 8 + length])["__metadata__"]
    return found


# numpy reads a file's header by ast.literal_eval, which Python 3.11 may fail in two threads at once: "AST constructor
# recursion depth mismatch" (cpython#106905).
_lock = threading.Lock()


def read_npy(data: bytes | memoryview) -> NDArray[Any]:
    """Read the array in the bytes of an .npy file. Raises ValueError where they are none; nothing is unpickled."""
    with _lock:
        array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array
