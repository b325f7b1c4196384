"""Exported networks give the trainer's logits: every base net, aggregator and setting, at any number of anything."""

import gc
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch.fx.experimental.sym_node import SymNode

from serving.errors import BrokenBundleError
from serving.network.exporting import export_network
from serving.network.served import (
    PORTABLE,
    FieldRows,
    NetworkInputs,
    ServedNetwork,
    Slots,
    compiled_name,
    split_by_user,
)
from tests.serving.network.drawn import Drawn, config, model_of, schema, trainers_logits
from tests.serving.scoring.variants import compiled, shared_places
from trainer.config import BaseNet, Pooling

BASES = get_args(BaseNet)
POOLINGS = get_args(Pooling)
SETTINGS: list[dict] = [
    *({"base": base} for base in BASES),
    *({"pooling": pooling} for pooling in POOLINGS),
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
        for block in split_by_user(inputs, {"behaviors"}, 256, 1 << 15)
    ]
    assert blocks == [(256, 3), (256, 3), (88, 3), *[(1, 40_000)] * 3, (46, 700), (46, 700), (8, 700)]


def drawn_of(settings: dict) -> Drawn:
    chosen = config(**settings)
    model = model_of(schema(), chosen)
    if model.new_ads is not None:
        model.new_ads.decide(pictures_count=False)
    return Drawn(model, chosen)


SOME = [{"base": "din", "image_dropout": 0.1}]
"""Lists paired value by value, and pictures that do not count: each part of a network is exported for itself."""


def check_portable(settings: dict, folder: Path) -> None:
    drawn = drawn_of(settings)
    assert export_network(drawn.model, drawn.settings, folder) == [folder / PORTABLE]
    check(ServedNetwork.load(folder), drawn)


@pytest.mark.long
@pytest.mark.parametrize("settings", SOME, ids=str)
def test_some_networks(settings: dict, tmp_path: Path) -> None:
    check_portable(settings, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_network(settings: dict, tmp_path: Path) -> None:
    check_portable(settings, tmp_path)


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
    drawn = drawn_of(settings)
    files = export_network(drawn.model, drawn.settings, tmp_path, compiled=True)
    assert files == [tmp_path / PORTABLE, tmp_path / compiled_name()]
    network = ServedNetwork.load(tmp_path)
    assert (network.form, network.note) == ("compiled", None)
    check(network, drawn)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, portable and compiled; that it gives the trainer's logits, tests/jobs/test_publish_model.py says."""
    made, _ = compiled(shared_places(tmp_path_factory))
    return Path(made.url) / made.manifest.folder


def copied(folder: Path, to: Path) -> Path:
    for name in (PORTABLE, compiled_name()):
        (to / name).write_bytes((folder / name).read_bytes())
    return to


@pytest.mark.long(5)
@pytest.mark.timeout(900)  # it compiles a network
class TestFiles:
    def test_what_is_no_archive(self, tmp_path: Path) -> None:
        (tmp_path / PORTABLE).write_bytes(b"no network")
        with pytest.raises(BrokenBundleError, match=f"{PORTABLE} is not a network as it was exported"):
            ServedNetwork.load(tmp_path)

    def test_another_archive(self, small: Path, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / PORTABLE, "w") as archive:
            archive.writestr("network/data", "nothing")
        with pytest.raises(BrokenBundleError, match=f"{PORTABLE} is not a network as it was exported"):
            ServedNetwork.load(tmp_path)

    def test_code_of_another_machine(self, small: Path, tmp_path: Path) -> None:
        copied(small, tmp_path)
        (tmp_path / compiled_name()).rename(tmp_path / "network-aarch64-default-0123456789ab.pt2")
        network = ServedNetwork.load(tmp_path)
        assert network.form == "portable"
        assert "network-aarch64-default-0123456789ab.pt2 is compiled for another machine" in network.note

    def test_code_that_this_machine_cannot_load(self, small: Path, tmp_path: Path) -> None:
        """As where its libraries are older: an archive that is whole, with a library that is none."""
        copied(small, tmp_path)
        compiled = tmp_path / compiled_name()
        with zipfile.ZipFile(small / compiled_name()) as old, zipfile.ZipFile(compiled, "w") as new:
            for name in old.namelist():
                new.writestr(name, b"no library" if name.endswith(".so") else old.read(name))
        network = ServedNetwork.load(tmp_path)
        assert network.form == "portable"
        assert f"{compiled.name} cannot be loaded" in network.note


def test_a_network_that_nobody_has_any_more_leaves_nothing_behind(tmp_path: Path) -> None:
    """A scorer loads one at each switch; torch itself would keep the sizes of all."""
    settings = config()
    export_network(model_of(schema(), settings), settings, tmp_path, compiled=False)
    counts = []
    for _ in range(3):
        ServedNetwork.load(tmp_path, portable=True)
        gc.collect()
        counts.append(sum(isinstance(each, SymNode) for each in gc.get_objects()))
    assert counts[0] == counts[2], counts


def test_names_of_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    name = compiled_name()
    assert name == compiled_name()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert compiled_name() != name


def test_inputs_that_do_not_fit_are_own_bugs() -> None:
    """Compiled code reads what lies behind too short an array."""
    settings = config()
    drawn = Drawn(model_of(schema(), settings), settings)
    slots = Slots.of(drawn.model, settings)
    whole = drawn([3], [4])
    slots.arrays(whole)
    for name, part in (
        ("ad_item", "rows_NV"),
        ("user", "rows_NV"),
        ("interests", "weights_N"),
        ("ad_tags", "lengths_M"),
    ):
        field = whole.fields[name]
        short = field._replace(**{part: getattr(field, part)[:-1]})
        with pytest.raises(AssertionError, match=rf"{name}\.{part} has"):
            slots.arrays(replace(whole, fields={**whole.fields, name: short}))
