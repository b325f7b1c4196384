"""Runs with each optimiser of ID rows: resumed, evaluated, begun with, refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.checkpoints import tensors_of
from tests.trainer.whole_runs import assert_same, run_alone
from trainer.comm import SoloComm
from trainer.config import IdOptimizer, load_config
from trainer.errors import CheckpointError
from trainer.runs.checkpoint import read_state
from trainer.runs.folder import find_checkpoint
from trainer.runs.open import open_run
from trainer.runs.saved import open_trained

pytestmark = pytest.mark.long

Places = Any
Train = Callable[..., Path]


@pytest.fixture
def trained(places: Places, tmp_path: Path) -> Train:
    """Trains a run of this name with these settings, and returns its folder."""

    settings = {"run__dir": tmp_path, "train__epochs": 3, "model__compute_dtype": "float32"}
    return lambda name, **changes: run_alone(places, run__name=name, **{**settings, **changes})


@pytest.mark.parametrize("ids", get_args(IdOptimizer))
def test_resumed_in_the_middle_of_an_epoch_it_ends_with_the_same_bits(trained: Train, ids: str) -> None:
    """And between two epochs, where what happens is the same for all optimisers: with one of them."""
    settings = {"optim__ids": ids, "optim__warmup_steps": 8}
    settings |= {"data__global_batch_size": 64, "data__train_days": "[2026-01-01]"}  # a few steps an epoch
    through = trained("through", **settings)
    steps = read_state(find_checkpoint(through)).step
    in_the_second, before_the_third = steps // 3 + 2, steps // 3 * 2
    for stop in (in_the_second, before_the_third)[: 2 if ids == "adam" else 1]:
        trained("stopped", **settings, train__max_steps=stop, run__resume="latest" if stop > steps // 2 else "null")
    again = trained("stopped", **settings, run__resume="latest")
    assert_same(again, through)


def whole(tensors: dict[str, Tensor], table: str, part: str) -> np.ndarray:
    """A part of all shards of a table."""
    names = sorted(name for name in tensors if name.startswith(table) and name.endswith(f"/{part}"))
    return torch.cat([tensors[name] for name in names]).numpy()


def test_a_checkpoint_has_the_weights_that_a_reader_gets(trained: Train, places: Places) -> None:
    """Also of rows that make up for steps which did not touch them; who only reads keeps no optimiser's state."""
    run = trained("a", optim__ids="adam", optim__ids_lr=0.05, train__max_steps=8)
    saved, reader = tensors_of(run), open_trained(run, SoloComm())
    lagging = whole(saved, "item/", "last_weight")
    assert not np.array_equal(whole(saved, "item/", "weight"), lagging)
    assert {name.rpartition("/")[2] for name in reader.engine.shard_names()} == {"weight"}
    settings = places.settings(
        run__dir=run.parent,
        run__name="a",
        run__resume="latest",
        train__epochs=3,
        optim__ids="adam",
        optim__ids_lr=0.05,
        model__compute_dtype="float32",
    )
    resumed = open_run(load_config(settings=settings), SoloComm())
    for engine in (reader.engine, resumed.engine):
        for name, value in engine.shard_state().items():
            assert torch.equal(value, saved[name]), name
    assert torch.equal(resumed.engine.tables["item"].rows.weight, torch.from_numpy(lagging))
    resumed.close()
    reader.close()


def test_a_warm_start_takes_the_weights_whatever_moved_them(trained: Train, places: Places, tmp_path: Path) -> None:
    before = trained("before", optim__ids="adam", optim__ids_lr=0.05, train__max_steps=8)
    settings = places.settings(
        run__dir=tmp_path,
        run__name="next",
        run__warm_start=before,
        run__warm_parts="full",
        optim__ids="rowwise_adagrad",
    )
    run = open_run(load_config(settings=settings), SoloComm())
    saved = tensors_of(before)
    state = run.engine.shard_state()
    assert all(torch.equal(value, saved[name]) for name, value in state.items() if name.endswith("/weight"))
    assert not any(value.any() for name, value in state.items() if not name.endswith("/weight"))
    run.close()


class TestAnotherOptimizer:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"optim__ids": "rowwise_adagrad"}, r"optim\.ids is 'rowwise_adagrad' here, 'adam' in the checkpoint"),
            ({"optim__ids": "adam", "optim__beta1": 0.8}, r"optim\.beta1 is 0\.8 here, 0\.9 in the checkpoint"),
        ],
    )
    def test_is_refused_on_resume(self, trained: Train, settings: dict[str, Any], message: str) -> None:
        trained("a", optim__ids="adam", train__max_steps=3)
        with pytest.raises(CheckpointError, match=message):
            trained("a", run__resume="latest", **settings)

    def test_another_learning_rate_is_not(self, trained: Train) -> None:
        """Rows make up for the steps before at the rates of then."""
        trained("a", optim__ids="adam", optim__ids_lr=0.01, train__max_steps=4)
        run = trained("a", optim__ids="adam", optim__ids_lr=1e-9, train__max_steps=5, run__resume="latest")
        rates = tensors_of(run)["ids/learning_rates"]
        assert rates.tolist() == [0.01] * 4 + [1e-9]
