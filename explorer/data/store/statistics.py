"""The numbers of a snapshot: mean and deviation of each dimension, and how long its rows are.

Letters of shapes: N rows drawn, D feature width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.format.statistics import FeatureStatistics
from featurestore.snapshot import Snapshot
from featurestore.upkeep.remake import sample

DRAWN_ROWS = 2_000
MOST_POINTS = 256
"""Of a chart of dimensions; where there are more, neighbours are put together."""
_BINS = 30
_SEED = 0
_LITTLE_BYTES = 256 << 20
"""Rows that are read for exact moments where files have no statistics of their own."""


@dataclass(frozen=True)
class StoreNumbers:
    """What is shown of a snapshot's numbers."""

    mean_D: npt.NDArray[np.float32]
    std_D: npt.NDArray[np.float32]
    num_rows: int
    """Rows behind mean and deviation."""
    is_exact: bool
    """Whether these are all rows; else they are the rows drawn."""
    norm_N: npt.NDArray[np.float64]
    """Euclidean length of each row drawn."""

    @property
    def num_constant(self) -> int:
        """Dimensions in which all rows have the same number."""
        return int(np.count_nonzero(self.std_D == 0))


def store_numbers(snapshot: Snapshot) -> StoreNumbers:
    """Read or draw them. Exact moments come from the files' own statistics; rows are read where that is little.

    Reads the rows of one row group of up to 64 shards for the norms. Raises CorruptFileError.
    """
    _, drawn_ND = sample(snapshot, DRAWN_ROWS, _SEED)
    is_exact = _is_cheap(snapshot)
    moments = snapshot.statistics() if is_exact else _moments(drawn_ND)
    norm_N = np.sqrt(np.einsum("nd,nd->n", drawn_ND, drawn_ND, dtype=np.float64))
    return StoreNumbers(moments.mean_D, moments.std_D, moments.count, is_exact, norm_N)


def histogram(values_N: npt.NDArray[Any]) -> tuple[list[float], list[int]]:
    """Count values in bins of equal width: edges, one more than counts. Without values both are empty."""
    if not len(values_N):
        return [], []
    counts, edges = np.histogram(values_N, bins=_BINS)
    return edges.tolist(), counts.tolist()


def put_together(values_D: npt.NDArray[Any]) -> tuple[list[int], list[float]]:
    """Give at most MOST_POINTS dimensions, each the first of some neighbours, and the mean of these."""
    step = max(1, -(-len(values_D) // MOST_POINTS))
    starts = np.arange(0, len(values_D), step)
    sums = np.add.reduceat(values_D.astype(np.float64), starts) if len(values_D) else np.empty(0)
    lengths = np.diff([*starts.tolist(), len(values_D)])
    return starts.tolist(), (sums / lengths).tolist()


def _is_cheap(snapshot: Snapshot) -> bool:
    """Tell whether exact moments take little reading."""
    readers = [snapshot.shard_reader(shard) for shard in snapshot.manifest.shards]
    bare = [
        reader
        for reader in readers
        if not reader.is_plain or any(entry.statistics_path is None for entry in reader.entries)
    ]
    return sum(entry.rows for reader in bare for entry in reader.entries) * snapshot.info.row_bytes <= _LITTLE_BYTES


def _moments(drawn_ND: npt.NDArray[np.float32]) -> FeatureStatistics:
    if not len(drawn_ND):
        zeros_D = np.zeros(drawn_ND.shape[1], np.float32)
        return FeatureStatistics(0, zeros_D, zeros_D)
    mean_D, std_D = drawn_ND.mean(axis=0, dtype=np.float64), drawn_ND.std(axis=0, dtype=np.float64)
    return FeatureStatistics(len(drawn_ND), mean_D.astype(np.float32), std_D.astype(np.float32))
