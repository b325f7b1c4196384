"""Signatures: some bits of each image that tell how similar two images are, so that their features need not travel.

Letters of shapes: Q keys, N pairs, D feature width, W words of a signature.
"""

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.partition import FeaturePartition
from featurestore.statistics import FeatureStatistics, inverse_std

BITS = 512
WORDS = BITS // 64 + 1
"""The bits, and a last word that is 1 for an image with a feature."""
_BLOCK_ROWS = 64

Words = npt.NDArray[np.uint64]


class Signatures:
    """SimHash of one rank's features: bit b says on which side of a random plane through the mean a feature lies.

    Two vectors at angle a differ in a share a / pi of such bits (Charikar, "Similarity estimation techniques from
    rounding algorithms", STOC 2002): of 512, with a deviation of 0.07 rad at most. Features are standardised first:
    those of images point nearly all the same way, and only what differs from the mean tells them apart.

    A signature depends on the feature, the statistics and the seed alone, not on the rank or on what else is asked. It
    is made at the first look at its image and kept: 72 bytes a row, and a product of D x 512 once.
    """

    def __init__(self, partition: FeaturePartition, statistics: FeatureStatistics, seed: int = 0) -> None:
        self._partition = partition
        self._mean_D = statistics.mean_D
        planes_DB = np.random.default_rng(seed).standard_normal((partition.dim, BITS))
        self._planes_DB = (planes_DB * inverse_std(statistics.std_D)[:, None]).astype(np.float32)
        self._words_NW = np.zeros((partition.num_rows, WORDS), np.uint64)
        self._lock = threading.Lock()

    def of(self, keys_Q: npt.NDArray[np.int64]) -> Words:
        """Signatures (Q, W) of keys that this rank owns; zeros for a key without a feature."""
        place_Q = self._partition.places(keys_Q)
        with self._lock:
            known_Q = place_Q >= 0
            new_Q = known_Q.copy()
            new_Q[known_Q] = self._words_NW[place_Q[known_Q], -1] == 0
            if new_Q.any():
                self._make(keys_Q[new_Q], place_Q[new_Q])
            words_QW = np.zeros((len(keys_Q), WORDS), np.uint64)
            words_QW[known_Q] = self._words_NW[place_Q[known_Q]]
        return words_QW

    def _make(self, keys_Q: npt.NDArray[np.int64], place_Q: npt.NDArray[np.int64]) -> None:
        """In blocks of one size, the last one filled up: so a row's bits do not depend on the number of rows."""
        for start in range(0, len(keys_Q), _BLOCK_ROWS):
            here = slice(start, start + _BLOCK_ROWS)
            features_QD = self._partition.codec.decode(self._partition.lookup(keys_Q[here]).features_UD)
            block_QD = np.zeros((_BLOCK_ROWS, self._partition.dim), np.float32)
            block_QD[: len(features_QD)] = features_QD - self._mean_D
            bits_QB = (block_QD @ self._planes_DB)[: len(features_QD)] > 0
            packed: npt.NDArray[Any] = np.packbits(bits_QB, axis=1, bitorder="little")
            self._words_NW[place_Q[here], :-1] = packed.view(np.uint64)
            self._words_NW[place_Q[here], -1] = 1


def cosines(one_NW: Words, other_NW: Words) -> npt.NDArray[np.float32]:
    """The cosine of each pair as their signatures tell it, (N,); NaN where one of them has no feature."""
    differing_N = np.bitwise_count(one_NW[:, :-1] ^ other_NW[:, :-1]).sum(axis=1, dtype=np.int64)
    cosine_N: npt.NDArray[np.float32] = np.cos(np.pi / BITS * differing_N).astype(np.float32)
    cosine_N[(one_NW[:, -1] & other_NW[:, -1]) == 0] = np.nan
    return cosine_N
