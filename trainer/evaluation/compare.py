"""Two models on the same impressions: the difference of AUC and GAUC, its interval, and how likely chance alone is.

Both sides are measured on the same resamples of users, so what makes a day easy or hard for both cancels out. Where a
side has several runs (seeds), its metric is their mean, and a resample draws runs as well as users: the interval covers
both the users and the luck of training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.bootstrap import METRICS, Float, MetricSums, bootstrap, interval
from trainer.evaluation.predict import Predictions


@dataclass(frozen=True)
class Difference:
    """`value` = ours - baseline. `p_value`: two-sided, for a true difference of 0. None where it is not defined."""

    metric: str
    ours: float | None
    baseline: float | None
    value: float | None
    low: float | None
    high: float | None
    p_value: float | None


def compare(
    ours: Sequence[Predictions],
    baseline: Sequence[Predictions],
    *,
    metrics: Sequence[str] = ("gauc", "auc"),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Difference]:
    """The paired difference of each metric between runs `ours` and runs `baseline`, each of which has one or more.

    p = (1 + resamples whose difference lies as far from the one found as that does from 0) / (1 + resamples), the
    bootstrap test with the null put at the centre (Hall and Wilson, Biometrics 1991); so never below 1 / (1 + R).
    Raises DataError where the runs did not predict the same impressions.
    """
    if not ours or not baseline:
        raise ValueError("each side needs the predictions of one run at least")
    _check_same_impressions([*ours, *baseline])
    users_U, user_N = np.unique(ours[0].impressions.user_N, return_inverse=True)
    label_N = ours[0].impressions.label_N.astype(np.float64)
    sums = [MetricSums(each.logit_N, label_N, user_N) for each in (*ours, *baseline)]
    replicates = bootstrap(sums, len(users_U), resamples, seed)
    value_TM = np.stack([each.value_M for each in replicates])
    draws_TRM = np.stack([each.draws_RM for each in replicates])
    sides = slice(0, len(ours)), slice(len(ours), None)
    value_2M = np.stack([value_TM[side].mean(axis=0) for side in sides])
    random = np.random.default_rng([seed, 1])
    draws_RM = np.subtract(*(_mean_of_drawn(draws_TRM[side], random) for side in sides))
    found = {}
    for name in metrics:
        column = METRICS.index(name)
        values = value_2M[0, column], value_2M[1, column]
        found[name] = _difference(name, *values, draws_RM[:, column], sums[0].users_M[column])
    return found


def _mean_of_drawn(draws_SRM: Float, random: np.random.Generator) -> Float:
    """The mean over S runs drawn with replacement, for each resample, (R, M)."""
    runs, resamples = draws_SRM.shape[:2]
    drawn_RS = random.integers(runs, size=(resamples, runs))
    means_RM: Float = draws_SRM[drawn_RS, np.arange(resamples)[:, None]].mean(axis=1)
    return means_RM


def _difference(name: str, ours: float, baseline: float, draws_R: Float, users: int) -> Difference:
    value = ours - baseline
    if np.isnan(value):
        return Difference(name, *(None if np.isnan(x) else float(x) for x in (ours, baseline)), *[None] * 4)
    estimate = interval(value, draws_R, users=users)
    defined_R = draws_R[~np.isnan(draws_R)]
    # A difference of rounding errors (equal models in another order of sums) is none.
    as_far = np.abs(defined_R - value) >= abs(value) - 1e-12
    p_value = float((1 + as_far.sum()) / (1 + len(defined_R))) if estimate.low is not None else None
    return Difference(name, float(ours), float(baseline), estimate.value, estimate.low, estimate.high, p_value)


def _check_same_impressions(predictions: Sequence[Predictions]) -> None:
    first = predictions[0].impressions
    for number, each in enumerate(predictions):
        other = each.impressions
        same = len(first.label_N) == len(other.label_N) and all(
            np.array_equal(getattr(first, name), getattr(other, name)) for name in ("label_N", "user_N", "ad_N")
        )
        if not same:
            raise DataError(
                f"run {number} of those compared predicted other impressions ({len(other.label_N):,}) than the first "
                f"({len(first.label_N):,}); evaluate both on the same test samples"
            )
