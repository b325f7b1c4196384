"""Metrics of rankings, their intervals by bootstrap over users, and paired differences of models. Imports no torch.

A resample draws as many users as there are, with replacement; a user drawn twice counts twice with all impressions.
Log loss, calibration and GAUC are made of sums over users (the AUC of a user does not change by being drawn), so a
block of resamples is one matrix product. AUC is not: its impressions are sorted once, and a resample is a cumulative
sum of the weights of those without a click. All of it is exact, ties included. Efron and Tibshirani, "An Introduction
to the Bootstrap", 1993, chapter 13.

Letters of shapes: N impressions, U users of the whole, V users of a set of impressions, R resamples, B of them at once,
C sums of a user, K = NUM_BINS bins, M metrics.

AUC of a set of impressions = (sum of the positives' mid-ranks - p (p + 1) / 2) / (p n), the Mann-Whitney form, with
mid-ranks for ties. GAUC ("Image Matters", arXiv 1711.06505) = sum over users of impressions x AUC of that user
/ sum of impressions, users with one class left out. AUC is that with all impressions in one group, so one code serves.
A metric that is not defined (no impression, or one class only) is None, JSON's null: never 0, 0.5 or NaN.

Two models are compared on the same resamples, so what makes a day easy or hard for both cancels out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featurestore.keys import BoolArray, Float64Array, Int64Array
from trainer.errors import DataError
from trainer.problems import Problem

if TYPE_CHECKING:
    import pandas as pd

    from trainer.evaluation.predict import Impressions, Predictions, Slicing


METRICS = ("auc", "gauc", "logloss", "calibration")
NUM_BINS = 10
LEAST_PER_BIN = 100
LEAST_USERS = 10
LEAST_USERS_SHOWN = 30
"""Least number of users for which an evaluation gives metrics, of a slice or of all impressions."""
LEVEL = 0.95
_BLOCK_ELEMENTS = 1 << 20
_LEAST_DEFINED = 0.5


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its interval; None if it is not defined (no impression, one class, too few users)."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Measured:
    """A set of impressions."""

    impressions: int
    users: int
    clicks: int
    metrics: dict[str, Estimate]

    def row(self) -> dict[str, Any]:
        """Return the figures by name; `auc_low` and `auc_high` are the ends of the interval of `auc`."""
        row: dict[str, Any] = {name: self.metrics[name].value for name in METRICS}
        for name in METRICS:
            row |= {f"{name}_low": self.metrics[name].low, f"{name}_high": self.metrics[name].high}
        return row | {"clicks": self.clicks, "users": self.users, "impressions": self.impressions}


@dataclass(frozen=True)
class SlicedBy:
    """The slices of one slicing that have impressions, in their order."""

    title: str
    slices: dict[str, Measured]


@dataclass(frozen=True)
class Bin:
    """Impressions with predictions of about one height."""

    impressions: int
    predicted: float
    clicked: Estimate


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation, as in report.json: of all impressions, and of each slice."""

    whole: Measured
    sliced_by: dict[str, SlicedBy]
    reliability: list[Bin]
    notes: tuple[str, ...] = ()
    """Notes for the user on the figures."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for all impressions and one for each slice; low and high are the ends of an interval."""
        rows = [{"slicing": "", "slice": "all", **self.whole.row()}]
        for slicing, sliced in self.sliced_by.items():
            rows += [{"slicing": slicing, "slice": name, **each.row()} for name, each in sliced.slices.items()]
        return rows

    @property
    def table(self) -> "pd.DataFrame":
        """The rows as a DataFrame of pandas."""
        import pandas as pd

        return pd.DataFrame(self.rows()).set_index(["slicing", "slice"])

    def __repr__(self) -> str:
        slices = sum(len(each.slices) for each in self.sliced_by.values())
        return f"{type(self).__name__}({self.whole.impressions:,} impressions, {slices} slices)"

    def _repr_html_(self) -> str:
        return str(self.table.to_html(float_format="{:.4f}".format, na_rep="-"))


def interval(value: float, draws_R: Float64Array, *, users: int) -> Estimate:
    """Return the central `LEVEL` interval of the resamples; None if the value, or half of the resamples, are undefined.

    No interval either for a value that fewer than LEAST_USERS `users` contribute to: resamples of a few say nothing of
    the others.
    """
    if np.isnan(value):
        return Estimate(None, None, None)
    defined_R = draws_R[~np.isnan(draws_R)]
    if users < LEAST_USERS or len(defined_R) < max(1, _LEAST_DEFINED * len(draws_R)):
        return Estimate(float(value), None, None)
    low, high = np.quantile(defined_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))


def probability(logit_N: NDArray[Any]) -> Float64Array:
    """Compute the sigmoid, without overflow."""
    values_N: Float64Array = np.exp(-np.logaddexp(0, -logit_N.astype(np.float64)))
    return values_N


class MetricSums:
    """The contributions of each user to the metrics of a set of impressions, and to its reliability.

    calibration = sum of predicted probabilities / clicks: 1 is right, 1.2 promises 20 % too much. Bins are of equally
    many impressions (`bins_of`).
    """

    def __init__(self, logit_N: Float64Array, label_N: Float64Array, user_N: Int64Array) -> None:
        """`user_N`: in [0, U). Order N log N."""
        self._users_V, of_N = np.unique(user_N, return_inverse=True)
        num_users = len(self._users_V)
        loss_V = np.bincount(of_N, np.logaddexp(0, logit_N) - logit_N * label_N, num_users)
        groups = auc_of_groups(logit_N, label_N, of_N)
        ranked_2V = np.zeros((2, num_users))
        ranked_2V[:, groups.group_G] = groups.impressions_G, groups.impressions_G * groups.auc_G
        at_N = of_N * NUM_BINS + bins_of(logit_N)
        count_VK, predicted_VK, clicked_VK = (
            np.bincount(at_N, values_N, num_users * NUM_BINS).reshape(num_users, NUM_BINS)
            for values_N in (None, probability(logit_N), label_N)
        )
        self._sums_VC = np.column_stack([loss_V, *ranked_2V, count_VK, predicted_VK, clicked_VK])
        self._auc = _WeightedAuc(logit_N, label_N, user_N)
        self.num_impressions, self.num_clicks, self.num_users = len(label_N), int(label_N.sum()), num_users
        self.users_M = (num_users, len(groups.group_G), num_users, num_users)
        """Number of users that contribute to each of the METRICS."""
        self.count_K, self.users_K = count_VK.sum(axis=0), (count_VK > 0).sum(axis=0)
        """Impressions of each bin, and the users that they are of."""

    def at(self, weight_BU: Float64Array) -> Float64Array:
        """Compute values of resamples: the METRICS, then the mean prediction and the click rate of each bin.

        `weight_BU`: how often each user counts. The result is (B, M + 2 K), NaN where a value is not defined.
        """
        sums_BC = weight_BU[:, self._users_V] @ self._sums_VC
        loss_B, ranked_B, gauc_B = sums_BC[:, :3].T
        count_BK, predicted_BK, clicked_BK = np.split(sums_BC[:, 3:], 3, axis=1)
        count_B = count_BK.sum(axis=1)
        metrics = [
            self._auc.at(weight_BU),
            ratio(gauc_B, ranked_B),
            ratio(loss_B, count_B),
            ratio(predicted_BK.sum(axis=1), clicked_BK.sum(axis=1)),
        ]
        return np.column_stack([*metrics, ratio(predicted_BK, count_BK), ratio(clicked_BK, count_BK)])


class _WeightedAuc:
    """AUC with each impression counted as often as its user is drawn: the Mann-Whitney form, half a win for a tie."""

    def __init__(self, score_N: Float64Array, label_N: Float64Array, user_N: Int64Array) -> None:
        order_N = np.argsort(score_N, kind="stable")
        clicked_N = label_N[order_N] == 1
        score_N, user_N = score_N[order_N], user_N[order_N]
        self._clicked, self._passed = user_N[clicked_N], user_N[~clicked_N]
        passed_scores = score_N[~clicked_N]
        self._below = np.searchsorted(passed_scores, score_N[clicked_N], side="left")
        self._up_to = np.searchsorted(passed_scores, score_N[clicked_N], side="right")

    def at(self, weight_BU: Float64Array) -> Float64Array:
        auc_B = np.empty(len(weight_BU))
        weight = np.zeros(len(self._passed) + 1)
        for row, weight_U in enumerate(weight_BU):  # a row at a time stays in the processor's cache
            np.cumsum(weight_U[self._passed], out=weight[1:])
            clicked = weight_U[self._clicked]
            pairs = clicked.sum() * weight[-1]
            wins = clicked @ (weight[self._below] + weight[self._up_to]) / 2
            auc_B[row] = wins / pairs if pairs else np.nan
        return auc_B


@dataclass(frozen=True)
class Replicates:
    """Values of `MetricSums.at`: (M + 2 K,) of the sample itself, and (R, M + 2 K) of the resamples."""

    value_M: Float64Array
    draws_RM: Float64Array


def bootstrap(sets: Sequence[MetricSums], num_users: int, resamples: int, seed: int) -> list[Replicates]:
    """Measure each set of impressions on the same resamples, so that differences between them are paired.

    Cost: a gather of every impression for each resample and AUC, about 1 s for 1,000 resamples of 100,000 impressions.
    """
    values = [each.at(np.ones((1, num_users)))[0] for each in sets]
    blocks: list[list[Float64Array]] = [[value[None][:0]] for value in values]
    for weight_BU in draws(num_users, resamples, seed):
        for block, each in zip(blocks, sets, strict=True):
            block.append(each.at(weight_BU))
    return [Replicates(value, np.concatenate(block)) for value, block in zip(values, blocks, strict=True)]


def draws(num_users: int, resamples: int, seed: int) -> Iterator[Float64Array]:
    """Draw how often each user counts, (B, U), `resamples` times, in blocks: equal for equal seeds."""
    random = np.random.default_rng(seed)
    block = max(1, min(64, _BLOCK_ELEMENTS // max(1, num_users)))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn_BU = random.integers(num_users, size=(size, num_users)) + np.arange(size)[:, None] * num_users
        yield np.bincount(drawn_BU.ravel(), minlength=size * num_users).reshape(size, num_users).astype(np.float64)


def bins_of(score_N: Float64Array) -> Int64Array:
    """Cut into bins of equally many impressions, 0 the lowest scores: up to NUM_BINS of at least LEAST_PER_BIN, or one.

    Equal scores are in one bin.
    """
    if len(score_N) == 0:
        return np.zeros(0, np.int64)
    num_bins = max(1, min(NUM_BINS, len(score_N) // LEAST_PER_BIN))
    edges = np.unique(np.quantile(score_N, np.arange(1, num_bins) / num_bins))
    bin_N = np.searchsorted(edges, score_N, side="left")
    return np.unique(bin_N, return_inverse=True)[1].astype(np.int64)


def ratio(above: Float64Array, below: Float64Array) -> Float64Array:
    """Divide above by below; NaN where below is zero."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def measure_all(
    logit_N: Float64Array, impressions: "Impressions", slicings: Sequence["Slicing"], resamples: int
) -> Evaluation:
    """Measure all impressions, each slice and the bins of reliability, with intervals."""
    users_U, user_N = np.unique(impressions.user_N, return_inverse=True)
    label_N = impressions.label_N.astype(np.float64)
    whole = MetricSums(logit_N, label_N, user_N)
    chosen = [(each, name, each.slice_N == at) for each in slicings for at, name in enumerate(each.names)]
    chosen = [(slicing, name, in_N) for slicing, name, in_N in chosen if in_N.any()]
    slices = [MetricSums(logit_N[in_N], label_N[in_N], user_N[in_N]) for _, _, in_N in chosen]
    of_whole, *of_slices = bootstrap([whole, *slices], len(users_U), resamples, 0)

    sliced_by = {each.name: SlicedBy(each.title, {}) for each in slicings}
    for (slicing, name, _), sums, replicates in zip(chosen, slices, of_slices, strict=True):
        sliced_by[slicing.name].slices[name] = _measured(sums, replicates)
    return Evaluation(_measured(whole, of_whole), sliced_by, _bins(whole, of_whole))


def _measured(sums: MetricSums, replicates: Replicates) -> Measured:
    """Describe impressions; a metric that fewer than LEAST_USERS_SHOWN contribute to is not defined."""
    metrics = {
        name: interval(replicates.value_M[at], replicates.draws_RM[:, at], users=sums.users_M[at])
        if sums.users_M[at] >= LEAST_USERS_SHOWN
        else Estimate(None, None, None)
        for at, name in enumerate(METRICS)
    }
    return Measured(sums.num_impressions, sums.num_users, sums.num_clicks, metrics)


def _bins(sums: MetricSums, replicates: Replicates) -> list[Bin]:
    """Describe the bins that have impressions."""
    bins = []
    for at in np.flatnonzero(sums.count_K).tolist():
        predicted, clicked = len(METRICS) + at, len(METRICS) + NUM_BINS + at
        rate = interval(replicates.value_M[clicked], replicates.draws_RM[:, clicked], users=int(sums.users_K[at]))
        bins.append(Bin(int(sums.count_K[at]), float(replicates.value_M[predicted]), rate))
    return bins


Metrics = dict[str, float | int | None]


def measure(logit_N: Float64Array, label_N: Float64Array, group_N: Int64Array, prefix: str = "") -> Metrics:
    """Measure N impressions, by the names of the metrics with `prefix` before each. Order N log N.

    `group_N`: the user of each, `users` their number. `gauc_users`: those with both classes, which GAUC is made of, and
    `gauc_impressions` theirs.
    """
    groups = auc_of_groups(logit_N, label_N, group_N)
    metrics: Metrics = {
        "impressions": len(label_N),
        "clicks": int(label_N.sum()),
        "users": len(np.unique(group_N)),
        "logloss": log_loss(logit_N, label_N),
        "auc": auc(logit_N, label_N),
        "gauc": groups.mean,
        "gauc_impressions": int(groups.impressions_G.sum()),
        "gauc_users": len(groups.group_G),
    }
    return {prefix + name: value for name, value in metrics.items()}


def shown(metrics: Mapping[str, float | int | None], name: str) -> float | int | None:
    """Return a metric as it is printed: None where fewer than LEAST_USERS_SHOWN users contribute to it."""
    *which, kind = name.rpartition("new_ad_")
    counted_by = {"logloss": "users", "auc": "users", "gauc": "gauc_users"}.get(kind)
    users = metrics.get("".join([*which, counted_by])) if counted_by else None
    return None if users is not None and users < LEAST_USERS_SHOWN else metrics.get(name)


def log_loss(logit_N: Float64Array, label_N: Float64Array) -> float | None:
    """Compute mean binary cross entropy in nats, of logits: exact where a probability rounds to 0 or 1.

    None if empty.
    """
    if len(label_N) == 0:
        return None
    logit_N = logit_N.astype(np.float64)
    return float((np.logaddexp(0, logit_N) - logit_N * label_N).mean())


def auc(score_N: Float64Array, label_N: Float64Array) -> float | None:
    """Compute the area under the ROC curve; None with one class only."""
    return auc_of_groups(score_N, label_N, np.zeros(len(label_N), np.int64)).mean


@dataclass(frozen=True)
class GroupAucs:
    """The groups that have both classes, ascending: their value of `group_N`, impressions and AUC."""

    group_G: Int64Array
    impressions_G: Int64Array
    auc_G: Float64Array

    @property
    def mean(self) -> float | None:
        """The mean of the AUCs, weighted by impressions: GAUC; None where there is no group."""
        counted = int(self.impressions_G.sum())
        return float((self.impressions_G * self.auc_G).sum() / counted) if counted else None


def auc_of_groups(score_N: Float64Array, label_N: Float64Array, group_N: Int64Array) -> GroupAucs:
    """Compute the AUC of each group by itself. Order N log N."""
    if len(label_N) == 0:
        return GroupAucs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    order_N = np.lexsort((score_N, group_N))
    score_N, label_N, group_N = score_N[order_N], np.asarray(label_N, np.float64)[order_N], group_N[order_N]
    new_group_N = np.r_[True, group_N[1:] != group_N[:-1]]
    starts_G = np.flatnonzero(new_group_N)
    impressions_G = np.diff(np.r_[starts_G, len(label_N)])
    clicks_G = np.add.reduceat(label_N, starts_G)
    rank_N = _mid_ranks(score_N, new_group_N) - np.repeat(starts_G, impressions_G)
    wins_G = np.add.reduceat(rank_N * label_N, starts_G) - clicks_G * (clicks_G + 1) / 2
    pairs_G = clicks_G * (impressions_G - clicks_G)
    both_G = pairs_G > 0
    return GroupAucs(group_N[starts_G[both_G]], impressions_G[both_G], wins_G[both_G] / pairs_G[both_G])


def _mid_ranks(score_N: Float64Array, new_group_N: BoolArray) -> Float64Array:
    """1-based ranks along sorted scores; a run of equal scores within one group shares the mean of its ranks."""
    starts_T = np.flatnonzero(new_group_N | np.r_[True, score_N[1:] != score_N[:-1]])
    ends_T = np.r_[starts_T[1:], len(score_N)]
    return np.repeat((starts_T + 1 + ends_T) / 2, ends_T - starts_T)


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """A metric of ours - that of the baseline. `p_value`: two-sided, for a true difference of 0; None if undefined."""

    metric: str
    ours: float | None
    baseline: float | None
    p_value: float | None
    users: int | None = None
    """Number of users that contribute to it; None if unknown."""


def compare(
    ours: "Predictions",
    baseline: "Predictions",
    *,
    metrics: Sequence[str] = ("gauc", "auc"),
    resamples: int = 1000,
    seed: int = 0,
    only_N: BoolArray | None = None,
) -> dict[str, Difference]:
    """Measure the paired difference of each metric between two runs.

    `only_N`: which impressions to measure, by default all; resamples are of all users either way, so those of a slice
    are the ones of the whole.

    p = (1 + resamples whose difference lies as far from the one found as that does from 0) / (1 + resamples), the
    bootstrap test with the null put at the centre (Hall and Wilson, Biometrics 1991); so never below 1 / (1 + R).
    Raises DataError where the runs did not predict the same impressions.
    """
    check_same_impressions(ours, baseline)
    users_U, user_N = np.unique(ours.impressions.user_N, return_inverse=True)
    label_N = ours.impressions.label_N.astype(np.float64)
    chosen = slice(None) if only_N is None else only_N
    sums = [MetricSums(each.logit_N[chosen], label_N[chosen], user_N[chosen]) for each in (ours, baseline)]
    mine, theirs = bootstrap(sums, len(users_U), resamples, seed)
    draws_RM = mine.draws_RM - theirs.draws_RM
    found = dict[str, Difference]()
    for name in metrics:
        at = METRICS.index(name)
        found[name] = _difference(name, mine.value_M[at], theirs.value_M[at], draws_RM[:, at], sums[0].users_M[at])
    return found


def new_to_both(ours: "Predictions", baseline: "Predictions") -> BoolArray:
    """Find the impressions whose ad neither run was trained on, (N,): one that knows it would win by having seen it.

    None where a run's predictions do not tell (`is_new_ad_N` is None).
    """
    if ours.is_new_ad_N is None or baseline.is_new_ad_N is None:
        return np.zeros(len(ours.logit_N), np.bool_)
    return ours.is_new_ad_N & baseline.is_new_ad_N


def _difference(name: str, ours: float, baseline: float, draws_R: Float64Array, users: int) -> Difference:
    value = ours - baseline
    estimate = interval(value, draws_R, users=users)
    defined_R = draws_R[~np.isnan(draws_R)]
    # A difference of rounding errors (equal models, another order of sums) counts as 0.
    as_far = np.abs(defined_R - value) >= abs(value) - 1e-12
    p_value = float((1 + as_far.sum()) / (1 + len(defined_R))) if estimate.low is not None else None
    mine, theirs = (None if np.isnan(each) else float(each) for each in (ours, baseline))
    return Difference(**asdict(estimate), metric=name, ours=mine, baseline=theirs, p_value=p_value, users=users)


def check_same_impressions(
    ours: "Predictions", baseline: "Predictions", names: tuple[str, str] = ("one run", "the other run")
) -> None:
    """Raise DataError where two runs, of these names, did not predict the same impressions."""
    mine, theirs = ours.impressions, baseline.impressions
    if not all(np.array_equal(getattr(mine, name), getattr(theirs, name)) for name in ("label_N", "user_N", "ad_N")):
        raise DataError(Problem.OTHER_IMPRESSIONS, names[1], len(theirs.label_N), names[0], len(mine.label_N))
