"""Accuracy of a coarser dtype: what it keeps of the features, by rows of two stores.

Letters of shapes: N rows, K of them queries, D feature width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.index import nearest

NUM_NEIGHBOURS = 10
_MOST_QUERIES = 500


@dataclass(frozen=True)
class Accuracy:
    """Errors of `num_compared` rows; None where there were too few of them, or all were zero."""

    num_compared: int
    num_queries: int
    relative_error_mean: float | None  # distance of a row from what was kept of it, by the row's length
    relative_error_p99: float | None
    cosine_mean: float | None
    cosine_min: float | None
    recall_at_10: float | None  # share of a row's exact nearest neighbours that are so among the kept rows too


def measure_accuracy(exact_ND: npt.NDArray[np.float32], kept_ND: npt.NDArray[np.float32]) -> Accuracy:
    """Compare rows before and after, in the same order; at most a tenth ask for their neighbours among the others.

    Rows of zeros have no relative error and no angle. Cost: K x N x D multiplications, twice.
    """
    error_N, cosine_N = _errors(exact_ND, kept_ND)
    num_queries = min(_MOST_QUERIES, len(exact_ND) // 10)
    enough = bool(len(error_N))
    return Accuracy(
        num_compared=len(exact_ND),
        num_queries=num_queries,
        relative_error_mean=float(error_N.mean()) if enough else None,
        relative_error_p99=float(np.percentile(error_N, 99)) if enough else None,
        cosine_mean=float(cosine_N.mean()) if enough else None,
        cosine_min=float(cosine_N.min()) if enough else None,
        recall_at_10=_recall(exact_ND, kept_ND, num_queries) if len(exact_ND) > 2 * NUM_NEIGHBOURS else None,
    )


def _errors(
    exact_ND: npt.NDArray[np.float32], kept_ND: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return relative error and cosine of each row that is not zero."""
    difference_ND = exact_ND - kept_ND
    pairs = (exact_ND, exact_ND), (kept_ND, kept_ND), (exact_ND, kept_ND), (difference_ND, difference_ND)
    length_N, kept_length_N, dot_N, distance_N = (np.einsum("nd,nd->n", *pair, dtype=np.float64) for pair in pairs)
    nonzero_N = length_N > 0
    error_N = np.sqrt(distance_N[nonzero_N] / length_N[nonzero_N])
    both_N = np.sqrt(length_N[nonzero_N]) * np.sqrt(kept_length_N[nonzero_N])
    return error_N, np.divide(dot_N[nonzero_N], both_N, out=np.zeros_like(both_N), where=both_N > 0)


def _recall(exact_ND: npt.NDArray[Any], kept_ND: npt.NDArray[Any], num_queries: int) -> float:
    """Return the share of neighbours that are kept. Queries are the first rows: no row is its own neighbour."""
    wanted_KN, found_KN = (
        nearest(rows[num_queries:], rows[:num_queries], NUM_NEIGHBOURS) for rows in (exact_ND, kept_ND)
    )
    hits = [len(np.intersect1d(wanted, found)) for wanted, found in zip(wanted_KN, found_KN, strict=True)]
    return float(np.mean(hits)) / NUM_NEIGHBOURS
