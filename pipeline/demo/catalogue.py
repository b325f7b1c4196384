"""The items on sale: one picture each, its category (an ID) and its look (only in the pixels)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Catalogue:
    """The items of a demo, in a fixed order.

    `look_IK` holds the attributes of each picture, every column with mean 0 and standard deviation 1. `weight_K` says
    how much each attribute counts in a taste.
    """

    uris: tuple[str, ...]
    category_I: IntArray
    category_names: tuple[str, ...]
    look_IK: FloatArray
    look_names: tuple[str, ...]
    weight_K: FloatArray
    vivid: int  # the column of look_IK that says how vivid the picture is

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.uris)


def standardize(values_IK: FloatArray) -> FloatArray:
    """Scale columns to mean 0 and standard deviation 1; a column without any variation becomes 0."""
    centred_IK = values_IK - values_IK.mean(axis=0)
    std_K = centred_IK.std(axis=0)
    flat_K = std_K < 1e-9 * (1 + np.abs(values_IK).max(axis=0, initial=0))
    return np.where(flat_K, 0.0, centred_IK / np.where(flat_K, 1.0, std_K))
