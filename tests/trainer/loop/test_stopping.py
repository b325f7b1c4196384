"""Early stopping: when it stops, what the run ends with, and that an interrupted run ends with the same."""

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from featurestore.storage.storage import Storage
from tests.raised import raises
from tests.trainer.checkpoints import steps_of
from tests.trainer.conftest import Places, values_of
from tests.trainer.whole_runs import assert_same, interrupted_after, report_of, run_alone
from trainer.comm import SoloComm
from trainer.config import Config, load_config
from trainer.errors import ConfigError, TrainerError
from trainer.evaluation import predict
from trainer.loop import training as train_module
from trainer.loop.training import StoppedError, best_step, has_ended, has_finished, metrics_of, num_plateaus
from trainer.main import _next_command, train
from trainer.problems import Problem
from trainer.runs.checkpoint import read_state
from trainer.runs.folder import find_checkpoint
from trainer.runs.open import with_validation

GAUCS = (0.5, 0.6, 0.7, 0.65, 0.7)
"""After every second step."""


def _history(*gaucs: float | None) -> list[dict[str, Any]]:
    return [{"step": 10 * (n + 1), "gauc": gauc} for n, gauc in enumerate(gaucs)]


class TestDecision:
    def test_best_is_the_earliest_of_the_highest(self) -> None:
        assert best_step([]) is None
        assert best_step(_history(0.5, 0.7, 0.6, 0.7)) == 20
        assert metrics_of(_history(0.5, 0.7), 20) == {"gauc": 0.7}

    @pytest.mark.parametrize(
        ("gaucs", "patience", "ended"),
        [
            ([], 1, False),
            ([0.5], 1, False),
            ([0.5, 0.5], 1, True),
            ([0.5, 0.4], 2, False),
            ([0.5, 0.4, 0.45], 2, True),
            ([0.5, 0.4, 0.6, 0.4], 2, False),
            ([0.5, 0.4, 0.4, 0.4], None, False),
        ],
    )
    def test_patience(self, gaucs: list[float], patience: int | None, ended: bool) -> None:
        assert has_ended(_history(*gaucs), patience) is ended

    def test_plateaus_are_evaluations_whose_auc_is_no_better_than_all_before(self) -> None:
        assert num_plateaus([]) == 0
        assert num_plateaus([{"auc": auc} for auc in (0.5, 0.7, 0.7, None, 0.6, 0.65, 0.8)]) == 3

    def test_a_gauc_that_is_not_defined(self) -> None:
        with raises(TrainerError, Problem.NO_GAUC, where=20):
            has_ended(_history(0.5, None), 1)


@contextlib.contextmanager
def _scored(*gaucs: float) -> Iterator[list[int]]:
    """Let the first evaluations find these GAUCs, within the block; gives the impressions that each one measured.

    None has a higher AUC than the one before, so that rates fall.
    """
    script, measured = ({"gauc": gauc, "auc": 0.5} for gauc in gaucs), list[int]()

    def scored(*given: Any) -> Any:
        metrics = predict.evaluate(*given)
        measured.append(int(metrics["impressions"] or 0))
        return metrics | next(script, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.loop.training.evaluate", scored)
        yield measured


@pytest.fixture
def scripted() -> Iterator[list[int]]:
    """Evaluations that find the GAUCs of `whole`, and the last one again."""
    with _scored(*GAUCS, GAUCS[-1]) as measured:
        yield measured


@pytest.fixture(scope="module")
def whole(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has interrupted."""
    with _scored(*GAUCS):
        return _run(places, "whole", tmp_path_factory.mktemp("stopping"))


def _run(places: Places, name: str, folder: Path, checkpoint_every: int | str = 1, **changes: Any) -> Path:
    settings = {"train__eval_every": 2, "train__early_stopping": 2, "train__keep_checkpoints": 1, **changes}
    return run_alone(places, run__name=name, run__dir=folder, train__checkpoint_every=checkpoint_every, **settings)


@pytest.mark.long
def test_the_run_ends_with_the_best_evaluation(places: Places, whole: Path, tmp_path: Path) -> None:
    """The tenth step's GAUC is no higher than the sixth's."""
    assert steps_of(whole) == [6]
    report = report_of(whole)
    assert (report["global_step"], report["metrics"]["gauc"]) == (6, 0.7)
    assert [entry["step"] for entry in report["history"]] == [2, 4, 6, 8, 10]
    plain = {"train__early_stopping": "null", "train__eval_every": "null", "train__max_steps": 6}
    assert_same(whole, run_alone(places, run__name="six", run__dir=tmp_path, **plain))


@pytest.mark.long
def test_the_best_parameters_are_there_where_no_other_checkpoint_is_due(
    places: Places, whole: Path, tmp_path: Path, scripted: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    seldom = _run(places, "seldom", tmp_path, checkpoint_every="null", train__checkpoint_every_s="null")
    said = " ".join(capsys.readouterr().out.split())
    assert "stopped early after step 10 of" in said
    assert "no better in 2 evaluations than at step 6, GAUC 0.7000 (train.early_stopping)" in said
    assert_same(seldom, whole)


@pytest.mark.long
def test_an_interrupted_run_ends_the_same(places: Places, whole: Path, tmp_path: Path, scripted: list[int]) -> None:
    """Killed after its best step, which a later start has to know."""
    with interrupted_after(9):
        _run(places, "halves", tmp_path)
    assert read_state(find_checkpoint(tmp_path / "halves")).step == 9
    halves = _run(places, "halves", tmp_path, run__resume="latest")
    assert_same(halves, whole, metrics=True)
    assert report_of(halves)["history"] == report_of(whole)["history"]


@pytest.mark.long
def test_a_signal_in_the_midst_of_an_evaluation_loses_none(
    places: Places, whole: Path, tmp_path: Path, scripted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last one, too: that ends the run."""
    evaluate = train_module.evaluate

    def stopped(*given: Any) -> Any:
        metrics = evaluate(*given)
        if len(scripted) == len(GAUCS):
            raise StoppedError("SIGTERM received")
        return metrics

    with monkeypatch.context() as patched, pytest.raises(StoppedError):
        patched.setattr("trainer.loop.training.evaluate", stopped)
        _run(places, "halves", tmp_path)
    halves = _run(places, "halves", tmp_path, run__resume="latest")
    assert report_of(halves)["history"] == report_of(whole)["history"]
    assert_same(halves, whole, metrics=True)


def test_a_best_at_the_very_end_is_kept_as_any_run(places: Places, tmp_path: Path, scripted: list[int]) -> None:
    run = _run(places, "end", tmp_path, train__max_steps=4)
    assert steps_of(run) == [4]
    assert len(scripted) == 2


@pytest.mark.parametrize(
    ("changes", "finished"),
    [
        ({}, True),
        ({"step": 2}, False),
        ({"total_steps": 6}, True),
        ({"total_steps": 7}, False),
        ({"total_steps": 7, "patience": 1}, True),
        ({"total_steps": 7, "patience": 2}, False),
        ({"metrics": {}}, False),
        ({"metrics": {}, "tested": False}, True),
    ],
)
def test_what_is_left_to_do_of_a_run_with_a_report(changes: dict[str, Any], finished: bool) -> None:
    history = [{"step": 4, "gauc": 0.6}, {"step": 6, "gauc": 0.5}]
    values = {"step": 4, "total_steps": 4, "patience": None, "tested": True, "metrics": {"gauc": 0.6}} | changes
    report = {"global_step": 4, "history": history, "metrics": values.pop("metrics")}
    assert has_finished(report, **values) is finished


KEPT = ["2026-01-01", "2026-01-02"]


@pytest.mark.long
def test_a_run_ends_with_the_best_epoch_on_days_that_it_is_not_trained_on(places: Places, tmp_path: Path) -> None:
    """The second one is the best on the last training day."""
    few_steps = {"run__dir": tmp_path, "data__global_batch_size": 96}
    with _scored(0.5, 0.7, 0.6):
        held_out = {"data__validation_days": 1, "train__epochs": 3}
        validated = run_alone(places, run__name="validated", **held_out, **few_steps)
    plain = run_alone(places, run__name="two", data__train_days=f"[{','.join(KEPT)}]", **few_steps)
    assert_same(validated, plain, metrics=True)
    report, steps = report_of(validated), report_of(plain)["global_step"]
    assert report["global_step"] == steps
    assert [entry["step"] for entry in report["history"]] == [steps // 2, steps, 3 * steps // 2]
    held = len(values_of(places.folder / "samples/train/day=2026-01-03.parquet", "label"))
    assert [entry["impressions"] for entry in report["history"]] == [held] * 3
    config = load_config(validated / "config.yaml")
    assert (config.data.train_days, config.data.validation_days) == (KEPT, ["2026-01-03"])


def test_days_are_named_once(places: Places) -> None:
    samples = Storage(str(places.folder / "samples"))

    def of(*settings: str, recorded: Any = None) -> tuple[Any, Any]:
        data = with_validation(load_config(settings=list(settings)), samples, recorded).data
        return data.train_days, data.validation_days

    nowhere: Any = None  # by default nothing is listed
    assert with_validation(load_config(), nowhere).data.validation_days == 0
    last = (KEPT, ["2026-01-03"])
    assert of() == (None, 0) and of("data.validation_days=[]") == (None, 0)
    assert of("data.validation_days=1") == last
    assert of("data.validation_days=1", f"data.train_days=[{','.join(KEPT)}]") == (KEPT[:1], KEPT[1:])
    assert of("data.validation_days=[2026-01-03]", f"data.train_days=[{','.join(KEPT)}]") == last
    with raises(ConfigError, Problem.NO_TRAINING_DAYS_LEFT, value=3, days=3, where=samples.url):
        of("data.validation_days=3")
    with raises(ConfigError, Problem.NO_TRAINING_DAYS_LEFT, value="1 (for train.early_stopping)", days=1):
        of("train.early_stopping=1", f"data.train_days=[{KEPT[0]}]")
    # What a checkpoint has recorded counts where nothing is said.
    assert of(recorded=["2026-01-03"]) == last and of("train.epochs=9", recorded=0) == (None, 0)
    assert of("data.validation_days=0", recorded=["2026-01-03"]) == (None, 0)


@pytest.mark.long
def test_a_run_that_chose_its_epoch_ends_with_the_command_that_trains_on_the_days_held_out(
    places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.runs.open._LEAST_DAYS", 3)  # what the samples have
    folder = tmp_path / "my runs"  # the command says as one word what is one
    with _scored(0.5, 0.7, 0.6):
        run_alone(places, run__dir=folder, run__name="a", train__epochs=3, run__resume="auto")
    output = " ".join(capsys.readouterr().out.split())
    assert "held out, to choose the best of 3 epochs: 2026-01-03; data.validation_days=0 trains on all days" in output
    command, option, file, *words = shlex.split(output.partition("as well: ")[2])[1:]
    assert (command, option) == ("train", "--config")
    after = load_config(Path(file), words)
    assert (after.run.name, after.run.warm_parts, after.train.epochs) == ("a-all", "all", 2)
    assert (after.data.train_days, after.optim.lr) == (["2026-01-03"], 0.3 * load_config(Path(file)).optim.lr)
    train(after, SoloComm())
    assert report_of(folder / "a-all")["warm_start"].startswith(f"{folder / 'a'}/checkpoints/")


def test_the_command_of_several_ranks_starts_as_many(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(
        config=Config(), folder=tmp_path, comm=SimpleNamespace(size=2), train_reader=SimpleNamespace(steps_per_epoch=2)
    )
    run.engine = SimpleNamespace(num_steps=4, first_step=0)
    assert _next_command(run, ["2026-01-03"]).startswith("horovodrun -np 2 crossmedia train --config ")


@pytest.mark.parametrize(
    ("settings", "num_days", "held"),
    [
        pytest.param([], 40, 0, id="preset"),
        pytest.param(["train.epochs=3"], 3, 0, id="three days are too few"),
        pytest.param(["train.epochs=3"], 4, 1, id="four days"),
        pytest.param(["train.epochs=4"], 19, 1, id="nineteen days"),
        pytest.param(["train.epochs=4"], 40, 4, id="a tenth"),
        pytest.param(["train.epochs=4", "train.max_steps=9"], 40, 0, id="steps are counted"),
        pytest.param(["train.epochs=4", "train.eval_every=9"], 40, 0, id="test samples are looked at"),
        pytest.param(["train.epochs=4", "data.validation_days=0"], 40, 0, id="as is said"),
        pytest.param(["train.early_stopping=1", "train.max_steps=9"], 3, 1, id="early stopping"),
        pytest.param(["train.early_stopping=1", "train.eval_every=9"], 40, 0, id="early stopping by test samples"),
    ],
)
def test_more_epochs_than_two_hold_days_out(settings: list[str], num_days: int, held: int, tmp_path: Path) -> None:
    days = [f"2026-01-{day:02d}" if day < 32 else f"2026-02-{day - 31:02d}" for day in range(1, num_days + 1)]
    (tmp_path / "train").mkdir()
    for day in days:
        (tmp_path / "train" / f"day={day}.parquet").touch()
    data = with_validation(load_config(settings=settings), Storage(str(tmp_path))).data
    assert data.validation_days == (days[-held:] if held else 0)
    assert data.train_days == (days[:-held] if held else None)
