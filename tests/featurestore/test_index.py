"""Indexes of vectors: recall, the same answers after save and load, and what is refused."""

from typing import get_args

import numpy as np
import pytest

from featurestore.errors import CorruptFileError, InvalidRowsError
from featurestore.index import NOT_FOUND, VectorIndex, faiss
from featurestore.problems import Problem
from featurestore.spec import IndexKind
from tests.raised import raises

DIM = 16
KINDS: tuple[IndexKind, ...] = get_args(IndexKind)
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    faiss.omp_set_num_threads(1)


def clustered(count: int, seed: int = 0) -> np.ndarray:
    """Vectors around 20 centres, as ads of a few kinds; the centres are the same for every seed."""
    centres = np.random.default_rng(99).normal(size=(20, DIM))
    draw = np.random.default_rng(seed)
    return (centres[draw.integers(0, 20, count)] + 0.3 * draw.normal(size=(count, DIM))).astype(np.float32)


def best(keys: np.ndarray, vectors: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """Keys of the largest inner products, by sorting all of them."""
    return keys[np.argsort(-(queries.astype(np.float64) @ vectors.astype(np.float64).T), axis=1)[:, :count]]


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([np.isin(e, f).mean() for f, e in zip(found, expected, strict=True)]))


def two_towers(count: int, dim: int, shared: float, norms: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of ads, and of 200 users, as two towers make them: of kinds, of unequal length, and sharing a direction
    in which ads and users are opposite, so that logits are negative."""
    draw = np.random.default_rng(7)
    direction, kinds = draw.normal(size=dim), draw.normal(size=(50, dim))
    direction *= shared * np.sqrt(dim) / np.linalg.norm(direction)
    ads = 0.7 * (kinds[draw.integers(0, 50, count)] + draw.normal(size=(count, dim)))
    ads = np.exp(norms * draw.normal(size=(count, 1))) * ads - direction * (1 + 0.2 * draw.normal(size=(count, 1)))
    users = 0.7 * (draw.normal(size=(200, 50)) @ kinds / np.sqrt(50) + draw.normal(size=(200, dim)))
    users += direction * (1 + 0.2 * draw.normal(size=(200, 1)))
    return ads.astype(np.float32), users.astype(np.float32)


KEYS = np.random.default_rng(3).integers(-(2**63), 2**63 - 1, 3_000)


@pytest.mark.long
@kinds
@pytest.mark.parametrize(
    ("count", "dim", "shared", "norms"), [(2_000, 12, 0, 0.8), (2_000, 64, 2, 0), (4_000, 32, 4, 0.8)]
)
def test_vectors_that_share_a_direction(kind: IndexKind, count: int, dim: int, shared: float, norms: float) -> None:
    ads, users = two_towers(count, dim, shared, norms)
    keys = np.random.default_rng(3).permutation(10 * count)[:count]
    index = VectorIndex.build(kind, keys, ads)
    found, scores = index.search(users, 10)
    assert recall(found, best(keys, ads, users, 10)) >= (1 if kind == "flat" else 0.95)
    if shared >= 2:
        assert (scores < 0).mean() > 0.5
    # The scores are inner products of the vectors themselves, as near as 32 bits allow, and the largest comes first.
    place = dict(zip(keys.tolist(), range(count), strict=True))
    vectors = ads[[[place[key] for key in row] for row in found.tolist()]].astype(np.float64)
    scale = np.linalg.norm(ads, axis=1).max() * np.linalg.norm(users, axis=1).max()
    np.testing.assert_allclose(scores, np.einsum("kd,kcd->kc", users.astype(np.float64), vectors), atol=1e-6 * scale)
    assert (np.diff(scores) <= 0).all()
    again = VectorIndex.load(index.save())
    for mine, theirs in zip(again.search(users, 10), (found, scores), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_more_effort_finds_more() -> None:
    vectors = np.random.default_rng(0).normal(size=(3_000, DIM)).astype(np.float32)  # without clusters: hard
    queries = np.random.default_rng(1).normal(size=(50, DIM)).astype(np.float32)
    index = VectorIndex.build("hnsw", KEYS, vectors)
    expected = best(KEYS, vectors, queries, 50)
    assert index.effort and index.largest_effort and index.effort < index.largest_effort
    found = []
    for effort in (1, index.effort, 3_000):
        index.effort = effort
        found.append(recall(index.search(queries, 50)[0], expected))
    assert found[0] < 0.9 and found[0] < found[1] and found[2] > 0.99
    assert VectorIndex.load(index.save()).effort == 3_000


@kinds
@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_vectors(kind: IndexKind, count: int) -> None:
    vectors = clustered(count)
    index = VectorIndex.build(kind, KEYS[:count], vectors)
    keys, _ = index.search(vectors, 10)
    assert keys.shape == (count, count)
    assert recall(keys, best(KEYS[:count], vectors, vectors, count)) == 1


def test_what_an_approximate_index_does_not_find_is_marked() -> None:
    """No link of the graph leads from one of two clouds, far from each other, to the other one."""
    draw = np.random.default_rng(0)
    clouds = np.concatenate([draw.normal(size=(2_000, DIM)), draw.normal(size=(2_000, DIM)) + 1_000 * np.eye(1, DIM)])
    index = VectorIndex.build("hnsw", np.arange(1, 4_001), clouds.astype(np.float32))
    index.effort = 1
    keys, scores = index.search(clustered(1, seed=1), 4_000)
    missing = scores == NOT_FOUND
    assert 0 < missing.sum() < 4_000
    assert (keys[missing] == 0).all()


@kinds
def test_what_is_refused(kind: IndexKind) -> None:
    vectors = clustered(50)
    with raises(InvalidRowsError, Problem.WRONG_VECTOR_SHAPE, value=(0, 16)):
        VectorIndex.build(kind, KEYS[:0], clustered(0))
    index = VectorIndex.build(kind, KEYS[:50], vectors)
    with raises(InvalidRowsError, Problem.WRONG_QUERY_SHAPE, value=(50, 15), dim=16):
        index.search(vectors[:, :15], 3)
    for keys in (KEYS[:49], np.arange(50, dtype=np.float64)):
        with raises(InvalidRowsError, Problem.WRONG_VECTOR_KEYS, value=keys.dtype, shape=keys.shape, wanted=50):
            VectorIndex.build(kind, keys, vectors)
    with raises(InvalidRowsError, Problem.KEY_GIVEN_TWICE):
        VectorIndex.build(kind, KEYS[:50] // 2**60, vectors)
    with raises(InvalidRowsError, Problem.NOTHING_TO_FIND, value=0):
        index.search(vectors, 0)
    wrong = vectors.copy()
    wrong[3, 4] = np.nan
    with raises(InvalidRowsError, Problem.VECTOR_NOT_FINITE, where=KEYS[3]):
        VectorIndex.build(kind, KEYS[:50], wrong)
    data = index.save()
    for other in (b"", b"no index", data[:100], data[:-40]):
        with raises(CorruptFileError, Problem.NOT_AN_INDEX):
            VectorIndex.load(other)
