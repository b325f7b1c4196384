"""E and the service around it, and features that a device holds: the same bits, dtypes, missing keys, memory."""

from pathlib import Path

import numpy as np
import pytest
import torch

from featurestore import FeatureRows, FeatureStore
from featurestore.format.codec import Scaling
from featurestore.lookup import dtype_of_machine, dtype_of_processor, embedding, ondevice
from featurestore.lookup.embedding import EmbeddingModel, EmbeddingService
from featurestore.lookup.ondevice import HeldRows, PReLU, as_tensor, held_bytes
from featurestore.lookup.partition import FeaturePartition
from featurestore.upkeep.remake import remake
from tests.featurestore.conftest import INFO

DIM, ROWS = 32, 50


def features(count: int = ROWS) -> np.ndarray:
    """Like fc6 after ReLU: far from centred, of different spread."""
    draw = np.random.default_rng(0)
    return np.maximum(draw.normal(3, 1, (count, DIM)) * draw.uniform(0.5, 20, DIM), 0).astype(np.float32)


def partition_of(folder: Path, missing: str = "error", dtype: str = "bfloat16", ranks: int = 1) -> FeaturePartition:
    """The last rank's rows of ROWS; for the keys from ROWS on there are none."""
    store = FeatureStore.create(folder / "store", INFO.model_copy(update={"dim": DIM, "dtype": dtype}))
    store.put(FeatureRows.of([str(k) for k in range(ROWS)], features(), keys=np.arange(ROWS)))
    return FeaturePartition.load(store, ranks - 1, ranks, cache_dir=folder / "cache", missing=missing)


def _folded(service: EmbeddingService, store: Path, scaling: Scaling | None = None) -> np.ndarray:
    """What each dimension is multiplied by, where the deviations are those of the service's own store."""
    statistics = FeatureStore.open(store).snapshot().statistics()
    service.fold_standardization_(statistics.mean_D, statistics.std_D)
    if scaling is not None:
        service.model.fold_standardization_(statistics.mean_D, statistics.std_D, scaling)
    return service.model.inverse_std_D.numpy()


class TestModel:
    def test_folding_equals_standardising_the_features(self) -> None:
        torch.manual_seed(0)
        plain, folded = (EmbeddingModel(DIM, (8,), 3, "float64").double() for _ in range(2))
        folded.load_state_dict(plain.state_dict())
        x = features().astype(np.float64)
        folded.fold_standardization_(x.mean(0), x.std(0))
        actual = folded(torch.from_numpy(x))
        expected = plain(torch.from_numpy((x - x.mean(0)) / x.std(0)))
        torch.testing.assert_close(actual, expected)

    def test_visual_vectors_start_small(self) -> None:
        torch.manual_seed(0)
        model = EmbeddingModel(DIM, compute_dtype="float32")
        model.fold_standardization_(features().mean(0), features().std(0))
        assert 0.02 < float(model(torch.from_numpy(features())).detach().std()) < 0.2

    def test_a_dimension_that_never_varies_is_not_blown_up(self) -> None:
        model = EmbeddingModel(4)
        model.fold_standardization_(np.zeros(4), np.array([2.0, 0.0, 2.0, 0.01]))
        assert model.inverse_std_D.tolist() == pytest.approx([0.5, 1 / 0.10025, 0.5, 1 / 0.10025])
        model.fold_standardization_(np.zeros(4), np.zeros(4))
        assert model.inverse_std_D.tolist() == [1.0] * 4

    def test_components_are_scaled_by_one_number_and_other_features_each_by_its_own(self, tmp_path: Path) -> None:
        std = np.array([3.0, 1.0, 0.5, 0.1], np.float32)
        model = EmbeddingModel(4)
        model.fold_standardization_(np.zeros(4), std, "common")
        np.testing.assert_allclose(model.inverse_std_D.numpy(), 1 / np.sqrt((std.astype(float) ** 2).mean()), rtol=1e-6)
        assert float(((model.inverse_std_D * torch.from_numpy(std)) ** 2).mean()) == pytest.approx(1)
        model.fold_standardization_(np.zeros(4), np.zeros(4), "common")
        assert model.inverse_std_D.tolist() == [1.0] * 4
        with partition_of(tmp_path, dtype="float32") as partition:
            service = EmbeddingService(partition, EmbeddingModel(DIM))
            assert len(set(_folded(service, tmp_path / "store").tolist())) > 10
            assert len(set(_folded(service, tmp_path / "store", "common").tolist())) == 1
        remake(FeatureStore.open(tmp_path / "store"), tmp_path / "small", dims=4)
        with FeaturePartition.load(tmp_path / "small", cache_dir=tmp_path / "cache") as partition:
            service = EmbeddingService(partition, EmbeddingModel(4))
            assert len(set(_folded(service, tmp_path / "small").tolist())) == 1
            assert len(set(_folded(service, tmp_path / "small", "each").tolist())) > 1

    def test_bfloat16_products_stay_near_float32(self) -> None:
        torch.manual_seed(0)
        models = [EmbeddingModel(DIM, (64, 16), 12, dtype) for dtype in ("bfloat16", "float32")]
        models[0].load_state_dict(models[1].state_dict())
        x = torch.from_numpy(features())
        for model in models:
            model.fold_standardization_(features().mean(0), features().std(0))
        low, full = (model(x) for model in models)
        assert low.dtype == full.dtype == torch.float32
        assert 0 < float((low - full).detach().abs().max()) < 0.03 * float(full.detach().abs().max())
        for visual in (low, full):
            visual.square().sum().backward()
        for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert a.grad is not None and b.grad is not None and a.grad.dtype == torch.float32
            # The product behind a weight's gradient is rounded before the mean is taken out: a few per cent of noise.
            assert float((a.grad - b.grad).norm()) < 0.1 * float(b.grad.norm()), name

    @pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
    def test_no_rows_give_gradients_of_zero(self, compute_dtype: str) -> None:
        model = EmbeddingModel(DIM, (8,), 3, compute_dtype)
        visual = model(torch.zeros(0, DIM, dtype=torch.bfloat16))
        assert visual.shape == (0, 3)
        visual.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("num_rows", [None, 0, 1, 2500])
def test_prelu_is_torchs(num_rows: int | None) -> None:
    """The same bits for numbers where it bends, and for several blocks the same gradients but for their rounding."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([[-2.0, -0.0, 0.0], [3.0, -7.0, 1e-30]], dtype=torch.float64)
    if num_rows is not None:
        rows = torch.randn(num_rows, 3, generator=generator, dtype=torch.float64)
    upstream = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    found = []
    for kind in (PReLU, torch.nn.PReLU):
        activation, given = kind().double(), rows.clone().requires_grad_()
        output = activation(given)
        output.backward(upstream)
        found.append([output.detach(), given.grad, activation.weight.grad])
    for mine, torchs in zip(*found, strict=True):
        tolerance = 0 if num_rows is None else 1e-12
        torch.testing.assert_close(mine, torchs, rtol=tolerance, atol=tolerance)


class TestService:
    @pytest.mark.long
    @pytest.mark.parametrize(
        ("dtype", "compute_dtype", "rows"),
        [
            ("bfloat16", "bfloat16", 1),
            ("bfloat16", "float32", 6),
            ("float16", "float64", 7),
            ("float32", "bfloat16", 20),
        ],
    )
    def test_numbers_are_made_ahead(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, compute_dtype: str, rows: int
    ) -> None:
        monkeypatch.setattr(embedding, "BLOCK_ROWS", 6)
        partition = partition_of(tmp_path, "zeros", dtype=dtype)
        service = EmbeddingService(partition, EmbeddingModel(DIM, (8,), 3, compute_dtype))
        service.fold_standardization_(features().mean(0), features().std(0))
        keys = np.random.default_rng(rows).permutation(ROWS)[:rows]
        keys[rows // 2] = 999  # has no feature
        gathered = service.gather(keys)
        stored = as_tensor(partition.lookup(keys).features_UD)
        assert gathered.features_QD.dtype == getattr(torch, compute_dtype)
        assert torch.equal(gathered.features_QD, service.model.numbers(stored))
        assert gathered.missing_Q is not None and gathered.missing_Q.tolist() == [key == 999 for key in keys]
        assert service.gather(keys[keys != 999]).missing_Q is None

    def test_zeros(self, tmp_path: Path) -> None:
        service = EmbeddingService(partition_of(tmp_path, "zeros"), EmbeddingModel(DIM))
        assert service.embed(service.gather(np.empty(0, np.int64))).shape == (0, 12)
        visual = service.embed(service.gather(np.array([3, 999])))
        assert visual[0].any() and not visual[1].any()
        visual[1].sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in service.parameters())

    def test_learned(self, tmp_path: Path) -> None:
        service = EmbeddingService(partition_of(tmp_path, "learned"), EmbeddingModel(DIM))
        service.embed(service.gather(np.array([999, 3, 998]))).sum().backward()
        assert service.no_image is not None and service.no_image.grad is not None
        assert (service.no_image.grad == 2).all()

    def test_memory_is_used_again_only_after_release(self, tmp_path: Path) -> None:
        service = EmbeddingService(partition_of(tmp_path), EmbeddingModel(DIM))
        first = service.gather(np.arange(20))
        kept, address = first.features_QD.clone(), first.features_QD.data_ptr()
        second = service.gather(np.arange(20, 40))
        assert second.features_QD.data_ptr() != address
        assert torch.equal(first.features_QD, kept)
        service.release(first)
        service.release(first)
        third, fourth = service.gather(np.arange(22)), service.gather(np.arange(22))
        assert third.features_QD.data_ptr() == address
        assert fourth.features_QD.data_ptr() != address
        assert torch.equal(third.features_QD, fourth.features_QD)


@pytest.mark.parametrize(
    ("expected", "capabilities"),
    [
        ("bfloat16", {"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}),
        ("float32", {"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}),
        ("bfloat16", {"cpu_name": "AMD EPYC 9R14", "avx512_bf16": True, "amx_bf16": False}),
        ("float32", {"cpu_name": "AMD EPYC 7763", "avx512_bf16": False, "amx_bf16": False}),
        ("float32", {"architecture": "aarch64", "bf16": True}),
        ("float32", {}),
    ],
)
def test_the_processor_settles_what_auto_means(
    monkeypatch: pytest.MonkeyPatch, expected: str, capabilities: dict[str, str | bool]
) -> None:
    assert dtype_of_processor(capabilities) == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert dtype_of_machine("cpu") == expected


def test_torch_names_the_capabilities_of_this_processor() -> None:
    """Another name for them in a newer torch would silently mean float32 on every processor."""
    capabilities = torch.cpu.get_capabilities()
    if capabilities["architecture"] == "x86_64":
        assert {"cpu_name", "avx512_bf16", "amx_bf16"} <= capabilities.keys()


@pytest.mark.parametrize(("dtype", "ranks"), [("bfloat16", 2), ("float16", 1), ("float32", 2)])
def test_the_same_bits_as_a_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, ranks: int) -> None:
    monkeypatch.setattr(ondevice, "_HELD_BLOCK_ROWS", 3)
    partition = partition_of(tmp_path, "zeros", dtype, ranks)
    held = HeldRows(partition, torch.device("cpu"))
    keys = np.random.default_rng(1).permutation(ROWS + 20)  # the last 20 have no feature
    keys = keys[partition.owns(keys)]
    assert (keys >= ROWS).any() and 0 < (keys < ROWS).sum() <= ROWS
    taken, expected = held.take(partition.places(keys)), as_tensor(partition.lookup(keys).features_UD)
    assert taken.dtype == expected.dtype and torch.equal(taken.view(torch.uint8), expected.view(torch.uint8))
    assert held.take(np.empty(0, np.int64)).shape == (0, DIM)
    assert held_bytes(partition) == (partition.num_rows + 1) * DIM * taken.element_size()


@pytest.mark.parametrize(("dtype", "missing"), [("bfloat16", "zeros"), ("float32", "learned")])
def test_a_service_makes_the_same_vectors(tmp_path: Path, dtype: str, missing: str) -> None:
    partition = partition_of(tmp_path, missing, dtype)
    service = EmbeddingService(partition, EmbeddingModel(DIM, (8,), 3, "float32"))
    keys = np.array([7, ROWS + 1, 3, 49])

    def results() -> list[torch.Tensor]:
        service.zero_grad()
        gathered = service.gather(keys)
        assert gathered.missing_Q is not None and gathered.missing_Q.tolist() == [False, True, False, False]
        visual = service.embed(gathered)
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
    partition.hide(True)
    assert service.gather(keys[keys < ROWS]).features_QD.count_nonzero() == 0


def test_a_partition_without_rows(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "store", INFO.model_copy(update={"dim": DIM, "num_shards": 2}))
    store.put(FeatureRows.of(["1"], np.ones((1, DIM), np.float32), keys=np.array([1])))
    for rank in range(2):
        partition = FeaturePartition.load(store, rank, 2, cache_dir=tmp_path / "cache", missing="zeros")
        keys = np.arange(5)[partition.owns(np.arange(5))]
        taken = HeldRows(partition, torch.device("cpu")).take(partition.find(keys))
        assert taken[:, 0].tolist() == [float(key == 1) for key in keys]
