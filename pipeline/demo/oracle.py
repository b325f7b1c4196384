"""Ceilings: the AUC of those who know the true logit, or the part of it that IDs can tell."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.demo import truth
from pipeline.demo.catalogue import FloatArray, IntArray
from pipeline.demo.simulate import World


def auc(score_N: FloatArray, label_N: IntArray) -> float:
    """Area under the ROC curve with ties counted half (Mann-Whitney); NaN where one class is missing."""
    num_clicks = int(label_N.sum())
    num_others = len(label_N) - num_clicks
    if num_clicks == 0 or num_others == 0:
        return float("nan")
    _, inverse_N, count = np.unique(score_N, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(count) - (count - 1) / 2
    rank_sum = float(middle_rank[inverse_N][label_N == 1].sum())
    return (rank_sum - num_clicks * (num_clicks + 1) / 2) / (num_clicks * num_others)


def gauc(score_N: FloatArray, label_N: IntArray, user_N: IntArray) -> float:
    """AUC of each user weighted by the user's rows; users with one class are left out."""
    order = np.argsort(user_N, kind="stable")
    total, weight = 0.0, 0
    for rows in np.split(order, np.flatnonzero(np.diff(user_N[order])) + 1):
        value = auc(score_N[rows], label_N[rows])
        if not np.isnan(value):
            total += value * len(rows)
            weight += len(rows)
    return total / weight if weight else float("nan")


def ceilings(world: World) -> dict[str, dict[str, float]]:
    """AUC, GAUC and new-ad AUC on the test day, for those who know different parts of the truth.

    `everything` knows the logit but for its noise; `without_pixels` only the parts that IDs carry;
    `ids_and_memory` in addition remembers, for each item that is not new, how its look does with the average user.
    """
    test_T = np.flatnonzero(world.shown.day_N == world.num_days - 1)
    new_T = world.launch_day_I[world.shown.item_N[test_T]] == world.num_days - 1
    clicks = world.clicks
    remembered_N = clicks.logit(*truth.ID_PARTS) + np.where(
        world.launch_day_I[world.shown.item_N] < world.num_days - 1, _mean_by_item(world, clicks.parts["trend"]), 0.0
    )
    known = {
        "everything": clicks.logit(*truth.PIXEL_PARTS, *truth.ID_PARTS),
        "without_pixels": clicks.logit(*truth.ID_PARTS),
        "ids_and_memory": remembered_N,
    }
    label_T, user_T = clicks.label_N[test_T], world.shown.user_N[test_T]
    return {
        name: {
            "auc": auc(score_N[test_T], label_T),
            "gauc": gauc(score_N[test_T], label_T, user_T),
            "new_ad_auc": auc(score_N[test_T][new_T], label_T[new_T]),
        }
        for name, score_N in known.items()
    }


def variance_shares(world: World) -> dict[str, float]:
    """Share of the logit's variance that each part has; they add up to 1 but for chance correlations."""
    variance = {name: float(np.var(part_N)) for name, part_N in world.clicks.parts.items()}
    total = sum(variance.values())
    return {name: value / total if total else 0.0 for name, value in variance.items()}


def _mean_by_item(world: World, value_N: NDArray[Any]) -> FloatArray:
    """For each row, the mean of `value_N` over all rows of its item (N,)."""
    item_N, num_items = world.shown.item_N, world.catalogue.num_items
    sum_I = np.bincount(item_N, weights=value_N, minlength=num_items)
    mean_I: FloatArray = sum_I / np.maximum(np.bincount(item_N, minlength=num_items), 1)
    return mean_I[item_N]
