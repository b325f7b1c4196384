"""Features that a device holds: E then looks nothing up, and a step carries only the places of its keys there.

Letters of shapes as in featurestore/lookup/embedding.py.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurestore.lookup.embedding import EmbeddingService, Gathered, as_tensor, on_device
from featurestore.lookup.partition import FeaturePartition

_HELD_BLOCK_ROWS = 65_536


class HeldRows:
    """All rows of a partition in a device's memory, as stored; they do not follow it, as it never changes while open.

    A step then carries there only the places of its keys, 8 bytes each."""

    def __init__(self, partition: FeaturePartition, device: torch.device) -> None:
        """Raises what torch raises where memory is short (`held_bytes`)."""
        dtype = as_tensor(np.empty(0, partition.info.storage_dtype)).dtype
        self._partition = partition
        self._zeros = partition.num_rows
        shape = partition.num_rows + 1, partition.dim  # the last row: no image
        self._rows = torch.zeros(shape, dtype=dtype, device=device)
        start = 0
        for block in partition.rows(_HELD_BLOCK_ROWS):
            end = start + len(block)
            self._rows[start:end].copy_(as_tensor(block.copy()))
            start = end

    def take(self, place_Q: NDArray[np.int64]) -> Tensor:
        """Return the rows (Q, D) at these places; -1: a row of zeros."""
        place_Q = np.where(place_Q < 0, self._zeros, place_Q)
        return self._rows.index_select(0, on_device(place_Q, self._rows.device))

    def gather(self, keys_Q: NDArray[np.int64]) -> Gathered:
        """Find the features of `keys_Q` in the order asked, as `EmbeddingService.gather` does."""
        place_Q = self._partition.find(keys_Q)
        missing_Q = place_Q < 0
        return Gathered(self.take(place_Q), missing_Q if missing_Q.any() else None)


def hold_rows(service: EmbeddingService) -> None:
    """Copy all features of a service's partition to its networks' device, and let it gather them there from now on."""
    service.gather = HeldRows(service.partition, service.device).gather  # type: ignore[method-assign]
    service.holds_rows = True


def held_bytes(partition: FeaturePartition) -> int:
    """Return the bytes that `HeldRows` take."""
    return (partition.num_rows + 1) * partition.info.row_bytes
