"""Numbers of features: float types, the basis of compact stores, and mean and standard deviation of each dimension.

Letters of shapes: N rows, D width of the wider rows, K components, which is the width of the compact ones.
Source of the merge of moments: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm", 1979.
"""

import io
import threading
import tokenize
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors import numpy as tensors

from featurestore.errors import CorruptFileError, InvalidRowsError
from featurestore.format.datafile import FeatureRows, digest_of, finite_rows, read_verified, to_bits, to_float32
from featurestore.keys import AnyArray, BoolArray, Float32Array, Float64Array, FloatArray
from featurestore.parsing import first_mistake, parse_json
from featurestore.problems import Problem
from featurestore.spec import STORAGE_DTYPES, ExtractorSpec, Frozen, OptionalId, ReductionSpec, StoreInfo
from featurestore.storage.storage import Storage
from featurestore.text import DType

BASES = "basis"
_ABOUT = "origin"  # the one key of the file's metadata: safetensors writes several in any order
_BLOCK_ROWS = 1024
_lock = threading.Lock()
Scaling = Literal["each", "common"]
_MOMENTS_ROWS = 512
_LEAST_RELATIVE_STD = 0.1


@dataclass(frozen=True)
class Codec:
    """The way in which a store keeps numbers: as `dtype`, rounded to nearest."""

    dtype: DType

    def encode(self, values_ND: FloatArray) -> AnyArray:
        """Return `values_ND` as the store keeps them, (N, D) in its storage dtype; right for every dtype.

        Raises InvalidRowsError where the store cannot hold a row; `encode_storable` says which it can.
        """
        bits_ND, storable_N = self.encode_storable(values_ND)
        if not storable_N.all():
            raise InvalidRowsError(Problem.ROW_NOT_FINITE, np.flatnonzero(~storable_N)[0], self.dtype)
        return bits_ND

    def encode_storable(self, values_ND: FloatArray) -> tuple[AnyArray, BoolArray]:
        """Encode, and return which rows the store can hold, (N,): those finite before and after. Never raises."""
        bits_ND = to_bits(values_ND, self.dtype)
        return bits_ND, finite_rows(bits_ND, self.dtype)

    def encode_rows(self, rows: FeatureRows) -> FeatureRows:
        """Return `rows` with their features encoded, where they are of another float type than the store's own.

        Never raises: `FeatureRows.validate` finds rows that the store cannot hold.
        """
        features_ND = rows.features_ND
        if features_ND.dtype.kind != "f" or features_ND.dtype == STORAGE_DTYPES[self.dtype] or features_ND.ndim != 2:
            return rows  # encoded already, or `validate` names the mistake
        return replace(rows, features_ND=to_bits(features_ND, self.dtype))

    def decode(self, bits_ND: AnyArray) -> Float32Array:
        """Return the numbers behind stored ones, float32 (N, D); exact."""
        return to_float32(bits_ND, self.dtype)


class BasisOrigin(Frozen):
    """The origin of a basis: a snapshot by its ids, the network of its rows, and their number and variance."""

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

    def project(self, values_ND: FloatArray) -> Float32Array:
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

    def restored(self, coordinates_NK: FloatArray) -> Float32Array:
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
            header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])  # `load` leaves out the texts in it
            origin = BasisOrigin.model_validate_json(header["__metadata__"][_ABOUT])
        except (SafetensorError, KeyError, ValueError) as error:
            why = first_mistake(error) if isinstance(error, ValidationError) else error
            raise CorruptFileError(Problem.NOT_A_BASIS, path, why) from error
        return cls(mean_D, components_KD, spectrum_K, origin)

    def _check_width(self, rows: AnyArray, width: int) -> None:
        if rows.ndim != 2 or rows.shape[1] != width:
            raise InvalidRowsError(Problem.WRONG_ROW_SHAPE, rows.shape, self.full_dim, self.dim, width)


def basis_of(info: StoreInfo, storage: Storage) -> Basis | None:
    """Read the basis of the store of `info`; None if it is not compact. Raises CorruptFileError."""
    if info.reduction is None:
        return None
    path = storage.full(info.reduction.path)
    try:
        data = read_verified(storage, info.reduction.path, "sha256", info.reduction.sha256)
    except FileNotFoundError as error:
        raise CorruptFileError(Problem.BASIS_MISSING, path) from error
    basis = Basis.from_bytes(data, path)
    if (basis.dim, basis.full_dim) != (info.dim, info.full_dim):
        raise CorruptFileError(Problem.ANOTHER_BASIS, path, basis.full_dim, basis.dim, info.full_dim, info.dim)
    return basis


def write_basis(storage: Storage, basis: Basis) -> ReductionSpec:
    """Keep a basis in a file named by its digest, for a store that is made next; the same one again changes nothing."""
    data = basis.to_bytes()
    sha256 = digest_of(data, "sha256")
    path = f"{BASES}/{sha256}.safetensors"
    storage.write_bytes(path, data)
    read_verified(storage, path, "sha256", sha256)
    return ReductionSpec(path=path, sha256=sha256, full_dim=basis.full_dim)


# numpy reads a file's header by ast.literal_eval, which Python 3.11 may fail in two threads at once: "AST constructor
# recursion depth mismatch" (cpython#106905).


def read_npy(data: bytes | memoryview) -> AnyArray:
    """Read the array in the bytes of an .npy file. Raises ValueError where they are none; nothing is unpickled."""
    try:
        with _lock:
            array: AnyArray = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (MemoryError, OverflowError, SyntaxError, TypeError, tokenize.TokenError) as error:  # of a damaged header
        raise ValueError(Problem.NOT_AN_ARRAY.of(error)) from error
    return array


# A dimension that hardly varies (a unit that fires for one image in thousands) would be blown up by its own deviation.


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and standard deviation (of the population) of each dimension over `count` live rows, float32 (D,).

    A dimension that never changes has a deviation of 0; so has every dimension of an empty snapshot.
    """

    count: int
    mean_D: Float32Array
    std_D: Float32Array


def input_scale(std_D: npt.ArrayLike, scaling: Scaling) -> Float64Array:
    """Return the factors of the centred dimensions in E, (D,): each by 1 / std, or all by one number in common.

    Of "each", deviations below a tenth of their mean are raised to it. The one number gives the dimensions a variance
    of 1 in the mean. So those that vary little stay small, which suits components, of which the last are mostly noise.
    It is 1 where nothing varies.
    """
    std = np.asarray(std_D, dtype=np.float64)
    if scaling == "each":
        floor = _LEAST_RELATIVE_STD * float(std.mean()) if len(std) else 0.0
        return np.asarray(1.0 / np.maximum(std, floor if floor > 0 else 1.0))
    mean_square = float(np.mean(std**2)) if len(std) else 0.0
    return np.full(len(std), 1.0 / np.sqrt(mean_square) if mean_square > 0 else 1.0)


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared distances from the mean: what can be merged."""

    count: int
    mean_D: Float64Array
    m2_D: Float64Array

    @classmethod
    def empty(cls, dim: int) -> "Moments":
        """Return the moments of no rows."""
        return cls(0, np.zeros(dim), np.zeros(dim))

    @classmethod
    def of(cls, features_ND: AnyArray, dtype: DType) -> "Moments":
        """Compute moments of stored rows, (N, D) in the storage dtype, by blocks."""
        moments = cls.empty(features_ND.shape[1])
        for start in range(0, len(features_ND), _MOMENTS_ROWS):
            block_ND = to_float32(features_ND[start : start + _MOMENTS_ROWS], dtype)
            mean_D = block_ND.mean(axis=0, dtype=np.float64)
            centred_ND = block_ND - mean_D.astype(np.float32)
            # Distances from the rounded mean: take the rounding back out of the sum of squares.
            rounding_D = mean_D - mean_D.astype(np.float32)
            squares_D = np.einsum("nd,nd->d", centred_ND, centred_ND, dtype=np.float64)
            m2_D = np.maximum(squares_D - len(block_ND) * rounding_D**2, 0.0)
            moments = moments.merged(cls(len(block_ND), mean_D, m2_D))
        return moments

    def merged(self, other: "Moments") -> "Moments":
        """Merge the moments of two sets of rows."""
        count = self.count + other.count
        if count == 0:
            return self
        delta_D = other.mean_D - self.mean_D
        mean_D = self.mean_D + delta_D * (other.count / count)
        m2_D = self.m2_D + other.m2_D + delta_D**2 * (self.count * other.count / count)
        return Moments(count, mean_D, m2_D)

    def statistics(self) -> FeatureStatistics:
        """Return mean and deviation."""
        std_D = np.sqrt(self.m2_D / max(self.count, 1))
        return FeatureStatistics(self.count, self.mean_D.astype(np.float32), std_D.astype(np.float32))

    @property
    def size_bytes(self) -> int:
        """Size of `to_bytes`, but for a header of 128 bytes."""
        return self.mean_D.nbytes + self.m2_D.nbytes

    def to_bytes(self) -> bytes:
        """Return a .npy file of float64 (2, D); the count is in the manifest."""
        buffer = io.BytesIO()
        np.save(buffer, np.stack([self.mean_D, self.m2_D]))
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, count: int, path: str) -> "Moments":
        """Read what `to_bytes` wrote. Raises CorruptFileError."""
        try:
            moments_2D = read_npy(data)
        except ValueError as error:
            raise CorruptFileError(Problem.DAMAGED, path, error) from error
        if moments_2D.dtype != np.float64 or moments_2D.ndim != 2 or len(moments_2D) != 2:
            raise CorruptFileError(Problem.NOT_TWO_ROWS, path, moments_2D.dtype, moments_2D.shape)
        return cls(count, moments_2D[0], moments_2D[1])
