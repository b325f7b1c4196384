"""What a training step must not do on a GPU, seen on a CPU: wait for it more than once, or add numbers in any order.

The host waits where it fetches a number from the device, where a size depends on numbers there, and for copies from
memory that is not pinned (`torch.cuda.set_sync_debug_mode` would tell, on a GPU). Numbers are added in any order by
atomic adds to one place (docs of `torch.use_deterministic_algorithms`).
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from featurestore.lookup.partition import FeaturePartition
from tests.trainer.conftest import drawn_store
from trainer.comm import SoloComm
from trainer.config import Config, ExactTableConfig, IdOptimizer, ModelConfig, OptimConfig, Pooling
from trainer.engine.engine import Engine
from trainer.samples.reader import Batch, Jagged
from trainer.schema.fields import Field, Schema

SAMPLES, GROUPS, STEPS = 12, 5, 3
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
FETCHES = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "_unique2",
    "unique_dim",
    "equal",
    "is_nonzero",
)
READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu")
POOLINGS = get_args(Pooling)
CASES: dict[str, dict[str, Any]] = {
    **{pooling: {"pooling": pooling} for pooling in POOLINGS},
    **{base: {"base": base} for base in ("lr", "din", "dcn", "finalmlp")},
    "two_tower": {"base": "two_tower"},
    "dropout": {"dropout": 0.2},
    "id_dropout": {"id_dropout": 0.5},
    "new ads": {"image_dropout": 0.3},
    "ids alone": {"images": "none"},
}


class Waits(TorchDispatchMode):
    """Notes operations that wait for a GPU, by the name of each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

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


class AtomicAdds(TorchDispatchMode):
    """Notes operations that would add several floating numbers to one place in any order on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

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


class Reads(TorchFunctionMode):
    """Notes what Python reads of tensors, and copies that are waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

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


@pytest.fixture(scope="module")
def partition(tmp_path_factory: pytest.TempPathFactory) -> FeaturePartition:
    folder = tmp_path_factory.mktemp("waiting")
    store = drawn_store(folder / "store", np.random.default_rng(0).normal(size=(20, 8)))
    return FeaturePartition.load(store, cache_dir=folder / "cache", missing="learned")


@pytest.fixture
def engine_of(partition: FeaturePartition, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """Engines that take the way of a GPU, and that of several ranks, which has all that one rank alone does."""
    monkeypatch.setattr("trainer.exchange.vectors.adds_in_order", lambda rows: False)

    def make(model: dict[str, Any], optim: OptimConfig | None = None) -> Engine:
        tables = {"user": 64, "item": 64, "place": 8}
        sizes = {"mlp": [6, 6], "embed_hidden": [6], "visual_width": 4, "id_width": 4, "attention_hidden": 4}
        settings = ModelConfig(**{"tables": tables, **sizes, "compute_dtype": "float32", **model})
        config = Config(model=settings, optim=optim or OptimConfig(lr=0.01))
        engine = Engine(SoloComm(), SCHEMA, {"images": partition}, config)
        engine._exchange.is_alone = False
        return engine

    return make


def batch_of(number: int) -> Batch:
    draw = np.random.default_rng(number)
    one_B, one_G = np.ones(SAMPLES, np.int32), np.ones(GROUPS, np.int32)
    lengths_G = draw.integers(0, 4, GROUPS).astype(np.int32)
    num_values = int(lengths_G.sum())
    return Batch(
        fields={
            "user": Jagged(draw.integers(0, 20, GROUPS), one_G),
            "behavior_item": Jagged(draw.integers(0, 50, num_values), lengths_G),
            "behavior_image": Jagged(draw.integers(0, 25, num_values), lengths_G),  # keys from 20 on have no feature
            "ad_item": Jagged(draw.integers(0, 50, SAMPLES), one_B),
            "ad_image": Jagged(draw.integers(0, 25, SAMPLES), one_B),
            "place": Jagged(draw.integers(0, 5, SAMPLES), one_B),
        },
        dense={"age": draw.normal(size=(GROUPS, 1)).astype(np.float32)},
        group_of_sample_B=np.sort(draw.integers(0, GROUPS, SAMPLES)),
        label_B=draw.integers(0, 2, SAMPLES).astype(np.float32),
        group_id_B=np.zeros(SAMPLES, np.int64),
        global_samples=SAMPLES,
        weights={"behavior_item": draw.normal(size=num_values).astype(np.float32)},
    )


def check(engine: Engine) -> None:
    waits, adds, reads = Waits(), AtomicAdds(), Reads()
    for number in range(STEPS):
        prepared = engine.prepare(batch_of(number))
        with waits, adds, reads:
            engine.train_step(prepared)
    assert adds.found == []
    assert waits.found == []
    assert reads.found == ["tolist"] * STEPS, "the loss and the failures, read together"


@pytest.mark.parametrize("case", CASES)
def test_one_wait_and_no_atomic_add(case: str, engine_of: Callable[..., Engine]) -> None:
    check(engine_of(CASES[case]))


def test_one_wait_and_no_atomic_add_with_exact_tables(engine_of: Callable[..., Engine]) -> None:
    for when_full in ("refuse", "evict"):
        exact = ExactTableConfig(kind="exact", max_rows=16, admit_after=2, when_full=when_full)
        check(engine_of({"tables": {"user": 64, "item": exact, "place": 8}, "table_shards": 4}))


@pytest.mark.parametrize("ids", get_args(IdOptimizer))
def test_one_wait_and_no_atomic_add_with_every_optimizer(ids: Any, engine_of: Callable[..., Engine]) -> None:
    check(engine_of({}, optim=OptimConfig(lr=0.01, ids=ids)))


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
