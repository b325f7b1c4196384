"""Mean and standard deviation of each dimension, in float64, merged over files.

Source of the merge: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm", 1979.
"""

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from featurestore.errors import CorruptFileError
from featurestore.format.codec import read_npy
from featurestore.format.rows import to_float32
from featurestore.keys import AnyArray, Float32Array, Float64Array
from featurestore.text import DType

Scaling = Literal["each", "common"]

_BLOCK_ROWS = 512
# A dimension that hardly varies (a unit that fires for one image in thousands) would be blown up by its own deviation.
_LEAST_RELATIVE_STD = 0.1


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and standard deviation (of the population) of each dimension over `count` live rows, float32 (D,).

    A dimension that never changes has a deviation of 0; so has every dimension of an empty snapshot.
    """

    count: int
    mean_D: Float32Array
    std_D: Float32Array


def input_scale(std_D: npt.ArrayLike, scaling: Scaling) -> Float64Array:
    """Return what E multiplies centred dimensions by, (D,): each by 1 / std, or all by one number in common.

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
        for start in range(0, len(features_ND), _BLOCK_ROWS):
            block_ND = to_float32(features_ND[start : start + _BLOCK_ROWS], dtype)
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
            raise CorruptFileError(f"{path} is damaged: {error}") from error
        if moments_2D.dtype != np.float64 or moments_2D.ndim != 2 or len(moments_2D) != 2:
            raise CorruptFileError(f"{path} is damaged: it has {moments_2D.dtype} {moments_2D.shape}, not two rows")
        return cls(count, moments_2D[0], moments_2D[1])
