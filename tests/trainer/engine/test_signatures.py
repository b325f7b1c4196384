"""Signatures: near the true cosine, the same whatever is asked beside them, and none for what has no feature."""

from pathlib import Path

import numpy as np
import pytest

from featurestore import ExtractorSpec, FeaturePartition, FeatureRows, FeatureStore, StoreInfo
from featurestore.format.statistics import inverse_std
from featurestore.keys import owner_of, shard_of
from trainer.engine.similarity import BITS, Signatures, cosines

DIM, ROWS = 96, 150


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Features that share most of their direction, as those of images do."""
    draw = np.random.default_rng(0)
    groups = draw.normal(size=(12, DIM))
    values = 5 + groups[draw.integers(0, 12, ROWS)] + draw.normal(size=(ROWS, DIM)) * 0.6
    spec = ExtractorSpec(
        backbone="drawn", layer="none", weights_digest="0", preprocessing="none", compute_dtype="float32"
    )
    info = StoreInfo(num_shards=8, name="images", dim=DIM, dtype="float32", extractor=spec)
    store = FeatureStore.create(str(tmp_path_factory.mktemp("signatures") / "store"), info)
    store.put(FeatureRows.of([str(k) for k in range(ROWS)], values.astype(np.float32), keys=np.arange(ROWS)))
    return store


def signatures(store: FeatureStore, folder: Path, rank: int = 0, num_ranks: int = 1) -> Signatures:
    partition = FeaturePartition.load(store, rank, num_ranks, cache_dir=folder)
    statistics = store.snapshot().statistics()
    return Signatures(partition, lambda: (statistics.mean_D, inverse_std(statistics.std_D)))


def test_cosines_are_near_those_of_standardised_features(store: FeatureStore, tmp_path: Path) -> None:
    keys = np.arange(ROWS)
    words = signatures(store, tmp_path).of(keys)
    found = np.array([cosines(words, np.broadcast_to(words[k], words.shape)) for k in keys])
    statistics = store.snapshot().statistics()
    scaled = (store.snapshot().get(keys) - statistics.mean_D) / statistics.std_D
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    error = found - scaled @ scaled.T
    assert np.abs(np.diag(found) - 1).max() == 0
    assert error.std() < 1.2 * (np.pi / 2) / np.sqrt(BITS)
    assert np.abs(error.mean()) < 0.02
    raw = store.snapshot().get(keys)
    raw /= np.linalg.norm(raw, axis=1, keepdims=True)
    assert (raw @ raw.T).min() > 0.9  # which would all lie in one tier


def test_a_signature_does_not_depend_on_ranks_or_on_what_else_is_asked(store: FeatureStore, tmp_path: Path) -> None:
    together = signatures(store, tmp_path).of(np.arange(ROWS))
    one_by_one = signatures(store, tmp_path)
    order = np.random.default_rng(1).permutation(ROWS)
    assert all(np.array_equal(one_by_one.of(np.array([key]))[0], together[key]) for key in order)
    assert np.array_equal(one_by_one.of(np.arange(ROWS)[::-1]), together[::-1])
    for rank in range(3):
        mine = np.flatnonzero(owner_of(shard_of(np.arange(ROWS), 8), 3) == rank)
        assert np.array_equal(signatures(store, tmp_path, rank, 3).of(mine), together[mine])


def test_a_key_without_a_feature_is_like_nothing(store: FeatureStore, tmp_path: Path) -> None:
    words = signatures(store, tmp_path).of(np.array([3, 10_000, 3, 10_000]))
    assert not words[1].any()
    found = cosines(words, words[[0, 0, 2, 1]])
    assert np.isnan(found).tolist() == [False, True, False, True] and found[0] == found[2] == 1
    assert signatures(store, tmp_path).of(np.empty(0, np.int64)).shape == (0, BITS // 64 + 1)
