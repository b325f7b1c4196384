"""The engine alone: what it refuses, what it reports, and that its state is all there is to resume."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from featurestore.lookup import VARIABLE
from featurestore.lookup.partition import FeaturePartition
from tests.trainer.conftest import drawn_store
from trainer.comm import SoloComm
from trainer.config import Config, ModelConfig, OptimConfig, TrainConfig
from trainer.engine import machine
from trainer.engine.engine import Engine
from trainer.errors import CheckpointError, ConfigError
from trainer.samples.reader import Batch, Jagged
from trainer.schema.fields import Field, Schema

SCHEMA = Schema(
    fields=(
        Field(name="behavior_image", side="user", kind="content"),
        Field(name="ad_item", side="ad", kind="id", table="item"),
        Field(name="ad_image", side="ad", kind="content"),
    )
)


class OtherDigest(SoloComm):
    """A second rank that built another model."""

    def allgather_object(self, value: object, name: str = "objects") -> list:
        return [value, "another"] if name == "digest" else [value]


@pytest.fixture(scope="module")
def partition(tmp_path_factory: pytest.TempPathFactory) -> FeaturePartition:
    folder = tmp_path_factory.mktemp("step")
    store = drawn_store(folder / "store", np.random.default_rng(0).normal(size=(20, 8)))
    return FeaturePartition.load(store, cache_dir=folder / "cache")


def engine_of(
    partition: FeaturePartition,
    comm: SoloComm | None = None,
    seed: int = 0,
    optim: OptimConfig = OptimConfig(lr=0.01),
    **model: object,
) -> Engine:
    sizes = {"tables": {"item": 64}, "mlp": [6], "embed_hidden": [6], "compute_dtype": "float32", **model}
    config = Config(model=ModelConfig(**sizes), optim=optim, train=TrainConfig(seed=seed))
    return Engine(comm or SoloComm(), SCHEMA, {"images": partition}, config)


def batch_of(number: int, samples: int = 6) -> Batch:
    draw = np.random.default_rng(number)
    one = np.ones(samples, np.int32)
    return Batch(
        fields={
            "behavior_image": Jagged(draw.integers(0, 20, 2 * samples), 2 * one),
            "ad_item": Jagged(draw.integers(0, 50, samples), one),
            "ad_image": Jagged(draw.integers(0, 20, samples), one),
        },
        dense={},
        group_of_sample_B=np.arange(samples),
        label_B=draw.integers(0, 2, samples).astype(np.float32),
        group_id_B=np.zeros(samples, np.int64),
        global_samples=max(samples, 1),
    )


def train(engine: Engine, numbers: range) -> list[float]:
    return [engine.train_step(engine.prepare(batch_of(number))).loss for number in numbers]


def test_the_schedule_of_a_run_that_continues_another_begins_with_its_own_first_step(
    partition: FeaturePartition,
) -> None:
    """Else the rates of a daily job would shrink from day to day."""
    engine, rates = engine_of(partition, optim=OptimConfig(lr=0.01, lr_gamma=0.5, lr_every=2, warmup_steps=0)), []
    for _ in range(2):
        engine.first_step = engine.num_steps
        rates.append([engine.train_step(engine.prepare(batch_of(0))).learning_rate for _ in range(3)])
    assert rates == [[0.01, 0.01, 0.005]] * 2


def test_resumes_exactly_from_its_state(partition: FeaturePartition) -> None:
    through = engine_of(partition)
    expected = train(through, range(10))
    first = engine_of(partition)
    train(first, range(5))
    second = engine_of(partition, seed=5)
    second.load_dense_state({name: value.clone() for name, value in first.dense_state().items()})
    assert set(second.shard_names()) <= set(first.shard_state())
    second.load_shard_state({name: value.clone() for name, value in first.shard_state().items()})
    assert second.num_steps == 5
    assert train(second, range(5, 10)) == expected[5:]
    for mine, theirs in ((second.dense_state(), through.dense_state()), (second.shard_state(), through.shard_state())):
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())


def test_ids_are_dropped_in_training_alone(partition: FeaturePartition) -> None:
    plain, dropping = engine_of(partition), engine_of(partition, id_dropout=0.5)
    logits = [engine.predict(engine.prepare(batch_of(9))) for engine in (plain, dropping)]
    assert (logits[0] == logits[1]).all()
    assert train(plain, range(9, 10)) != train(dropping, range(9, 10))
    again = [dropping.predict(dropping.prepare(batch_of(8))) for _ in range(2)]
    assert (again[0] == again[1]).all()


def test_predicting_changes_nothing(partition: FeaturePartition) -> None:
    engine = engine_of(partition)
    train(engine, range(2))
    before = {n: v.clone() for n, v in (engine.dense_state() | engine.shard_state()).items()}
    logits = engine.predict(engine.prepare(batch_of(9)))
    assert logits.shape == (6,) and logits.dtype == np.float64
    assert engine.predict(engine.prepare(batch_of(9, samples=0))).shape == (0,)
    after = engine.dense_state() | engine.shard_state()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    label = torch.from_numpy(batch_of(9).label_B).double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(torch.from_numpy(logits), label)
    assert train(engine, range(9, 10))[0] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("table", [4096, {"kind": "exact", "max_rows": 16, "admit_after": 2}])
def test_a_rank_alone_computes_the_bits_of_the_way_by_owners(partition: FeaturePartition, table: object) -> None:
    alone, by_owners = (engine_of(partition, tables={"item": table}) for _ in range(2))
    assert alone._exchange.is_alone
    by_owners._exchange.is_alone = False
    assert train(alone, range(4)) == train(by_owners, range(4))
    states = [engine.dense_state() | engine.shard_state() for engine in (alone, by_owners)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_what_does_not_fit_is_named(partition: FeaturePartition) -> None:
    with pytest.raises(ConfigError, match=r"field ad_item needs table item.*set model\.tables\.item"):
        engine_of(partition, tables={"items": 5})
    with pytest.raises(ConfigError, match="the ranks built different models"):
        engine_of(partition, comm=OtherDigest())
    with pytest.raises(CheckpointError, match="the checkpoint is of another model"):
        engine_of(partition).load_dense_state({})


def test_building_leaves_the_random_state_alone(partition: FeaturePartition) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    engine_of(partition)
    assert torch.equal(torch.rand(3), expected)


class TwoKinds(SoloComm):
    """The first of two ranks, whose other one is on a processor without units for bfloat16."""

    def allgather_object(self, value: object, name: str = "objects") -> list:
        return [value, "float32"] if name == "compute dtypes" else [value]


def test_the_type_of_the_products_is_settled_once(partition: FeaturePartition, monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {"amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.delenv(VARIABLE)

    def dtype_of_auto() -> torch.dtype:
        return engine_of(partition, compute_dtype="auto").services["images"].model.compute_dtype

    assert dtype_of_auto() == torch.bfloat16
    capabilities["amx_bf16"] = False
    assert dtype_of_auto() == torch.float32
    config, cpu = ModelConfig(), torch.device("cpu")
    assert machine.with_compute_dtype(config, SoloComm(), cpu, "bfloat16").compute_dtype == "bfloat16"
    capabilities["amx_bf16"] = True
    assert machine.with_compute_dtype(config, TwoKinds(), cpu, None).compute_dtype == "float32"
    chosen = ModelConfig(compute_dtype="float64")
    assert machine.with_compute_dtype(chosen, SoloComm(), cpu, "bfloat16") is chosen
    capabilities["amx_bf16"] = False
    monkeypatch.setenv(VARIABLE, "bfloat16")
    assert dtype_of_auto() == torch.bfloat16, "the environment goes before the hardware"
    assert machine.with_compute_dtype(config, SoloComm(), cpu, "float32").compute_dtype == "float32"
    monkeypatch.setenv(VARIABLE, "float16")
    with pytest.raises(ConfigError, match=r"CROSSMEDIA_COMPUTE_DTYPE=float16 is neither bfloat16 nor float32"):
        dtype_of_auto()


def test_a_part_of_a_batch_counts_as_its_share_of_the_whole(partition: FeaturePartition) -> None:
    """Where ranks have its other two thirds: losses are summed over ranks, and gradients as well."""
    whole, part = engine_of(partition), engine_of(partition)
    losses, gradients = [], []
    for engine, samples in ((whole, 6), (part, 18)):
        losses.append(engine.train_step(engine.prepare(replace(batch_of(0), global_samples=samples))).loss)
        gradients.append({name: value.grad for name, value in engine.model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0] / 3)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient / 3)
