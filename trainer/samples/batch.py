"""One rank's part of a global batch, as plain numpy arrays.

Letters of shapes, here and in the whole package: P ranks, G groups and B samples on this rank, M rows of a side
(G on the user side, B on the ad side), N values of a field, U unique keys asked, R keys received, Q unique among R,
D feature width, V vector width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Jagged:
    """Rows of uneven length: row m holds the next `lengths_M[m]` of `values_N`."""

    values_N: NDArray[np.int64]
    lengths_M: NDArray[np.int32]


@dataclass(frozen=True)
class BatchPosition:
    """Where in the run a global batch is; both count from zero."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Batch:
    """The samples of one global batch that this rank has; G = B = 0 is a valid batch on any rank."""

    fields: Mapping[str, Jagged]
    """Every id, multi_id and content field; M = G on the user side, M = B on the ad side."""
    dense: Mapping[str, NDArray[np.float32]]
    """Every dense field, (M, width)."""
    group_of_sample_B: NDArray[np.int64]
    """Row of the user side that each sample belongs to, in [0, G)."""
    label_B: NDArray[np.float32]
    group_id_B: NDArray[np.int64]
    """The user of each sample, for GAUC."""
    global_samples: int
    """Samples of the global batch, over all ranks: the loss is the sum over local samples divided by it."""
    weights: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Of the fields whose ids have weights, one for each value (N,)."""
    galleries: Mapping[str, Jagged] = field(default_factory=dict)
    """Of content fields with galleries: `values_N` are the numbers of images of each ad or behaviour (in `fields` their
    keys stand one after the other), `lengths_M` the ads (1) or behaviours of a row."""
    position: BatchPosition = field(default=BatchPosition(0, 0))
    place_B: NDArray[np.int64] | None = None
    """Place of each sample in the global batch; None: in this order, from 0 on."""

    @property
    def num_samples(self) -> int:
        """The number B of samples."""
        return len(self.label_B)

    @property
    def places(self) -> NDArray[np.int64]:
        """Place of each sample in the global batch."""
        return np.arange(self.num_samples) if self.place_B is None else self.place_B
