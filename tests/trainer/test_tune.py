"""Tuning: each point of the grid is the run that the settings say, a killed job goes on, and the best is written."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from featurestore.parsing import parse_yaml
from tests.raised import raises
from tests.ranks import StandingRanks
from tests.trainer.checkpoints import differs
from tests.trainer.conftest import Places, make_places
from tests.trainer.main_worker import before_steps
from tests.trainer.whole_runs import all_alike, assert_same, report_of, run_alone
from trainer.comm import SoloComm
from trainer.config import differences, load_config
from trainer.engine.engine import Engine
from trainer.errors import CheckpointError, ConfigError
from trainer.problems import Problem
from trainer.tune import GRID, SETTINGS_FILE, TABLE_FILE, parsed_grid, trials_of, tune

TRIED = {"optim.lr": (0.01, 0.001)}
SHARED = {"model__compute_dtype": "float64", "run__name": "tune", "train__checkpoint_every": 2}


@contextmanager
def _steps(killed_before: int | None = None) -> Iterator[list[int]]:
    """Note the steps that are trained in the block; the second run is interrupted before its step of this number."""
    done: list[int] = []

    def note(engine: Engine, _: object) -> None:
        if done.count(0) == 2 and engine.num_steps == killed_before:
            raise KeyboardInterrupt
        done.append(engine.num_steps)

    with before_steps(note):
        yield done


def _tuned(settings: list[str], epochs: int = 3) -> list[dict[str, Any]]:
    trials = trials_of(None, settings, TRIED, epochs)
    tune(trials, SoloComm())
    return json.loads((trials[0].folder.parent / TABLE_FILE).read_text())


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Places, list[Any]]:
    """A tuning of two points that was killed in the midst of the second one and started again."""
    places = make_places(tmp_path_factory.mktemp("tuned"))
    settings = places.settings(**SHARED)
    with _steps(killed_before=5), pytest.raises(KeyboardInterrupt):
        _tuned(settings)
    with _steps() as rest:
        rows = _tuned(settings)
    assert rest[0] == 4 and 0 not in rest, "it goes on from the checkpoint, and the first run is there"
    with _steps() as again:
        assert _tuned(settings) == rows
    assert again == []
    return places, rows


@pytest.mark.long
def test_each_point_is_measured_on_the_day_held_out(tuned: tuple[Places, list[Any]], tmp_path: Path) -> None:
    places, rows = tuned
    assert [row["values"] for row in rows] == [{"optim.lr": 0.01}, {"optim.lr": 0.001}]
    last = {"train__early_stopping": 1, "data__validation_days": 1, "data__test_days": "[]", "train__epochs": 3}
    alone = run_alone(places, **SHARED | last | {"run__dir": tmp_path, "optim__lr": 0.001})
    assert_same(Path(rows[1]["run"]), alone)
    history = report_of(alone)["history"]
    best = max(history, key=lambda entry: entry["gauc"])
    assert rows[1]["epoch"] == 1 + history.index(best)
    assert [rows[1][name] for name in ("gauc", "auc", "logloss")] == [best[name] for name in ("gauc", "auc", "logloss")]
    assert report_of(alone)["metrics"] == report_of(Path(rows[1]["run"]))["metrics"] == {}, "no test day is looked at"


@pytest.mark.long
def test_the_best_is_written_for_all_days_and_other_runs_are_not_taken(
    tuned: tuple[Places, list[Any]],
) -> None:
    places, rows = tuned
    best, file = max(rows, key=lambda row: row["gauc"]), places.folder / "runs/tune" / SETTINGS_FILE
    written = load_config(file)
    words = [f"{name}={json.dumps(value)}" for name, value in best["values"].items()]
    words += [f"train.epochs={best['epoch']}", "data.validation_days=0"]
    given = load_config(None, [*places.settings(**SHARED), *words])
    differing = differences(written.model_dump(mode="json"), given.model_dump(mode="json"))
    assert [each.setting for each in differing if not each.setting.startswith("run.")] == []
    assert parse_yaml(file.read_text())["optim"]["lr"] == best["values"]["optim.lr"]
    assert written.run == load_config().run
    with raises(CheckpointError, Problem.CHECKPOINT_OF_OTHER_RUN, differing=differs("train.seed", 5, other=0)):
        _tuned(places.settings(**SHARED, train__seed=5))


@pytest.mark.long(20)  # with what all tests here share
def test_two_ranks_find_the_same(tuned: tuple[Places, list[Any]], tmp_path: Path, two_ranks: StandingRanks) -> None:
    places, rows = tuned
    settings = places.settings(**SHARED | {"run__dir": tmp_path})
    out = two_ranks.run("-m", "trainer.tune", "--epochs", "3", "--grid", "optim.lr=[0.01]", *settings)
    assert out.count("1 of 1: optim.lr=0.01") == 1 and out.count(SETTINGS_FILE) == 1
    assert out.count("held out, to choose") == 1 and "to train on the days held out" not in out, "the settings do"
    (row,) = json.loads((tmp_path / "tune" / TABLE_FILE).read_text())
    figures = ("epoch", "gauc", "auc", "logloss")
    assert {name: row[name] for name in figures} == all_alike({name: rows[0][name] for name in figures})


def test_what_is_tried(tmp_path: Path) -> None:
    assert parsed_grid([]) == GRID
    assert parsed_grid(["optim.lr=[1, 2]", "model.mlp=[[8], null]"]) == {"optim.lr": [1, 2], "model.mlp": [[8], None]}
    grid = {"optim.lr": (0.01, 0.001), "model.mlp": ([8, 4], [4])}
    trials = trials_of(None, ["data.validation_days=3", f"run.dir={tmp_path}"], grid, 2)
    names = [trial.held_out.run.name for trial in trials]
    assert names[:2] == ["optim.lr-0.01-model.mlp-8-4", "optim.lr-0.01-model.mlp-4"] and len({*names}) == 4
    assert {trial.held_out.data.validation_days for trial in trials} == {3}
    assert trials[1].chosen.model.mlp == [4]


@pytest.mark.parametrize("wrong", ["optim.lr", "optim.lr=0.1", "optim.lr=[]", "optim.lr=[1", "=[1]"])
def test_a_grid_that_is_none(wrong: str) -> None:
    with pytest.raises(ConfigError):
        trials_of(None, [], parsed_grid([wrong]), 1)


@pytest.mark.parametrize(
    "setting", ["run.resume=5", "run.overwrite=true", "train.eval_every=5", "train.early_stopping=2"]
)
def test_what_each_run_chooses(setting: str) -> None:
    with raises(ConfigError, Problem.SETTING_NOT_FREE, where=setting.partition("=")[0]):
        trials_of(None, [setting, "run.name=a", "data.validation_days=1"], GRID, 1)
