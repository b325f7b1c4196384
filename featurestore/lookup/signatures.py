"""Signatures: some bits of each image that tell how similar two images are, so that their features need not travel.

Letters of shapes: Q keys, N pairs, D feature width, W words of a signature.
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.lookup.partition import FeaturePartition

BITS = 512
WORDS = BITS // 64 + 1
"""The bits, and a last word that is 1 for an image with a feature."""
_BLOCK_ROWS = 64

Words = npt.NDArray[np.uint64]
Scaling = tuple[npt.NDArray[Any], npt.NDArray[Any]]


class Signatures:
    """SimHash of one rank's features: bit b says on which side of a random plane through the mean a feature lies.

    Two vectors at angle a differ in a share a / pi of such bits (Charikar, "Similarity estimation techniques from
    rounding algorithms", STOC 2002): of 512, with a deviation of 0.07 rad at most. Features are standardised first:
    those of images point nearly all the same way, and only what differs from the mean distinguishes them.

    A signature depends on the feature, the scaling and the seed alone, not on the rank or on what else is asked. It
    is made at the first look at its image and kept: 72 bytes a row, and a product of D x 512 once.
    """

    def __init__(self, partition: FeaturePartition, scaling: Callable[[], Scaling], seed: int = 0) -> None:
        """`scaling` gives the mean of each dimension, and what to multiply by after it; asked at the first look."""
        self._partition, self._scaling, self._seed = partition, scaling, seed
        self._planes: Scaling | None = None
        self._words_NW = np.zeros((partition.num_rows, WORDS), np.uint64)
        self._lock = threading.Lock()

    def of(self, keys_Q: npt.NDArray[np.int64]) -> Words:
        """Return the signatures (Q, W) of keys that this rank owns; zeros for a key without a feature."""
        place_Q = self._partition.places(keys_Q)
        with self._lock:
            known_Q = place_Q >= 0
            new_Q = known_Q.copy()
            new_Q[known_Q] = self._words_NW[place_Q[known_Q], -1] == 0
            if new_Q.any():
                if self._planes is None:
                    self._planes = self._drawn()
                self._make(*self._planes, keys_Q[new_Q], place_Q[new_Q])
            words_QW = np.zeros((len(keys_Q), WORDS), np.uint64)
            words_QW[known_Q] = self._words_NW[place_Q[known_Q]]
        return words_QW

    def _drawn(self) -> Scaling:
        """Draw the random planes; return the mean, and the planes of scaled features, (D, B)."""
        mean_D, inverse_std_D = self._scaling()
        planes_DB = np.random.default_rng(self._seed).standard_normal((self._partition.dim, BITS))
        return mean_D.astype(np.float32), (planes_DB * inverse_std_D[:, None]).astype(np.float32)

    def _make(
        self,
        mean_D: npt.NDArray[Any],
        planes_DB: npt.NDArray[Any],
        keys_Q: npt.NDArray[np.int64],
        place_Q: npt.NDArray[np.int64],
    ) -> None:
        """Make signatures in blocks of one size, the last one filled up: so a row's bits do not depend on the number of
        rows."""
        for start in range(0, len(keys_Q), _BLOCK_ROWS):
            here = slice(start, start + _BLOCK_ROWS)
            features_QD = self._partition.codec.decode(self._partition.lookup(keys_Q[here]).features_UD)
            block_QD = np.zeros((_BLOCK_ROWS, self._partition.dim), np.float32)
            block_QD[: len(features_QD)] = features_QD - mean_D
            bits_QB = (block_QD @ planes_DB)[: len(features_QD)] > 0
            packed: npt.NDArray[Any] = np.packbits(bits_QB, axis=1, bitorder="little")
            self._words_NW[place_Q[here], :-1] = packed.view(np.uint64)
            self._words_NW[place_Q[here], -1] = 1


def cosines(one_NW: Words, other_NW: Words) -> npt.NDArray[np.float32]:
    """Estimate the cosine of each pair from their signatures, (N,); NaN where one of them has no feature."""
    differing_N = np.bitwise_count(one_NW[:, :-1] ^ other_NW[:, :-1]).sum(axis=1, dtype=np.int64)
    cosine_N: npt.NDArray[np.float32] = np.cos(np.pi / BITS * differing_N).astype(np.float32)
    cosine_N[(one_NW[:, -1] & other_NW[:, -1]) == 0] = np.nan
    return cosine_N
