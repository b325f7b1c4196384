"""Small stores: 8 shards, 8 numbers per row, drawn features."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo, to_bits

MakeRows = Callable[..., FeatureRows]


@pytest.fixture
def info() -> StoreInfo:
    extractor = ExtractorSpec(
        backbone="vgg16", layer="fc6", weights_digest="0" * 64, preprocessing="resize 256", compute_dtype="bfloat16"
    )
    return StoreInfo(dim=8, num_shards=8, dtype="bfloat16", extractor=extractor)


@pytest.fixture
def make_rows() -> MakeRows:
    def make(uris: list[str] | int, info: StoreInfo, seed: int = 0, first: int = 0) -> FeatureRows:
        names = uris if isinstance(uris, list) else [f"images/{i}.jpg" for i in range(first, first + uris)]
        rng = np.random.default_rng(seed)
        values = rng.standard_normal((len(names), info.dim)).astype(np.float32)
        return FeatureRows.of(
            names,
            to_bits(values, info.dtype),
            content_digests=[bytes([i % 256] * 15 + [0]) for i in range(len(names))],
            source_tags=[f"tag-{seed}-{i}" for i in range(len(names))],
            widths=np.arange(len(names)),
            heights=np.arange(len(names)) + seed,
        )

    return make


@pytest.fixture
def store(tmp_path: Path, info: StoreInfo) -> FeatureStore:
    return FeatureStore.create(tmp_path / "store", info)


@pytest.fixture
def memory_url() -> Iterator[str]:
    url = f"memory://{uuid.uuid4().hex}/store"
    yield url
    files = fsspec.filesystem("memory")
    if files.exists(url):
        files.rm(url, recursive=True)
