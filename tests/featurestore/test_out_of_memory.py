"""A machine without memory is no damaged file: repair would drop good rows."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore import ExtractorSpec, FeaturePartition, FeatureRows, FeatureStore, StoreInfo
from featurestore.errors import CorruptFileError
from featurestore.upkeep.verify import verify

EXTRACTOR = ExtractorSpec(backbone="b", layer="l", weights_digest="w", preprocessing="p", compute_dtype="float32")


@pytest.fixture
def store(tmp_path):
    store = FeatureStore.create(tmp_path / "store", StoreInfo(dim=8, num_shards=1, extractor=EXTRACTOR))
    store.put(FeatureRows.of(["a", "b"], np.zeros((2, 8), np.uint16)))
    return store


def exhaust(monkeypatch, method):
    def fail(*_args, **_options):
        raise pa.ArrowMemoryError("malloc of size 8388608 failed")

    monkeypatch.setattr(pq.ParquetFile, method, fail)


def test_a_cache_build_says_so(store, tmp_path, monkeypatch):
    exhaust(monkeypatch, "iter_batches")
    with pytest.raises(MemoryError, match="malloc"):
        FeaturePartition.load(store, cache_dir=tmp_path / "cache")


def test_verify_calls_no_file_damaged(store, monkeypatch):
    exhaust(monkeypatch, "iter_batches")
    with pytest.raises(MemoryError, match="malloc"):
        verify(store)


def test_a_length_that_cannot_be_is_damage_where_no_digest_was_checked(store, monkeypatch):
    exhaust(monkeypatch, "read")
    with pytest.raises(CorruptFileError, match="damaged"):
        store.snapshot().read_shard(0)
