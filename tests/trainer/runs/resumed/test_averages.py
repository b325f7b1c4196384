"""Runs with optim.average_share: averages are measured, saved, read and begun with; training goes as without them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.checkpoints import tensors_of
from tests.trainer.whole_runs import alike, assert_same
from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.errors import CheckpointError
from trainer.evaluation.bootstrap import measure
from trainer.evaluation.predict import predict_run
from trainer.main import train
from trainer.runs.checkpoint import read_state
from trainer.runs.folder import find_checkpoint
from trainer.runs.open import open_run

Places = Any
pytestmark = pytest.mark.long
SETTINGS: dict[str, Any] = {
    "train__epochs": 2,
    "optim__ids": "adam",
    "optim__ids_lr": 0.05,
    "model__compute_dtype": "float32",
}
SETTINGS["data__global_batch_size"] = 64


@pytest.fixture(scope="module")
def places(make_places: Callable[[Path], Places], tmp_path_factory: pytest.TempPathFactory) -> Places:
    return make_places(tmp_path_factory.mktemp("averages"))


def trained(places: Places, name: str, **changes: Any) -> Path:
    settings = {**SETTINGS, "run__name": name, **changes}
    train(load_config(settings=places.settings(**settings)), SoloComm())
    return Path(places.folder / "runs" / name)


@pytest.fixture(scope="module")
def averaged(places: Places) -> Path:
    return trained(places, "averaged", optim__average_share=0.5)


def last_step(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """What the last step left of a tensor of a run that keeps averages."""
    row = name.removesuffix("/weight") + "/last_weight"
    return tensors[row if row in tensors else f"trained/{name}"]


def test_training_goes_as_without(places: Places, averaged: Path) -> None:
    """Averages are kept beside it: the last step's parameters and rows have the same bits."""
    plain, mine = tensors_of(trained(places, "plain")), tensors_of(averaged)
    dense = [name for name in plain if f"trained/{name}" in mine]
    rows = [name for name in plain if name.endswith("/last_weight")]
    assert dense and rows
    assert all(torch.equal(last_step(name, mine), plain[name]) for name in dense)
    assert all(torch.equal(mine[name], plain[name]) for name in rows)
    differing = [name for name in dense if not torch.equal(mine[name], plain[name])]
    assert len(differing) > len(dense) / 2
    assert any(not torch.equal(mine[name], plain[name]) for name in plain if name.endswith("/weight")), "rows too"


def test_readers_get_what_training_has_measured(averaged: Path) -> None:
    report = json.loads((averaged / "report.json").read_text())
    predicted = predict_run(averaged)
    impressions = predicted.impressions
    found = measure(predicted.logit_N, impressions.label_N, impressions.user_N)
    for name in ("auc", "gauc", "logloss"):
        assert found[name] == alike(name, report["metrics"][name], within=1e-7)


def test_resumed_at_any_step_it_ends_with_the_same_bits(places: Places, averaged: Path) -> None:
    steps = read_state(find_checkpoint(averaged)).step
    trained(places, "halves", optim__average_share=0.5, train__max_steps=steps // 3)
    halves = trained(places, "halves", optim__average_share=0.5, run__resume="latest")
    assert_same(halves, averaged)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_another_share_is_refused_on_resume(places: Places, averaged: Path, share: float) -> None:
    message = rf"optim\.average_share is {share} here, 0\.5 in the checkpoint"
    with pytest.raises(CheckpointError, match=message):
        trained(places, averaged.name, optim__average_share=share, run__resume="latest", train__epochs=3)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_warm_start_begins_with_the_averages(places: Places, averaged: Path, share: float) -> None:
    """Parameters and averages of the new run alike, so that it is the same before its first step."""
    settings = {**SETTINGS, "run__name": "next", "run__warm_start": averaged, "run__warm_parts": "full"}
    run = open_run(load_config(settings=places.settings(**settings, optim__average_share=share)), SoloComm())
    run.close()
    state, before = run.engine.dense_state() | run.engine.shard_state(), tensors_of(averaged)
    for name, value in state.items():
        if name.startswith(("model.", "stores.")) or name.endswith(("/weight", "/last_weight")):
            assert torch.equal(value, before[name.replace("/last_weight", "/weight")]), name
        if name.startswith("trained/"):
            assert torch.equal(value, before[name.removeprefix("trained/")]), name
