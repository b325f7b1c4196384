"""Features that a device holds: the same bits as the partition's own lookup; missing, hidden and no keys."""

from pathlib import Path

import numpy as np
import pytest
import torch

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo
from featurestore.errors import FeatureStoreError, MissingKeysError
from featurestore.lookup import ondevice
from featurestore.lookup.embedding import EmbeddingModel, EmbeddingService
from featurestore.lookup.ondevice import HeldRows, as_tensor, held_bytes
from featurestore.lookup.partition import FeaturePartition

DIM, ROWS = 8, 60
CPU = torch.device("cpu")


def partition_of(folder: Path, dtype: str, missing: str = "zeros", ranks: int = 1) -> FeaturePartition:
    spec = ExtractorSpec(
        backbone="drawn", layer="none", weights_digest="0", preprocessing="none", compute_dtype="float32"
    )
    values = np.random.default_rng(0).normal(3, 2, (ROWS, DIM)).astype(np.float32)
    info = StoreInfo(num_shards=8, name="images", dim=DIM, dtype=dtype, extractor=spec)
    store = FeatureStore.create(str(folder / "store"), info)
    store.put(FeatureRows.of([str(k) for k in range(ROWS)], values, keys=np.arange(ROWS)))
    return FeaturePartition.load(store, ranks - 1, ranks, cache_dir=folder / "cache", missing=missing)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_same_bits_as_a_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, ranks: int) -> None:
    monkeypatch.setattr(ondevice, "_HELD_BLOCK_ROWS", 3)
    partition = partition_of(tmp_path, dtype, ranks=ranks)
    held = HeldRows(partition, CPU)
    keys = np.random.default_rng(1).permutation(ROWS + 20)  # the last 20 have no feature
    keys = keys[partition.owns(keys)]
    assert (keys >= ROWS).any() and 0 < (keys < ROWS).sum() <= ROWS
    taken, expected = held.take(partition.places(keys)), as_tensor(partition.lookup(keys).features_UD)
    assert taken.dtype == expected.dtype and torch.equal(taken.view(torch.uint8), expected.view(torch.uint8))
    assert held.take(np.empty(0, np.int64)).shape == (0, DIM)
    assert held_bytes(partition) == (partition.num_rows + 1) * DIM * taken.element_size()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("missing", ["zeros", "learned"])
def test_a_service_makes_the_same_vectors(tmp_path: Path, dtype: str, missing: str) -> None:
    partition = partition_of(tmp_path, dtype, missing)
    service = EmbeddingService(partition, {"e": EmbeddingModel(DIM, (8,), 3, "float32")})
    keys = np.array([7, ROWS + 1, 3, 59])

    def results() -> list[torch.Tensor]:
        service.zero_grad()
        gathered = service.gather(keys)
        assert gathered.missing_Q is not None and gathered.missing_Q.tolist() == [False, True, False, False]
        visual = service.embed("e", gathered)
        visual.square().sum().backward()
        service.release(gathered)
        return [visual.detach(), *(each.grad.clone() for each in service.parameters() if each.grad is not None)]

    looked_up, counted = results(), partition.missing_count
    service.hold_rows()
    assert service.holds_rows
    held = results()
    assert partition.missing_count == 2 * counted == 2
    assert len(held) > 4 and all(torch.equal(one, other) for one, other in zip(looked_up, held, strict=True))
    assert service.gather(keys[keys < ROWS]).missing_Q is None
    partition.hide(1.0)
    assert service.gather(keys[keys < ROWS]).features_QD.count_nonzero() == 0


def test_missing_keys_and_a_closed_partition_are_errors(tmp_path: Path) -> None:
    partition = partition_of(tmp_path, "float32", "error")
    service = EmbeddingService(partition, {"e": EmbeddingModel(DIM)})
    service.hold_rows()
    with pytest.raises(MissingKeysError, match="999"):
        service.gather(np.array([3, 999]))
    partition.close()
    with pytest.raises(FeatureStoreError, match="closed"):
        service.gather(np.array([3]))


def test_a_partition_without_rows(tmp_path: Path) -> None:
    spec = ExtractorSpec(
        backbone="drawn", layer="none", weights_digest="0", preprocessing="none", compute_dtype="float32"
    )
    store = FeatureStore.create(
        str(tmp_path / "store"), StoreInfo(num_shards=2, name="images", dim=DIM, dtype="float32", extractor=spec)
    )
    store.put(FeatureRows.of(["1"], np.ones((1, DIM), np.float32), keys=np.array([1])))
    for rank in range(2):
        partition = FeaturePartition.load(store, rank, 2, cache_dir=tmp_path / "cache", missing="zeros")
        keys = np.arange(5)[partition.owns(np.arange(5))]
        taken = HeldRows(partition, CPU).take(partition.find(keys))
        assert taken[:, 0].tolist() == [float(key == 1) for key in keys]
