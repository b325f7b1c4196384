"""Exported networks give the trainer's logits: every base net, aggregator and setting, at any number of anything."""

import ctypes
import gc
import shutil
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch.fx.experimental.sym_node import SymNode

from serving.errors import BrokenBundleError
from serving.network import served
from serving.network.exporting import export_network
from serving.network.served import PORTABLE, FieldRows, NetworkInputs, ServedNetwork, compiled_name
from serving.problems import Problem
from tests.raised import raises
from tests.serving.scoring.variants import compiled, shared_places
from trainer.config import BaseNet, ModelConfig, Pooling
from trainer.exchange.vectors import FieldVectors
from trainer.models.ctr import CtrModel
from trainer.models.layers import width_of
from trainer.models.nets import build_model
from trainer.schema.fields import Field, Schema

SETTINGS: list[dict] = [
    *({"base": base} for base in get_args(BaseNet)),
    *({"pooling": pooling} for pooling in get_args(Pooling)),
    *({"images": images} for images in ("none", "ad", "behavior")),
    *({"base": base, "multi_hot": "sum", "image_products": False} for base in ("mlp", "din", "two_tower")),
    {"pooling": "concat", "pooling_length": 4},
    *({"base": base, "activation": "prelu", "dropout": 0.5} for base in ("mlp", "din", "finalmlp")),
    {"activation": "prelu"},
    *({"image_dropout": 0.1, "base": base} for base in ("mlp", "two_tower")),
]
USERS: list[tuple[list[int], list[int]]] = [
    *(([candidates], [33]) for candidates in (1, 2, 37, 200, 1000)),
    *(([candidates], [behaviors]) for candidates in (1, 5) for behaviors in (0, 1, 2, 3)),
    ([3, 1, 0, 7], [2, 0, 5, 33]),
    ([0, 0], [1, 0]),
]
PAIRED = ("behavior_item", "behavior_shop", "behavior_age")
"""What DIN takes value by value."""


SCHEMA = Schema(
    fields=(
        Field(name="user", side="user", kind="id"),
        Field(name="age", side="user", kind="dense"),
        Field(name="interests", side="user", kind="multi_id", weights="interest_weights", width=2),
        Field(name="behavior_item", side="user", kind="multi_id", table="item", width=4),
        Field(name="behavior_shop", side="user", kind="multi_id", table="shop"),
        Field(name="behavior_age", side="user", kind="multi_id", beside="behavior_item", buckets=4),
        Field(name="behavior_image", side="user", kind="content"),
        Field(name="ad_item", side="ad", kind="id", table="item", width=4),
        Field(name="ad_shop", side="ad", kind="id", table="shop", weights="shop_weight"),
        Field(name="ad_tags", side="ad", kind="multi_id", weights="tag_weights"),
        Field(name="ad_words", side="ad", kind="multi_id"),
        Field(name="scene", side="ad", kind="id", context=True),
        Field(name="price", side="ad", kind="dense", width=2),
        Field(name="ad_image", side="ad", kind="content"),
        Field(name="behavior_title", side="user", kind="content", store="titles", width=2),
        Field(name="ad_title", side="ad", kind="content", store="titles", width=2),
    )
)
"""A field of every kind on both sides, with weights and of two contents."""


def drawn_of(**settings: object) -> "Drawn":
    """A model none of whose parameters and running values is where it starts, and what draws its inputs."""
    small = {"id_width": 3, "visual_width": 5, "mlp": [6], "attention_hidden": 4}
    chosen = ModelConfig.model_validate({**small, "pooling_length": 20, **settings})
    torch.manual_seed(0)
    model = build_model(SCHEMA, chosen).eval()
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            is_variance = bool((value == 1).all())
            value.add_(torch.randn_like(value) * 0.2)
            if is_variance:
                value.abs_()
    if model.new_ads is not None:
        model.new_ads.decide(pictures_count=False)
    return Drawn(model, chosen)


@dataclass
class Drawn:
    """Draws inputs of a model: for each user so many candidates, and so many values in each list."""

    model: CtrModel
    settings: ModelConfig
    seed: int = 0

    def __call__(self, candidates: Sequence[int], behaviors: Sequence[int]) -> NetworkInputs:
        self.rng = np.random.default_rng(self.seed)
        num_groups, num_samples = len(candidates), sum(candidates)
        group_of_sample_B = np.repeat(np.arange(num_groups), candidates)
        fields, dense = {}, {}
        for number, field in enumerate(self.model.fields):
            rows = num_groups if field.side == "user" else num_samples
            if field.kind == "dense":
                dense[field.name] = self._reals(rows, width_of(field, self.settings))
                continue
            lengths_M = np.ones(rows, np.int64)
            if field.side == "user" and field.kind != "id":
                longer = 0 if field.name in PAIRED else number
                lengths_M = np.array([length and length + longer for length in behaviors], np.int64)
            elif field.kind == "multi_id":
                lengths_M = self.rng.integers(0, 4, rows)
            fields[field.name] = self._rows(field, lengths_M)
        return NetworkInputs(group_of_sample_B=group_of_sample_B, num_groups=num_groups, fields=fields, dense=dense)

    def _rows(self, field: Field, lengths_M: np.ndarray) -> FieldRows:
        count = int(lengths_M.sum())
        rows_NV = self._reals(count, width_of(field, self.settings))
        if field.name == "ad_item":
            rows_NV[::3] *= 1e-7  # new ads, for model.image_dropout
        weights_N = self._reals(count) if field.weights else None
        return FieldRows(rows_NV=rows_NV, lengths_M=lengths_M, weights_N=weights_N)

    def _reals(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape, dtype=np.float32) * np.float32(0.3)


@torch.no_grad()
def trainers_logits(model: CtrModel, inputs: NetworkInputs) -> np.ndarray:
    """What the trainer's code makes of all users at once, as trainer.engine does it."""
    vectors, dense = {}, {name: torch.from_numpy(values) for name, values in inputs.dense.items()}
    for field in model.fields:
        if field.kind == "dense":
            continue
        given = inputs.fields[field.name]
        rows_NV, lengths_M = torch.from_numpy(given.rows_NV), torch.from_numpy(given.lengths_M)
        vectors[field.name] = FieldVectors(rows_NV, torch.arange(len(rows_NV)), lengths_M)
        if given.weights_N is not None:
            vectors[field.name].weights_N = torch.from_numpy(given.weights_N)
    return model(model.with_pictures_of_ads(vectors), dense, torch.from_numpy(inputs.group_of_sample_B)).numpy()


def check(network: ServedNetwork, drawn: Drawn) -> None:
    for candidates, behaviors in USERS:
        inputs = drawn(candidates, behaviors)
        logits = network.score(inputs)
        expected = trainers_logits(drawn.model, inputs)
        rounding = 2e-6 * max(1, np.abs(expected).max(initial=0))
        np.testing.assert_allclose(logits, expected, rtol=0, atol=rounding, err_msg=f"{candidates} {behaviors}")
        assert logits.dtype == np.float32
        assert len(logits) < 2 or np.ptp(logits) > 1e-3, "candidates differ"


def test_a_run_of_the_network_has_a_bounded_number_of_pairs() -> None:
    """Candidates times the user's longest list: memory and time of a run are bounded by it."""
    lengths_G, counts_G = np.array([3, 40_000, 700]), [600, 3, 100]
    inputs = NetworkInputs(
        group_of_sample_B=np.repeat(np.arange(3), counts_G),
        num_groups=3,
        fields={"behaviors": FieldRows(np.zeros((lengths_G.sum(), 1), np.float32), lengths_G)},
    )
    blocks = [
        (len(block.group_of_sample_B), len(block.fields["behaviors"].rows_NV))
        for block in served.split_by_user(inputs, {"behaviors"}, 256, 1 << 15)
    ]
    assert blocks == [(256, 3), (256, 3), (88, 3), *[(1, 40_000)] * 3, (46, 700), (46, 700), (8, 700)]


SOME = [{"base": "din", "image_dropout": 0.1}]
"""Lists paired value by value, and pictures that do not count: each part of a network is exported for itself."""


@pytest.mark.parametrize(
    "settings",
    [
        *(pytest.param(each, marks=pytest.mark.long) for each in SOME),
        *(pytest.param(each, marks=pytest.mark.slow) for each in SETTINGS),
    ],
    ids=str,
)
def test_networks(settings: dict, tmp_path: Path) -> None:
    drawn = drawn_of(**settings)
    assert export_network(drawn.model, drawn.settings, tmp_path) == [tmp_path / PORTABLE]
    check(ServedNetwork.load(tmp_path), drawn)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        *SOME,
        {"base": "finalmlp", "pooling": "multi_query", "activation": "prelu"},
        {"base": "two_tower"},
        {"base": "lr", "pooling": "concat"},
        {"base": "dcn", "pooling": "concat", "pooling_length": 3},
    ],
    ids=str,
)
def test_compiled(settings: dict, tmp_path: Path) -> None:
    drawn = drawn_of(**settings)
    files = export_network(drawn.model, drawn.settings, tmp_path, compiled=True)
    assert files == [tmp_path / PORTABLE, tmp_path / compiled_name()]
    network = ServedNetwork.load(tmp_path)
    assert (network.form, network.note) == ("compiled", None)
    check(network, drawn)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, portable and compiled; that both give the same logits, tests/jobs/test_publish_model.py says."""
    made, _ = compiled(shared_places(tmp_path_factory))
    return Path(made.url) / made.manifest.folder


@pytest.mark.long(5)
@pytest.mark.timeout(900)  # it compiles a network
class TestFiles:
    def test_what_is_no_archive_or_another_one(self, tmp_path: Path) -> None:
        path = tmp_path / PORTABLE
        path.write_bytes(b"no network")
        for _ in range(2):
            with raises(BrokenBundleError, Problem.NOT_NETWORK, where=path):
                ServedNetwork.load(tmp_path)
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("network/data", "nothing")

    def test_code_of_another_machine(self, small: Path, tmp_path: Path) -> None:
        shutil.copytree(small, tmp_path, dirs_exist_ok=True)
        (tmp_path / compiled_name()).rename(tmp_path / "network-aarch64-default-0123456789ab.pt2")
        network = ServedNetwork.load(tmp_path)
        assert network.form == "portable"
        assert "network-aarch64-default-0123456789ab.pt2 is compiled for another machine" in network.note

    def test_code_that_this_machine_cannot_load(self, small: Path, tmp_path: Path) -> None:
        """As where its libraries are older: an archive that is whole, with a library that is none."""
        shutil.copytree(small, tmp_path, dirs_exist_ok=True)
        compiled = tmp_path / compiled_name()
        with zipfile.ZipFile(small / compiled_name()) as old, zipfile.ZipFile(compiled, "w") as new:
            for name in old.namelist():
                new.writestr(name, b"no library" if name.endswith(".so") else old.read(name))
        network = ServedNetwork.load(tmp_path)
        assert network.form == "portable"
        assert f"{compiled.name} cannot be loaded" in network.note


@pytest.mark.long
def test_a_network_that_nobody_has_any_more_leaves_nothing_behind(tmp_path: Path) -> None:
    """A scorer loads one at each switch; torch itself would keep the sizes of all."""
    drawn = drawn_of()
    export_network(drawn.model, drawn.settings, tmp_path)
    counts = []
    for _ in range(3):
        ServedNetwork.load(tmp_path, portable=True)
        gc.collect()
        counts.append(sum(isinstance(each, SymNode) for each in gc.get_objects()))
    assert counts[0] == counts[2], counts


def test_names_of_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    name = compiled_name()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert compiled_name() != name


def test_inputs_that_do_not_fit_are_own_bugs() -> None:
    """Compiled code reads what lies behind too short an array."""
    drawn = drawn_of()
    slots = served.Slots.of(drawn.model, drawn.settings)
    whole = drawn([3], [4])
    slots.arrays(whole)
    parts = {"ad_item": "rows_NV", "user": "rows_NV", "interests": "weights_N", "ad_tags": "lengths_M"}
    for name, part in parts.items():
        field = whole.fields[name]
        short = field._replace(**{part: getattr(field, part)[:-1]})
        with pytest.raises(AssertionError, match=rf"{name}\.{part} has"):
            slots.arrays(replace(whole, fields={**whole.fields, name: short}))


def test_scores_with_one_thread_wherever_it_is_called() -> None:
    """A second thread of OpenMP, which compiled code starts, would spin between small requests and take a core."""
    drawn, threads = drawn_of(), []
    openmp = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))

    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        threads.append(openmp.omp_get_max_threads())
        return [tensors[0].float()]

    def score() -> None:
        openmp.omp_set_num_threads(2)  # what a thread begins with on two cores
        network.score(drawn([3], [4]))

    network = ServedNetwork(run, served.Slots.of(drawn.model, drawn.settings), "compiled", None)
    with ThreadPoolExecutor(1) as other:
        other.submit(score).result()
    assert threads == [1]
