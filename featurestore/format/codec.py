"""Codecs of features: float types, and the basis of compact stores.

Letters of shapes: N rows, D width of the wider rows, K components, which is the width of the compact ones.
"""

import io
import threading
import tokenize
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors import numpy as tensors

from featurestore.errors import CorruptFileError, InvalidRowsError
from featurestore.format.datafile import digest_of, read_verified
from featurestore.format.rows import FeatureRows, finite_rows, to_bits, to_float32
from featurestore.keys import AnyArray, BoolArray, Float32Array, Float64Array
from featurestore.parsing import first_mistake, parse_json
from featurestore.spec import STORAGE_DTYPES, ExtractorSpec, Frozen, OptionalId, ReductionSpec, StoreInfo
from featurestore.storage.storage import Storage
from featurestore.text import DType

BASES = "basis"


@dataclass(frozen=True)
class Codec:
    """The way in which a store keeps numbers: as `dtype`, rounded to nearest."""

    dtype: DType

    def encode(self, values_ND: npt.NDArray[np.floating[Any]]) -> AnyArray:
        """Return `values_ND` as the store keeps them, (N, D) in its storage dtype; right for every dtype.

        Raises InvalidRowsError where the store cannot hold a row; `encode_storable` says which it can.
        """
        bits_ND, storable_N = self.encode_storable(values_ND)
        if not storable_N.all():
            raise InvalidRowsError(f"row {np.flatnonzero(~storable_N)[0]} is not finite in {self.dtype}")
        return bits_ND

    def encode_storable(self, values_ND: npt.NDArray[np.floating[Any]]) -> tuple[AnyArray, BoolArray]:
        """Encode, and return which rows the store can hold, (N,): those finite before and after. Never raises."""
        bits_ND = to_bits(values_ND, self.dtype)
        return bits_ND, finite_rows(bits_ND, self.dtype)

    def encode_rows(self, rows: FeatureRows) -> FeatureRows:
        """Return `rows` with their features encoded, where they are of another float type than the store's own.

        Never raises: `FeatureRows.validate` finds what the store cannot hold.
        """
        features_ND = rows.features_ND
        if features_ND.dtype.kind != "f" or features_ND.dtype == STORAGE_DTYPES[self.dtype] or features_ND.ndim != 2:
            return rows  # encoded already, or `validate` names the mistake
        return replace(rows, features_ND=to_bits(features_ND, self.dtype))

    def decode(self, bits_ND: AnyArray) -> Float32Array:
        """Return the numbers behind stored ones, float32 (N, D); exact."""
        return to_float32(bits_ND, self.dtype)


_ABOUT = "origin"  # the one key of the file's metadata: safetensors writes several in any order
_BLOCK_ROWS = 1024


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

    def project(self, values_ND: npt.NDArray[np.floating[Any]]) -> Float32Array:
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

    def restored(self, coordinates_NK: npt.NDArray[np.floating[Any]]) -> Float32Array:
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
            raise CorruptFileError(f"{path} is not the basis of a compact store: {why}") from error
        return cls(mean_D, components_KD, spectrum_K, origin)

    def _check_width(self, rows: AnyArray, width: int) -> None:
        if rows.ndim != 2 or rows.shape[1] != width:
            raise InvalidRowsError(
                f"rows have shape {rows.shape}, and the basis is of (N, {self.full_dim}) for (N, {self.dim}): it takes"
                f" (N, {width}) here"
            )


def basis_of(info: StoreInfo, storage: Storage) -> Basis | None:
    """Read the basis of the store of `info`; None if it is not compact. Raises CorruptFileError."""
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


def write_basis(storage: Storage, basis: Basis) -> ReductionSpec:
    """Keep a basis in a file named by its digest, for a store that is made next; the same one again changes nothing."""
    data = basis.to_bytes()
    sha256 = digest_of(data, "sha256")
    path = f"{BASES}/{sha256}.safetensors"
    storage.write_bytes(path, data)
    read_verified(storage, path, "sha256", sha256)
    return ReductionSpec(path=path, sha256=sha256, full_dim=basis.full_dim)


def file_metadata(data: bytes) -> dict[str, str]:
    """Return the texts in the header of a safetensors file, which `tensors.load` leaves out."""
    length = int.from_bytes(data[:8], "little")
    found: dict[str, str] = parse_json(data[8 : 8 + length])["__metadata__"]
    return found


# numpy reads a file's header by ast.literal_eval, which Python 3.11 may fail in two threads at once: "AST constructor
# recursion depth mismatch" (cpython#106905).
_lock = threading.Lock()


def read_npy(data: bytes | memoryview) -> AnyArray:
    """Read the array in the bytes of an .npy file. Raises ValueError where they are none; nothing is unpickled."""
    try:
        with _lock:
            array: AnyArray = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (MemoryError, OverflowError, SyntaxError, TypeError, tokenize.TokenError) as error:  # of a damaged header
        raise ValueError(f"it is not an array as numpy writes one: {error}") from error
    return array
