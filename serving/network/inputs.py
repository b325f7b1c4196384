"""Inputs of a bundle's network: the rows looked up for each field, for some users and all their candidates.

The shapes are those of a batch of the trainer (trainer/samples/reader.py): G users, B candidates of all of them, one
user's after the other's; M = G on the user side and B on the ad side; N values of a field; V width of its vectors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


class FieldRows(NamedTuple):
    """The vectors of an id, multi_id or content field: row m holds the next `lengths_M[m]` of `rows_NV`."""

    rows_NV: Float32
    lengths_M: Int64
    weights_N: Float32 | None = None
    """Of a field with weights."""
    sizes_K: Int64 | None = None
    """Of a content field with galleries: the images of each ad or behaviour. `rows_NV` are then those of the images,
    one ad's or behaviour's after the other's, and `lengths_M` counts ads (1) or behaviours (K in all)."""


@dataclass(frozen=True, kw_only=True)
class NearestRows:
    """The behaviours nearest to each candidate's image, and the histogram of all (trainer/engine/similarity.py)."""

    tiers_BT: Float32
    nearest_N: Int64
    """Places in the behaviour field's `rows_NV`, candidate by candidate, most similar first."""
    lengths_B: Int64


@dataclass(frozen=True, kw_only=True)
class NetworkInputs:
    """All inputs of one call of the network."""

    group_of_sample_B: Int64
    """The user of each candidate, in [0, G), ascending."""
    num_groups: int
    fields: Mapping[str, FieldRows]
    dense: Mapping[str, Float32] = field(default_factory=dict)
    """Every dense field, (M, width), as the model takes it (trainer/samples/values.py)."""
    similar: Mapping[str, NearestRows] = field(default_factory=dict)
    """By behaviour field, where the model compares images."""
