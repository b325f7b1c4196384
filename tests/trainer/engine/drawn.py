"""A small feature store for tests of the engine."""

from pathlib import Path

import numpy as np

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo

DIM = 8


def drawn_store(folder: Path) -> FeatureStore:
    """Drawn features of the keys 0 to 19, in four shards."""
    spec = ExtractorSpec(
        backbone="drawn", layer="none", weights_digest="0", preprocessing="none", compute_dtype="float32"
    )
    info = StoreInfo(num_shards=4, name="images", dim=DIM, dtype="float32", extractor=spec)
    store = FeatureStore.create(str(folder / "store"), info)
    values = np.random.default_rng(0).normal(size=(20, DIM)).astype(np.float32)
    store.put(FeatureRows.of([str(k) for k in range(20)], values, keys=np.arange(20)))
    return store
