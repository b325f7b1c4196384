"""The share of the best ads that an index finds, against exact search; and an index's effort raised until it does.

Letters of shapes: N ads, K queries, C candidates found of each, W width of the vectors.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from featurestore.index import VectorIndex
from featurestore.spec import IndexKind

Keys = NDArray[np.int64]
Vectors = NDArray[np.float32]
QuerySource = Literal["users", "ads"]

COUNT = 10  # candidates of a query whose recall is measured when an index is written
NUM_QUERIES = 500
# Scores of two structures differ in the last bits; what is nearer than this is as good.
_TIE = 1e-5


@dataclass(frozen=True)
class Queries:
    """What an index is measured with: vectors of users, or of some of its own ads where there are no users."""

    vectors_KW: Vectors
    source: QuerySource


def sample_of(vectors_NW: Vectors, source: QuerySource) -> Queries:
    """Draw at most NUM_QUERIES of these vectors by a fixed seed."""
    chosen_K = np.random.default_rng(0).permutation(len(vectors_NW))[:NUM_QUERIES]
    return Queries(np.ascontiguousarray(vectors_NW[np.sort(chosen_K)]), source)


def recall_at(
    index: VectorIndex, exact: VectorIndex, queries_KW: Vectors, count: int, effort: int | None = None
) -> float:
    """Measure the share of the `count` best of `exact`, a flat index of the same ads, that `index` finds; K >= 1.

    An ad whose score is that of the last of the best is one of them: ads with equal vectors must not count as misses.
    """
    _, best_KC = exact.search(queries_KW, count)
    _, found_KC = index.search(queries_KW, count, effort)
    last_K1 = best_KC[:, : found_KC.shape[1]][:, -1:]
    return float((found_KC >= last_K1 - _TIE * np.abs(last_K1)).mean())


def best_index(
    kind: IndexKind, keys_N: Keys, vectors_NW: Vectors, exact: VectorIndex, queries: Queries, limit: float
) -> tuple[VectorIndex, float]:
    """Build an index of these ads whose recall@COUNT is `limit`, or as near as it gets; returns that recall too.

    Where hnsw is below it, its graph in the other space is tried too, and the better one taken: which of the two finds
    more depends on the vectors.
    """
    index = VectorIndex.build(kind, keys_N, vectors_NW)
    recall = reach(index, exact, queries, 0)
    if kind == "hnsw" and recall < limit:
        lifted = VectorIndex.build(kind, keys_N, vectors_NW, lifted=True)
        if reach(lifted, exact, queries, 0) > recall:
            index = lifted
    return index, reach(index, exact, queries, limit)


def reach(index: VectorIndex, exact: VectorIndex, queries: Queries, limit: float) -> float:
    """Measure recall@COUNT of the index, whose effort is doubled while that is below `limit` and more effort helps."""
    recall = recall_at(index, exact, queries.vectors_KW, COUNT)
    while recall < limit and index.effort and index.largest_effort and index.effort < index.largest_effort:
        index.effort = min(2 * index.effort, index.largest_effort)
        recall = recall_at(index, exact, queries.vectors_KW, COUNT)
    return recall
