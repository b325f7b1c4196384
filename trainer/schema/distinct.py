"""How many different integers a long stream has, roughly, in a fixed amount of memory."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featurestore.keys import UInt64Array, splitmix64

_KEPT = 4096


@dataclass(frozen=True)
class DistinctCount:
    """The smallest 4,096 hashes of what was seen: exact up to that number of values, then with an error of about 1.6 %.

    Source: Bar-Yossef et al., "Counting distinct elements in a data stream", 2002: the k-th smallest of n hashes that
    are spread evenly over [0, 1) is about k / n. The standard error is 1 / sqrt(k - 2).
    """

    hashes_K: UInt64Array = dataclasses.field(default_factory=lambda: np.empty(0, np.uint64))  # ascending

    def with_values(self, values_N: npt.ArrayLike) -> "DistinctCount":
        """Add these int64 values to what was seen."""
        return self._kept(splitmix64(values_N) if np.size(values_N) else np.empty(0, np.uint64))

    def merged(self, other: "DistinctCount") -> "DistinctCount":
        """Merge what both saw."""
        return self._kept(other.hashes_K)

    @property
    def is_exact(self) -> bool:
        """Whether `estimate` is no estimate."""
        return len(self.hashes_K) < _KEPT

    @property
    def estimate(self) -> int:
        """The estimated number of different values seen."""
        if self.is_exact:
            return len(self.hashes_K)
        return round((_KEPT - 1) * 2.0**64 / (float(self.hashes_K[-1]) + 1))

    def _kept(self, more_N: UInt64Array) -> "DistinctCount":
        if not self.is_exact:
            more_N = more_N[more_N < self.hashes_K[-1]]  # the others are not among the smallest
        if len(self.hashes_K):  # most of a stream was seen before
            place_N = np.searchsorted(self.hashes_K, more_N).clip(max=len(self.hashes_K) - 1)
            more_N = more_N[self.hashes_K[place_N] != more_N]
        if not len(more_N):
            return self
        every_N = np.concatenate([self.hashes_K, more_N])
        every_N.sort(kind="stable")  # quicker than others, as most are in order
        is_first_N = np.ones(len(every_N), np.bool_)
        np.not_equal(every_N[1:], every_N[:-1], out=is_first_N[1:])
        return DistinctCount(every_N[is_first_N][:_KEPT])
