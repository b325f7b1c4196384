"""Small stores of drawn rows, without pictures, whose content tests know: commits, deletions and copies."""

from pathlib import Path

import numpy as np
import xxhash

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo, key_of_uri

DIM = 6
ADDED = tuple(f"b/{number}.jpg" for number in range(5))
CHANGED = tuple(f"a/{number}.jpg" for number in range(3))
EXTRACTOR = ExtractorSpec(
    backbone="torchvision none", layer="fc6", weights_digest="0" * 64, preprocessing="{}", compute_dtype="float32"
)


def make_store(folder: Path | str, dtype: str = "float32", num_shards: int = 4) -> FeatureStore:
    return FeatureStore.create(folder, StoreInfo(dim=DIM, num_shards=num_shards, dtype=dtype, extractor=EXTRACTOR))


def rows(uris: list[str], seed: int, contents: list[int] | None = None) -> FeatureRows:
    """Draw rows; those of equal `contents` have images of equal bytes. Without them rows have no digests."""
    values_ND = np.random.default_rng(seed).standard_normal((len(uris), DIM)).astype(np.float32)
    digests = None if contents is None else [digest_of(content) for content in contents]
    return FeatureRows.of(uris, values_ND, content_digests=digests, source_tags=[f"tag-{seed}"] * len(uris))


def digest_of(content: int) -> bytes:
    """The digest that stands for an image's bytes: those of different contents differ in all of their bytes."""
    return xxhash.xxh3_128_digest(str(content).encode())


def storied(folder: Path, dtype: str = "float32") -> FeatureStore:
    """Make a store of four commits: 40 images; 5 more and 3 anew; 2 go; one comes back, with the content of another."""
    store = make_store(folder, dtype)
    first = [f"a/{number}.jpg" for number in range(40)]
    store.put(rows(first, 1, list(range(1, 41))), "extract")
    store.put(rows([*ADDED, *CHANGED], 2, list(range(101, 109))), "refresh")
    store.delete([key_of_uri("a/10.jpg"), key_of_uri("a/11.jpg")])
    store.put(rows(["a/10.jpg"], 3, [20]), "refresh")
    return store
