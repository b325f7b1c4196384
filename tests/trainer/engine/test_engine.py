"""The engine alone: what it refuses and reports, its state, and what a step must not do on a GPU, seen on a CPU.

Wait for the GPU more than once, or add numbers in any order: the host waits where it fetches a number from the device,
where a size depends on numbers there, and for copies from memory that is not pinned
(`torch.cuda.set_sync_debug_mode` would tell, on a GPU). Numbers are added in any order by atomic adds to one place
(docs of `torch.use_deterministic_algorithms`).
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from featurestore.lookup import VARIABLE
from featurestore.lookup.partition import FeaturePartition
from tests.raised import raises
from tests.trainer.checkpoints import assert_same_tensors
from tests.trainer.conftest import drawn_store
from trainer.comm import SoloComm
from trainer.config import BaseNet, Config, ExactTableConfig, IdOptimizer, ModelConfig, OptimConfig, Pooling
from trainer.engine import machine
from trainer.engine.engine import Engine
from trainer.errors import CheckpointError, ConfigError
from trainer.problems import Problem
from trainer.samples.reader import Batch, Jagged
from trainer.schema.fields import Field, Schema

SCHEMA = Schema(
    new_ad_field="ad_item",
    fields=(
        Field(name="user", side="user", kind="id"),
        Field(name="age", side="user", kind="dense"),
        Field(name="behavior_item", side="user", kind="multi_id", table="item", weights="weight"),
        Field(name="behavior_image", side="user", kind="content"),
        Field(name="ad_item", side="ad", kind="id", table="item"),
        Field(name="ad_image", side="ad", kind="content"),
        Field(name="place", side="ad", kind="id", context=True),
    ),
)
TABLES = {"user": 64, "item": 64, "place": 8}
OPTIM = OptimConfig(lr=0.01)


@pytest.fixture(scope="module")
def partition(tmp_path_factory: pytest.TempPathFactory) -> FeaturePartition:
    folder = tmp_path_factory.mktemp("step")
    store = drawn_store(folder / "store", np.random.default_rng(0).normal(size=(20, 8)))
    return FeaturePartition.load(store, cache_dir=folder / "cache", missing="learned")


def engine_of(
    partition: FeaturePartition, comm: Any = None, seed: int = 0, optim: OptimConfig = OPTIM, **model: object
) -> Engine:
    sizes = {"mlp": [6, 6], "embed_hidden": [6], "visual_width": 4, "id_width": 4, "attention_hidden": 4}
    settings = ModelConfig(**{"tables": TABLES, **sizes, "compute_dtype": "float32", **model})
    config = Config(model=settings, optim=optim, train={"seed": seed})
    return Engine(comm or SoloComm(), SCHEMA, {"images": partition}, config)


def batch_of(number: int, samples: int = 12) -> Batch:
    draw, groups = np.random.default_rng(number), min(5, samples)
    one_B, one_G = np.ones(samples, np.int32), np.ones(groups, np.int32)
    lengths_G = draw.integers(0, 4, groups).astype(np.int32)
    num_values = int(lengths_G.sum())
    return Batch(
        fields={
            "user": Jagged(draw.integers(0, 20, groups), one_G),
            "behavior_item": Jagged(draw.integers(0, 50, num_values), lengths_G),
            "behavior_image": Jagged(draw.integers(0, 25, num_values), lengths_G),  # keys from 20 on have no feature
            "ad_item": Jagged(draw.integers(0, 50, samples), one_B),
            "ad_image": Jagged(draw.integers(0, 25, samples), one_B),
            "place": Jagged(draw.integers(0, 5, samples), one_B),
        },
        dense={"age": draw.normal(size=(groups, 1)).astype(np.float32)},
        group_of_sample_B=np.sort(draw.integers(0, max(groups, 1), samples)),
        label_B=draw.integers(0, 2, samples).astype(np.float32),
        group_id_B=np.zeros(samples, np.int64),
        global_samples=max(samples, 1),
        weights={"behavior_item": draw.normal(size=num_values).astype(np.float32)},
    )


def first_of_two(asks: str, others: object) -> SoloComm:
    """The first of two ranks, whose other one says `others` of what `asks` names."""
    comm: Any = SoloComm()
    comm.allgather_object = lambda value, name="objects": [value, others] if name == asks else [value]
    return comm


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
    assert_same_tensors(*(engine.dense_state() | engine.shard_state() for engine in (second, through)))


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
    assert logits.shape == (12,) and logits.dtype == np.float64
    assert engine.predict(engine.prepare(batch_of(9, samples=0))).shape == (0,)
    assert_same_tensors(engine.dense_state() | engine.shard_state(), before)
    label = torch.from_numpy(batch_of(9).label_B).double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(torch.from_numpy(logits), label)
    assert train(engine, range(9, 10))[0] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("table", [4096, {"kind": "exact", "max_rows": 16, "admit_after": 2}])
def test_a_rank_alone_computes_the_bits_of_the_way_by_owners(partition: FeaturePartition, table: object) -> None:
    alone, by_owners = (engine_of(partition, tables={**TABLES, "item": table}) for _ in range(2))
    assert alone._exchange.is_alone
    by_owners._exchange.is_alone = False
    assert train(alone, range(4)) == train(by_owners, range(4))
    assert_same_tensors(*(engine.dense_state() | engine.shard_state() for engine in (alone, by_owners)))


def test_what_does_not_fit_is_named(partition: FeaturePartition) -> None:
    with raises(ConfigError, Problem.TABLE_ROWS_UNSET, where="behavior_item", table="item"):
        engine_of(partition, tables={"user": 5, "place": 5, "items": 5})
    with raises(ConfigError, Problem.DIFFERENT_MODELS, digests=re.compile(r"^\w{8}, another$")):
        engine_of(partition, comm=first_of_two("digest", "another"))
    engine = engine_of(partition)
    state = engine.dense_state()
    weight = state.pop(name := "model.mlp.0.weight")
    both = {"value": (5, weight.shape[1]), "wanted": (6, weight.shape[1])}
    with raises(CheckpointError, Problem.OTHER_TENSORS, lacking=1, missing=[name], surplus=1, unknown=["c"]):
        engine.load_dense_state(state | {"c": weight})
    with raises(CheckpointError, Problem.TENSOR_SHAPE, where=name, **both):
        engine.load_dense_state(state | {name: weight[1:]})


def test_building_leaves_the_random_state_alone(partition: FeaturePartition) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    engine_of(partition)
    assert torch.equal(torch.rand(3), expected)


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
    two_kinds = first_of_two("compute dtypes", "float32")
    assert machine.with_compute_dtype(config, two_kinds, cpu, None).compute_dtype == "float32"
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
    for engine, samples in ((whole, 12), (part, 36)):
        losses.append(engine.train_step(engine.prepare(replace(batch_of(0), global_samples=samples))).loss)
        gradients.append({name: value.grad for name, value in engine.model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0] / 3)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient / 3)


FETCHES = {"nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal", "is_nonzero"}
FETCHES |= {"_local_scalar_dense"}
READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu")
EXACT = [ExactTableConfig(kind="exact", max_rows=16, admit_after=2, when_full=each) for each in ("refuse", "evict")]
CASES: dict[str, dict[str, Any]] = {
    **{pooling: {"pooling": pooling} for pooling in get_args(Pooling)},
    **{base: {"base": base} for base in get_args(BaseNet)},
    "dropout": {"dropout": 0.2},
    "id_dropout": {"id_dropout": 0.5},
    "new ads": {"image_dropout": 0.3},
    "ids alone": {"images": "none"},
    **{exact.when_full: {"tables": {**TABLES, "item": exact}, "table_shards": 4} for exact in EXACT},
    **{ids: {"optim": OptimConfig(lr=0.01, ids=ids)} for ids in get_args(IdOptimizer)},
}


class Noting:
    """A mode of torch that notes in the block what it is looking for, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []


class Waits(Noting, TorchDispatchMode):
    """Notes operations that wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        operation = name.partition(".")[0]
        if operation in FETCHES or _has_a_size_of_its_own(operation, name, args, kwargs):
            self.found.append(name)
        return func(*args, **kwargs)


def _has_a_size_of_its_own(operation: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if operation == "repeat_interleave":
        return kwargs.get("output_size") is None
    if operation == "segment_reduce":  # it checks its lengths, unless `unsafe`
        return not kwargs.get("unsafe", False)
    if operation in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    return False


class AtomicAdds(Noting, TorchDispatchMode):
    """Notes operations that would add several floating numbers to one place in any order on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        operation = name.partition(".")[0].rstrip("_")
        if operation in ("index_add", "scatter_add", "scatter_reduce") and args[3].is_floating_point():
            rows_differ = operation == "index_add" and len(np.unique(args[2].numpy())) == len(args[2])
            self.found += [] if rows_differ else [name]
        if operation in ("index_put", "_index_put_impl") and len(args) > 3 and args[3]:
            self.found.append(name)
        if operation in ("embedding_dense_backward", "_embedding_bag_backward", "put"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Reads(Noting, TorchFunctionMode):
    """Notes what Python reads of tensors, and copies that are waited for."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in READS:
            self.found.append(name)
        places = [kwargs.get("device"), kwargs.get("other"), *args[1:]]
        if name == "to" and any(isinstance(each, (torch.device, torch.Tensor, str)) for each in places):
            self.found += [] if kwargs.get("non_blocking") else ["to"]
        if name == "backward":  # torch's own function would run it with this mode off
            loss = args[0]
            with self:
                run = torch.autograd.graph._engine_run_backward
                run((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)
            return None
        return func(*args, **kwargs)


@pytest.mark.parametrize("case", CASES)
def test_one_wait_and_no_atomic_add(case: str, partition: FeaturePartition, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way of a GPU, and on that of several ranks, which has all that one rank alone does."""
    monkeypatch.setattr("trainer.exchange.vectors.adds_in_order", lambda rows: False)
    engine, waits, adds, reads = engine_of(partition, **CASES[case]), Waits(), AtomicAdds(), Reads()
    engine._exchange.is_alone = False
    for number in range(3):
        prepared = engine.prepare(batch_of(number))
        with waits, adds, reads:
            engine.train_step(prepared)
    assert adds.found == []
    assert waits.found == []
    assert reads.found == ["tolist"] * 3, "the loss and the failures, read together"


def test_what_waits_or_adds_in_any_order_is_noticed_and_nothing_else() -> None:
    numbers, values = torch.tensor([1, 0, 1]), torch.randn(3, 2)
    table = torch.zeros(2, 2, requires_grad=True)
    wrong: dict[str, tuple[type[Waits | AtomicAdds], Callable[[], object]]] = {
        "nonzero": (Waits, numbers.nonzero),
        "index": (Waits, lambda: numbers[numbers > 0]),
        "masked_select": (Waits, lambda: numbers.masked_select(numbers > 0)),
        "bincount": (Waits, lambda: torch.bincount(numbers)),
        "repeat_interleave": (Waits, lambda: torch.repeat_interleave(numbers, numbers)),
        "segment_reduce": (Waits, lambda: torch.segment_reduce(values, "sum", lengths=numbers + 1 - numbers, axis=0)),
        "_local_scalar_dense": (Waits, numbers[0].item),
        "index_add": (AtomicAdds, table.index_select(0, numbers).sum().backward),
        "index_put": (AtomicAdds, table[numbers].sum().backward),
        "embedding_dense_backward": (AtomicAdds, torch.nn.functional.embedding(numbers, table).sum().backward),
        "scatter_add": (AtomicAdds, lambda: torch.zeros(2).scatter_add_(0, numbers, values[:, 0])),
    }
    for operation, (mode, call) in wrong.items():
        with mode() as found:
            call()
        assert len(found.found) == 1 and operation in found.found[0]
    for read in (numbers.tolist, lambda: numbers.to("cpu"), numbers.cpu, lambda: bool(numbers[0])):
        with Reads() as seen:
            read()
        assert len(seen.found) == 1
    with Reads() as seen, AtomicAdds() as found:
        numbers.to("cpu", non_blocking=True), numbers.to(torch.float64)
        torch.zeros(2, 2).index_add_(0, numbers[:2], values[:2])
        torch.zeros(2, dtype=torch.int64).scatter_add_(0, numbers, numbers)
    assert seen.found == found.found == []


def test_arrays_get_to_the_device_by_one_function() -> None:
    """A copy from memory that is not pinned is waited for; on a CPU there is none to be seen."""
    folder = Path(__file__).parents[3] / "trainer"
    copies = re.compile(r"from_numpy\([^\n]*\)\.to\(|torch\.(as_)?tensor\([^\n]*device=")
    files = [file for part in ("engine", "exchange", "models", "ids") for file in (folder / part).rglob("*.py")]
    assert len(files) > 15
    assert [file.name for file in files if copies.search(file.read_text())] == []
