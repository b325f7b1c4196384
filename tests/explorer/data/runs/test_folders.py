"""What folders of runs say: finished, running, unfinished or unreadable, whatever lies in them; and how runs differ."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from explorer.data.background import Task
from explorer.data.runs import comparing, folders
from explorer.data.runs.comparing import RunDifference, RunsCompared, TooMuchError, compare_runs, predictions_of
from explorer.data.runs.folders import RunFacts, open_run, read_facts, read_runs, run_names
from explorer.errors import NotHereError
from explorer.places import Places
from explorer.problems import Problem
from tests.explorer.world import World
from tests.raised import raises
from tests.trainer.whole_runs import alike
from trainer.evaluation import predict
from trainer.evaluation.bootstrap import LEAST_USERS_SHOWN, compare
from trainer.evaluation.predict import Predictions, predict_run
from trainer.runs.folder import DAYS_FILE, finished


@pytest.fixture
def runs(world: World, tmp_path: Path) -> Path:
    return shutil.copytree(world.runs, tmp_path / "runs")


def facts(runs: Path, name: str = "both") -> RunFacts:
    return read_facts(runs / name)


def age(run: Path, seconds: float) -> None:
    for each in [run, *run.rglob("*")]:
        os.utime(each, (time.time() - seconds,) * 2)


def test_a_finished_run_has_its_metrics_settings_and_checkpoints(runs: Path) -> None:
    found = facts(runs)
    assert (found.state, found.images, found.problems) == ("finished", "both", ())
    metrics = found.report["metrics"]
    assert found.metrics["impressions"] == metrics["impressions"]
    assert metrics["gauc"] and metrics["auc"] and metrics["users"] < LEAST_USERS_SHOWN  # of so few users none is shown
    assert found.metrics["gauc"] is found.metrics["auc"] is None
    assert (found.settings["train.max_steps"], found.settings["data.missing"]) == (12, "zeros")
    assert found.checkpoints == ("step-00000012",)
    assert found.samples_digest == facts(runs, "ids-only").samples_digest != ""
    Path(finished(runs / "both")[-1].path("state.json")).write_text('{"origin": ')
    assert facts(runs).samples_digest == ""


def test_a_run_without_a_report_runs_while_it_writes(runs: Path) -> None:
    (runs / "both" / "report.json").unlink()
    assert facts(runs).state == "running"
    age(runs / "both", 3600)
    assert facts(runs).state == "unfinished"


@pytest.mark.parametrize(
    "content", ["model: {images: [", "- a\n- b\n", "", "\x00", "a: &a [1]\nb: *a\n", "a: 1\n" + "#" * 300_000]
)
def test_unreadable_settings_are_a_problem_read_once(runs: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aliases can stand for endless values, and a large file takes long: neither is parsed."""
    read: list[Path] = []
    monkeypatch.setattr(folders, "read_file", lambda file: read.append(file) or file.read_bytes())
    config = runs / "both" / "config.yaml"
    config.write_text(content)
    found = facts(runs)
    assert (found.state, found.settings, found.images, len(found.problems)) == ("finished", {}, "", 1)
    assert facts(runs) == found and read.count(config) <= 1
    config.write_text("model: {images: none}")
    assert facts(runs).images == "none"


def test_runs_and_days_of_trainer_daily_are_listed_by_their_last_change(runs: Path) -> None:
    for number, name in enumerate(("ids-only", "both", "both-longer")):
        age(runs / name, 1000 * (3 - number))
    (runs / "no run").mkdir()
    no_text = runs / os.fsdecode(b"\xff")
    no_text.mkdir()
    (no_text / "config.yaml").write_text("")
    for name in ("daily/2026-01-02", "other/both"):
        shutil.copytree(runs / "both", runs / name)
        age(runs / name, 500)
    (runs / "daily" / DAYS_FILE).write_text("{}")
    (runs / "daily" / "2026-01-04").mkdir()  # not begun
    places = Places(runs=str(runs))
    names = ["daily/2026-01-02", "both-longer", "both", "ids-only"]
    assert run_names(places) == names
    assert [(run.name, run.state) for run in read_runs(places, names[:2])] == [(name, "finished") for name in names[:2]]
    assert open_run(places, names[0]) == runs / "daily" / "2026-01-02"


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "/etc", "nothing", "a\0b", "x" * 300, "../both", "x/..", "/..", "../.", "a//b"]
)
def test_what_is_no_run_is_not_here(runs: Path, name: str) -> None:
    with raises(NotHereError, Problem.NO_RUN, where=name[:60]):
        open_run(Places(runs=str(runs / "both")), name)


@pytest.fixture
def places(world: World) -> Places:
    return world.places()


def difference(value: float | None, low: float | None, high: float | None, metric: str = "gauc") -> RunDifference:
    of = {"run": "new", "against": "old", "metric": metric}
    return RunDifference(**of, ours=0.7, baseline=0.6, value=value, low=low, high=high, p_value=None)


def test_they_are_those_of_the_trainer(places: Places, world: World) -> None:
    found = compare_runs(places, ["ids-only", "both", "both-longer"], Task())
    baseline = predict_run(world.runs / "ids-only")
    assert found.new_ad_impressions == 0
    assert found.metrics == comparing.COMPARED
    assert [(each.run, each.metric) for each in found.verdicts] == [("both", "gauc"), ("both-longer", "gauc")]
    for run in ("both", "both-longer"):
        expected = compare(predict_run(world.runs / run), baseline, metrics=comparing.COMPARED)
        differences = [each for each in found.differences if each.run == run]
        assert [each.metric for each in differences] == [*comparing.COMPARED]
        for each in differences:
            for name in ("value", "low", "high"):
                wanted = getattr(expected[each.metric], name)
                assert getattr(each, name) == alike(each.metric, wanted, within=1e-6)
    assert found.problems == {}
    assert found.impressions == len(baseline.logit_N)


def test_ads_new_to_both_runs_are_judged_alone(places: Places, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {name: predict_run(world.runs / name) for name in ("ids-only", "both")}
    new = np.unique(runs["both"].impressions.ad_N)[1:]

    def newer(places: Places, name: str, task: Task[RunsCompared]) -> Predictions:
        ads = new if name == "ids-only" else new[1:]
        return replace(runs[name], is_new_ad_N=np.isin(runs[name].impressions.ad_N, ads))

    monkeypatch.setattr(comparing, "predictions_of", newer)
    found = compare_runs(places, ["ids-only", "both"], Task())
    is_new_N = np.isin(runs["both"].impressions.ad_N, new[1:])
    expected = compare(runs["both"], runs["ids-only"], metrics=("auc",), only_N=is_new_N)["auc"]
    (of_new,) = found.in_metric(comparing.NEW_ADS)
    assert (of_new.value, of_new.low, of_new.high) == (expected.value, expected.low, expected.high)
    assert of_new.low is not None
    assert [each.metric for each in found.verdicts] == ["gauc", comparing.NEW_ADS]
    assert "in AUC, new ads" in found.verdicts[1].verdict


def test_predictions_are_kept(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    first = predictions_of(places, "both", Task())
    monkeypatch.setattr(predict, "predict_run", None)
    assert predictions_of(places, "both", Task()) is first


def test_a_run_that_cannot_be_compared_is_a_problem_of_its_own(changing_world: World) -> None:
    shutil.rmtree(changing_world.runs / "both" / "checkpoints")
    found = compare_runs(changing_world.places(), ["ids-only", "both", "both-longer"], Task())
    assert found.problems == {"both": Problem.NO_CHECKPOINT}
    assert {each.run for each in found.differences} == {"both-longer"}


def test_too_many_impressions_or_images_are_left_to_a_command(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "MOST_IMAGES", 3)
    predictions_of(places, "ids-only", Task())
    with raises(TooMuchError, Problem.TOO_MANY_IMAGES, where=places.store, most=3):
        predictions_of(places, "both", Task())
    monkeypatch.setattr(comparing, "MOST_IMPRESSIONS", 3)
    with raises(TooMuchError, Problem.TOO_MANY_IMPRESSIONS, most=3):
        predictions_of(places, "ids-only", Task())


def test_a_difference_is_claimed_only_where_its_interval_does_not_span_0() -> None:
    clear, other = difference(0.1, 0.05, 0.15), difference(0.1, -0.01, 0.2)
    assert clear.verdict == "“new” is better than “old” in GAUC: +0.1000, 95 % interval +0.0500 to +0.1500."
    assert difference(-0.1, -0.2, -0.05).is_better is False
    assert difference(-0.1, -0.2, -0.05, "logloss").is_better is True
    assert difference(0.1, 0.05, 0.2, "logloss").verdict.startswith("“new” is worse than “old” in log loss")
    assert other.is_better is None
    assert other.verdict.endswith("GAUC: +0.1000, 95 % interval -0.0100 to +0.2000, which spans 0.")
    for edge in (other, difference(-0.1, -0.2, 0.0), difference(0.1, 0.0, 0.2)):
        assert edge.verdict.startswith("No significant difference between “new” and “old”")
    assert "without an interval" in difference(0.1, None, None).verdict
    assert "not defined" in difference(None, None, None).verdict
