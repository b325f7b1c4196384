"""What differs between the rows of two snapshots: rows, images, and features of unchanged images."""

from pathlib import Path

import numpy as np
import pytest

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo, to_bits
from trainer.gates import compare_rows

KEYS = np.arange(1_000, 1_050)
NONE = bytes(16)


@pytest.fixture
def info() -> StoreInfo:
    extractor = ExtractorSpec(
        backbone="vgg16", layer="fc6", weights_digest="0" * 64, preprocessing="resize 256", compute_dtype="bfloat16"
    )
    return StoreInfo(dim=8, num_shards=8, dtype="bfloat16", extractor=extractor)


def put(folder: Path, info: StoreInfo, keys: np.ndarray, features_KD: np.ndarray, digests: list[bytes]) -> FeatureStore:
    store = FeatureStore.create(folder, info)
    bits = to_bits(features_KD, info.dtype)
    store.put(FeatureRows.of([f"item/{key}" for key in keys], bits, keys=keys, content_digests=digests))
    return store


def test_two_stores_of_other_shards(tmp_path: Path, info: StoreInfo) -> None:
    """Of 50 rows one is gone, one is new, one shows another image, and one has other features for the same image."""
    features_KD = np.random.default_rng(5).normal(size=(50, info.dim)).astype(np.float32)
    old = put(tmp_path / "old", info, KEYS, features_KD, [NONE] * 50)
    other_KD = features_KD.copy()
    other_KD[3], other_KD[4] = -features_KD[3], -features_KD[4]
    digests = [NONE, NONE, NONE, b"1" * 16, *[NONE] * 46]
    keys = np.array([*KEYS[:49], 5])
    new = put(tmp_path / "new", info.model_copy(update={"num_shards": 1}), keys, other_KD, digests)
    seen: list[tuple[int, int]] = []
    found = compare_rows(old.snapshot(), new.snapshot(), progress=lambda done, total: seen.append((done, total)))
    assert (found.num_before, found.num_now, found.num_common, found.num_changed) == (50, 50, 49, 1)
    assert (found.num_compared, found.num_other, seen) == (48, 1, [(1, 1)])
    assert found.mean_difference == pytest.approx(2 / 48, rel=1e-6)
    assert not found.is_same
    same = compare_rows(old.snapshot(), old.snapshot(), most=20)
    assert 0 < same.num_compared < 50
    assert (same.num_other, same.mean_difference, same.is_same) == (0, 0, True)
