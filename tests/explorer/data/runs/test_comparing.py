"""Differences of runs: those of trainer.evaluate --against, and no claim where an interval spans 0."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from explorer.data.background import Task
from explorer.data.runs import comparing
from explorer.data.runs.comparing import (
    COMPARED,
    NEW_ADS,
    RunDifference,
    RunsCompared,
    TooMuchError,
    compare_runs,
    predictions_of,
)
from explorer.places import Places
from tests.explorer.world import World
from tests.trainer.whole_runs import alike
from trainer.evaluation import predict
from trainer.evaluation.bootstrap import compare
from trainer.evaluation.predict import Predictions, predict_run


@pytest.fixture
def places(world: World) -> Places:
    return world.places()


def difference(value: float | None, low: float | None, high: float | None, metric: str = "gauc") -> RunDifference:
    return RunDifference(
        run="new", against="old", metric=metric, ours=0.7, baseline=0.6, value=value, low=low, high=high
    )


def test_they_are_those_of_the_trainer(places: Places, world: World) -> None:
    found = compare_runs(places, ["ids-only", "both", "both-longer"], Task())
    baseline = predict_run(world.runs / "ids-only")
    assert found.new_ad_impressions == 0
    assert found.metrics == COMPARED
    assert [(each.run, each.metric) for each in found.verdicts] == [("both", "gauc"), ("both-longer", "gauc")]
    for run in ("both", "both-longer"):
        expected = compare(predict_run(world.runs / run), baseline, metrics=("gauc", "auc", "logloss"))
        for each in found.of(run):
            other = expected[each.metric]
            for name in ("value", "low", "high"):
                assert getattr(each, name) == alike(each.metric, getattr(other, name), within=1e-6)
    assert found.problems == {}
    assert found.impressions == len(baseline.logit_N)
    assert {each.run for each in found.differences} == {"both", "both-longer"}


def test_new_ads_are_judged_by_themselves_where_neither_run_was_trained_on_them(
    places: Places, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {name: predict_run(world.runs / name) for name in ("ids-only", "both")}
    new = np.unique(runs["both"].impressions.ad_N)[1:]

    def newer(places: Places, name: str, task: Task[RunsCompared]) -> Predictions:
        ads = new if name == "ids-only" else new[1:]
        return replace(runs[name], is_new_ad_N=np.isin(runs[name].impressions.ad_N, ads))

    monkeypatch.setattr(comparing, "predictions_of", newer)
    found = compare_runs(places, ["ids-only", "both"], Task())
    is_new_N = np.isin(runs["both"].impressions.ad_N, new[1:])
    expected = compare(runs["both"], runs["ids-only"], metrics=("auc",), only_N=is_new_N)["auc"]
    (of_new,) = found.in_metric(NEW_ADS)
    assert (of_new.value, of_new.low, of_new.high) == (expected.value, expected.low, expected.high)
    assert of_new.low is not None
    assert [each.metric for each in found.verdicts] == ["gauc", NEW_ADS]
    assert "in AUC, new ads" in found.verdicts[1].verdict


def test_predictions_are_kept(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    first = predictions_of(places, "both", Task())
    monkeypatch.setattr(predict, "predict_run", None)
    assert predictions_of(places, "both", Task()) is first


def test_a_run_that_cannot_be_compared_is_a_problem_of_its_own(changing_world: World) -> None:
    shutil.rmtree(changing_world.runs / "both" / "checkpoints")
    found = compare_runs(changing_world.places(), ["ids-only", "both", "both-longer"], Task())
    assert found.problems == {"both": "it has no checkpoint yet"}
    assert {each.run for each in found.differences} == {"both-longer"}


def test_too_many_impressions_or_images_are_left_to_a_command(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "MOST_IMAGES", 3)
    predictions_of(places, "ids-only", Task())
    with pytest.raises(TooMuchError, match="images"):
        predictions_of(places, "both", Task())
    monkeypatch.setattr(comparing, "MOST_IMPRESSIONS", 3)
    with pytest.raises(TooMuchError, match="test impressions"):
        predictions_of(places, "ids-only", Task())


def test_a_difference_is_claimed_only_where_its_interval_does_not_span_0() -> None:
    clear, other = difference(0.1, 0.05, 0.15), difference(0.1, -0.01, 0.2)
    assert clear.verdict == "“new” is better than “old” in GAUC: +0.1000, 95 % interval +0.0500 to +0.1500."
    assert difference(-0.1, -0.2, -0.05).is_better is False
    assert difference(-0.1, -0.2, -0.05, "logloss").is_better is True
    assert difference(0.1, 0.05, 0.2, "logloss").verdict.startswith("“new” is worse than “old” in log loss")
    assert other.is_better is None
    assert other.verdict == (
        "No significant difference between “new” and “old” in GAUC: +0.1000, "
        "95 % interval -0.0100 to +0.2000, which spans 0."
    )
    for edge in ((0.1, 0.0, 0.2), (-0.1, -0.2, 0.0)):
        assert "No significant difference" in difference(*edge).verdict
    assert "without an interval" in difference(0.1, None, None).verdict
    assert "not defined" in difference(None, None, None).verdict
