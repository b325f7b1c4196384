"""Signatures: some bits of each image that show how similar two images are, so that their features need not travel.

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


class Planes:
    """Random planes through the mean of features: bit b of a signature says on which side of plane b a feature lies.

    Two vectors at angle a differ in a share a / pi of such bits (Charikar, "Similarity estimation techniques from
    rounding algorithms", STOC 2002): of 512, with a deviation of 0.07 rad at most. Features are standardised first:
    those of images point nearly all the same way, and only what differs from the mean distinguishes them.
    """

    def __init__(self, scaling: Scaling, seed: int = 0) -> None:
        """`scaling`: the mean of each dimension, and what to multiply by after it."""
        mean_D, inverse_std_D = scaling
        planes_DB = np.random.default_rng(seed).standard_normal((len(mean_D), BITS))
        self._mean_D = mean_D.astype(np.float32)
        self._planes_DB = (planes_DB * inverse_std_D[:, None]).astype(np.float32)

    def bits(self, features_QD: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Return the bits of features, (Q, 64) bytes, each with the bit of its first plane lowest.

        Computed in blocks of one size, the last one filled up: so a row's bits do not depend on the number of rows."""
        bits_Q64 = np.empty((len(features_QD), BITS // 8), np.uint8)
        block_QD = np.zeros((_BLOCK_ROWS, len(self._mean_D)), np.float32)
        for start in range(0, len(features_QD), _BLOCK_ROWS):
            features_CD = features_QD[start : start + _BLOCK_ROWS]
            block_QD[: len(features_CD)] = features_CD - self._mean_D
            block_QD[len(features_CD) :] = 0
            bits_CB = (block_QD @ self._planes_DB)[: len(features_CD)] > 0
            bits_Q64[start : start + _BLOCK_ROWS] = np.packbits(bits_CB, axis=1, bitorder="little")
        return bits_Q64


class Signatures:
    """Signatures of one rank's features, by `Planes`.

    A signature depends on the feature, the scaling and the seed alone, not on the rank or on what else is asked. It
    is made at the first look at its image and kept: 72 bytes a row, and a product of D x 512 once.
    """

    def __init__(self, partition: FeaturePartition, scaling: Callable[[], Scaling], seed: int = 0) -> None:
        """`scaling` gives the mean of each dimension, and what to multiply by after it; asked at the first look."""
        self._partition, self._scaling, self._seed = partition, scaling, seed
        self._planes: Planes | None = None
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
                    self._planes = Planes(self._scaling(), self._seed)
                self._make(self._planes, keys_Q[new_Q], place_Q[new_Q])
            words_QW = np.zeros((len(keys_Q), WORDS), np.uint64)
            words_QW[known_Q] = self._words_NW[place_Q[known_Q]]
        return words_QW

    def _make(self, planes: Planes, keys_Q: npt.NDArray[np.int64], place_Q: npt.NDArray[np.int64]) -> None:
        for start in range(0, len(keys_Q), _BLOCK_ROWS):
            here = slice(start, start + _BLOCK_ROWS)
            features_QD = self._partition.codec.decode(self._partition.lookup(keys_Q[here]).features_UD)
            self._words_NW[place_Q[here], :-1] = planes.bits(features_QD).view(np.uint64)
            self._words_NW[place_Q[here], -1] = 1


def cosines(one_NW: Words, other_NW: Words) -> npt.NDArray[np.float32]:
    """Estimate the cosine of each pair from their signatures, (N,); NaN where one of them has no feature."""
    differing_N = np.bitwise_count(one_NW[:, :-1] ^ other_NW[:, :-1]).sum(axis=1, dtype=np.int64)
    cosine_N: npt.NDArray[np.float32] = np.cos(np.pi / BITS * differing_N).astype(np.float32)
    cosine_N[(one_NW[:, -1] & other_NW[:, -1]) == 0] = np.nan
    return cosine_N
