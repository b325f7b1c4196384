"""Differences of runs on the same impressions, with intervals, and what they say in one plain sentence each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from explorer.data.background import Task
from explorer.data.predictions import predictions_of
from explorer.places import Places
from featurestore.errors import UserError
from featurestore.text import one_line

if TYPE_CHECKING:
    from trainer.evaluation import compare as compared
    from trainer.evaluation.predict import Predictions

COMPARED = ("gauc", "auc", "logloss")
NEW_ADS = "new_ad_auc"
"""AUC of the impressions of ads that neither run was trained on."""
TITLES = {
    "gauc": "GAUC",
    "auc": "AUC",
    "logloss": "log loss",
    "new_ad_auc": "AUC, new ads",
    "calibration": "predicted / clicked",
    "ece": "ECE",
}
LOWER_IS_BETTER = frozenset({"logloss"})
RESAMPLES = 1000
_MOST_RESAMPLED = 300_000_000
"""Impressions times resamples that one comparison may cost: some seconds."""


@dataclass(frozen=True, kw_only=True)
class RunDifference:
    """A metric of a run minus that of the run it is compared with; None where it is not defined."""

    run: str
    against: str
    metric: str
    ours: float | None
    baseline: float | None
    value: float | None
    low: float | None
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Tell whether the interval is on one side of 0: only then a difference may be claimed."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def is_better(self) -> bool | None:
        """Tell whether the run is better than the other one; None where that is not clear."""
        if not self.is_clear or self.value is None:
            return None
        return (self.value < 0) == (self.metric in LOWER_IS_BETTER)

    @property
    def verdict(self) -> str:
        """Say in one sentence what the figures tell."""
        title, run, against = TITLES[self.metric], quoted(self.run), quoted(self.against)
        if self.value is None:
            return f"{title} is not defined for both of {run} and {against}."
        if self.low is None or self.high is None:
            found = f"{run} and {against} differ in {title} by {self.value:+.4f}"
            return f"{found}; without an interval nobody knows whether that is chance."
        span = f"95 % interval {self.low:+.4f} to {self.high:+.4f}"
        if not self.is_clear:
            found = f"No difference of {run} to {against} in {title} can be claimed"
            return f"{found}: {self.value:+.4f}, {span}, which spans 0."
        word = "better" if self.is_better else "worse"
        return f"{run} is {word} than {against} in {title}: {self.value:+.4f}, {span}."


@dataclass(frozen=True, kw_only=True)
class RunsCompared:
    """Runs against the first of them. `problems`: of a run that could not be compared, why, by its name."""

    impressions: int
    new_ad_impressions: int
    """Those of ads that the first run was not trained on."""
    users: int
    baseline: str
    differences: tuple[RunDifference, ...]
    notes: tuple[str, ...]
    problems: Mapping[str, str]

    def of(self, run: str) -> tuple[RunDifference, ...]:
        """List the differences of a run."""
        return tuple(each for each in self.differences if each.run == run)

    def in_metric(self, metric: str) -> tuple[RunDifference, ...]:
        """List the differences in a metric."""
        return tuple(each for each in self.differences if each.metric == metric)

    @property
    def metrics(self) -> tuple[str, ...]:
        """List the metrics that were compared."""
        return tuple(dict.fromkeys(each.metric for each in self.differences))

    @property
    def verdicts(self) -> tuple[RunDifference, ...]:
        """List the differences that say most: of each run that in GAUC, and that in AUC of new ads."""
        shown = ("gauc", NEW_ADS)
        return tuple(each for metric in shown for each in self.in_metric(metric))


def quoted(name: str) -> str:
    """Mark the name of a run in a sentence."""
    return f"“{name}”"


def compare_runs(places: Places, names: Sequence[str], task: Task[Any]) -> RunsCompared:
    """Predict with all runs and compare each with the first, on the same resamples of users.

    Raises TrainerError, FeatureStoreError, TooMuchError where the first one cannot be predicted with; what is wrong
    with another one is among `problems`.
    """
    from trainer.errors import CheckpointNotFoundError

    baseline = predictions_of(places, names[0], task)
    count, users = len(baseline.logit_N), len(set(baseline.impressions.user_N.tolist()))
    resamples = max(200, min(RESAMPLES, _MOST_RESAMPLED // max(1, count)))
    found: list[RunDifference] = []
    notes, problems = [f"{quoted(names[0])}: {each}" for each in baseline.notes], {}
    for done, name in enumerate(names[1:], 1):
        try:
            ours = predictions_of(places, name, task)
            task.tell(f"compares {quoted(name)} with {quoted(names[0])}", done, len(names))
            differences = _differences(ours, baseline, resamples)
        except CheckpointNotFoundError:
            problems[name] = "it has no checkpoint yet"
            continue
        except UserError as error:
            problems[name] = one_line(error)
            continue
        notes += [f"{quoted(name)}: {each}" for each in ours.notes]
        found += [
            RunDifference(
                run=name,
                against=names[0],
                metric=metric,
                ours=each.ours,
                baseline=each.baseline,
                value=each.value,
                low=each.low,
                high=each.high,
            )
            for metric, each in differences.items()
        ]
    return RunsCompared(
        impressions=count,
        new_ad_impressions=0 if baseline.is_new_ad_N is None else int(baseline.is_new_ad_N.sum()),
        users=users,
        baseline=names[0],
        differences=tuple(found),
        notes=tuple(dict.fromkeys(notes)),
        problems=problems,
    )


def _differences(ours: "Predictions", baseline: "Predictions", resamples: int) -> "Mapping[str, compared.Difference]":
    """Compare two runs in all that a page shows, the slice of new ads on the same resamples of users."""
    from trainer.evaluation.compare import compare, compare_new_ads

    found = compare([ours], [baseline], metrics=COMPARED, resamples=resamples)
    new_ads = compare_new_ads([ours], [baseline], metrics=("auc",), resamples=resamples)
    return found | ({NEW_ADS: new_ads.differences["auc"]} if new_ads.differences else {})
