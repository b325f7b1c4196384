"""Runs with each optimiser of ID rows and with exact tables: resumed, evaluated, begun with, exported, refused."""

import shutil
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.raised import raises
from tests.trainer.checkpoints import differs, tensors_of
from tests.trainer.conftest import Places, make_days, values_of
from tests.trainer.whole_runs import assert_same, report_of, run_alone
from trainer.comm import SoloComm
from trainer.config import IdOptimizer, load_config
from trainer.daily import follow
from trainer.errors import CheckpointError, ConfigError
from trainer.problems import Problem
from trainer.runs.checkpoint import read_state
from trainer.runs.folder import find_checkpoint
from trainer.runs.open import open_run
from trainer.runs.saved import open_trained

pytestmark = pytest.mark.long
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


def test_a_checkpoint_has_the_weights_that_a_reader_gets(trained: Train) -> None:
    """Also of rows that make up for steps which did not touch them; who only reads keeps no optimiser's state."""
    run = trained("a", optim__ids="adam", optim__ids_lr=0.05, train__max_steps=8)
    saved, reader = tensors_of(run), open_trained(run, SoloComm())
    lagging = whole(saved, "item/", "last_weight")
    assert not np.array_equal(whole(saved, "item/", "weight"), lagging)
    assert {name.rpartition("/")[2] for name in reader.engine.shard_names()} == {"weight"}
    resumed = open_run(load_config(run / "config.yaml", ["run.resume=latest"]), SoloComm())
    for engine in (reader.engine, resumed.engine):
        for name, value in engine.shard_state().items():
            assert torch.equal(value, saved[name]), name
    assert torch.equal(resumed.engine.tables["item"].rows.weight, torch.from_numpy(lagging))
    resumed.close()
    reader.close()


def test_another_optimizer_is_refused_on_resume_and_another_learning_rate_is_not(trained: Train) -> None:
    """Rows make up for the steps before at the rates of then."""
    trained("a", optim__ids="adam", optim__ids_lr=0.01, train__max_steps=4)
    for settings, differing in (
        ({"optim__ids": "rowwise_adagrad"}, differs("optim.ids", "rowwise_adagrad", other="adam")),
        ({"optim__ids": "adam", "optim__eps": 1e-6}, differs("optim.eps", 1e-6, other=1e-8)),
    ):
        with raises(CheckpointError, Problem.CHECKPOINT_OF_OTHER_RUN, differing=differing):
            trained("a", run__resume="latest", **settings)
    run = trained("a", optim__ids="adam", optim__ids_lr=1e-9, train__max_steps=5, run__resume="latest")
    assert tensors_of(run)["ids/learning_rates"].tolist() == [0.01] * 4 + [1e-9]


TABLES = (
    "{user: 64, item: {kind: exact, max_rows: 80, admit_after: 2}, "
    "image: {kind: exact, max_rows: 20, when_full: refuse}, category: 16, scene: 16}"
)
EVICTING = TABLES.replace(", when_full: refuse", "")


@pytest.fixture
def exact(trained: Train) -> Train:
    """The same, with exact tables and one epoch less."""
    return partial(trained, model__tables=TABLES, train__epochs=2)


def ids_of(run: Path, table: str) -> set[int]:
    """Ids that have rows."""
    parts = [ids for name, ids in tensors_of(run).items() if name.startswith(f"{table}/") and name.endswith("/ids")]
    return set(torch.cat(parts).tolist())


def table_of(run: Path, name: str) -> dict[str, Any]:
    return report_of(run)["tables"][name]


PREPARED: dict[str, Any] = {"optim__ids": "adam", "data__global_batch_size": 64}
EVICTED: dict[str, Any] = {"optim__ids": "rowwise_adagrad", "model__tables": EVICTING, "data__global_batch_size": 8}


@pytest.mark.parametrize(
    ("settings", "steps"), [(PREPARED, (3, 4, 6)), (EVICTED, (10, 10, 25))], ids=["prepared ahead", "evictions"]
)
def test_resumed_exact_tables_are_the_same(exact: Train, settings: dict[str, Any], steps: tuple[int, int, int]) -> None:
    """With a step prepared ahead when the checkpoint is written: its ids are not counted twice; after evictions."""
    at, stop, end = steps
    through = exact("through", **settings, train__max_steps=end)
    stopped = exact("stopped", **settings, train__max_steps=stop, train__checkpoint_every=at)
    if settings is EVICTED:
        assert table_of(through, "image")["evicted"] > table_of(stopped, "image")["evicted"] > 4
    resume = stopped / "checkpoints" / f"step-{at:08}"
    assert_same(exact("again", **settings, train__max_steps=end, run__resume=resume), through)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, " times an id stayed at the cold row"),
        ({**EVICTED, "train__max_steps": 30}, " rows made room for other ids, so few are trained"),
    ],
    ids=["refusing", "evicting"],
)
def test_figures(exact: Train, settings: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In the report, and a warning of the table in which few ids have rows."""
    run = exact("figures", **settings)
    items, images = table_of(run, "item"), table_of(run, "image")
    if settings:
        assert images["evicted"] > images["rows"] == 20
    else:
        assert items["used_rows"] == len(ids_of(run, "item")) == 40 and items["rows"] == 80
        assert 0 < items["cold"] < items["served"] and items["refused"] == 0
        assert images["used_rows"] < 40 and images["refused"] == images["cold"] > 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("warning: table image: ") == said.count(told) == 1


@pytest.mark.parametrize("parts", ["all", "partial"])
def test_a_warm_start_takes_ids_and_counts_or_leaves_them(exact: Train, parts: str) -> None:
    before = exact("before", train__max_steps=6)
    assert len(ids_of(before, "item")) > 20
    larger = TABLES.replace("max_rows: 20", "max_rows: 200")
    after = exact("after", run__warm_start=before, run__warm_parts=parts, train__max_steps=1, model__tables=larger)
    assert ids_of(after, "item") == (ids_of(before, "item") if parts == "all" else set())


def test_days_let_go_of_what_was_not_used(tmp_path: Path) -> None:
    """Items of one day each, but for 5, which every day has; after a day without them they go."""
    places = make_days(tmp_path)
    tables = "{user: 64, item: {kind: exact, max_rows: 400, expire_days: 1}, image: 64, category: 16, scene: 16}"
    settings = places.settings(
        run__name="daily", model__tables=tables, model__images="none", data__global_batch_size=64, train__epochs=1
    )
    follow(load_config(settings=settings), SoloComm(), first="2026-01-01", continues=True)
    runs = sorted((tmp_path / "runs" / "daily").glob("2026-*"))
    files = [next((tmp_path / "samples").glob(f"t*/day={run.name}.parquet")) for run in runs]
    seen = [{*values_of(file, "behavior_item"), *values_of(file, "ad_item")} for file in files]  # in table item
    have: dict[int, int] = {}
    for number, (run, items) in enumerate(zip(runs, seen, strict=True)):
        gone = {each for each, last in have.items() if number - last > 1}
        have = {each: last for each, last in have.items() if each not in gone} | dict.fromkeys(items, number)
        assert ids_of(run, "item") == set(have)
        assert table_of(run, "item")["expired"] == len(gone)
        last_use = tensors_of(run)["item/0000/last_use"][1:]
        day = (date(2026, 1, number + 1) - date(1970, 1, 1)).days
        assert set(last_use.tolist()) <= {day, day - 1}


def test_days_have_to_be_known(exact: Train, places: Places, tmp_path: Path) -> None:
    samples = shutil.copytree(places.folder / "samples", tmp_path / "samples")
    (samples / "train" / "day=2026-01-02.parquet").rename(samples / "train" / "more.parquet")
    tables = TABLES.replace("max_rows: 20", "max_rows: 20, expire_days: 3")
    with raises(ConfigError, Problem.EXPIRY_WITHOUT_DAYS, where="image", value=3):
        exact("undated", data__samples=samples, model__tables=tables)
