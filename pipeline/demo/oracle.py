"""The ceilings of a demo: the AUC of one who knows the true logit, or the part of it that IDs can show."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.demo import truth
from pipeline.demo.catalogue import FloatArray, IntArray
from pipeline.demo.simulate import World

# The trainer has an AUC and a GAUC too (evaluation/metrics.py), but this package may import its schema alone.
_SHORT_S = 5  # behaviours that took less were accidents


def auc(score_N: FloatArray, label_N: IntArray) -> float:
    """Compute the area under the ROC curve, ties counted half (Mann-Whitney); NaN where one class is missing."""
    num_clicks = int(label_N.sum())
    num_others = len(label_N) - num_clicks
    if num_clicks == 0 or num_others == 0:
        return float("nan")
    _, inverse_N, count = np.unique(score_N, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(count) - (count - 1) / 2
    rank_sum = float(middle_rank[inverse_N][label_N == 1].sum())
    return (rank_sum - num_clicks * (num_clicks + 1) / 2) / (num_clicks * num_others)


def gauc(score_N: FloatArray, label_N: IntArray, user_N: IntArray) -> float:
    """Average the AUC of each user, weighted by the user's rows; users with one class are left out."""
    order = np.argsort(user_N, kind="stable")
    total, weight = 0.0, 0
    for rows in np.split(order, np.flatnonzero(np.diff(user_N[order])) + 1):
        value = auc(score_N[rows], label_N[rows])
        if not np.isnan(value):
            total += value * len(rows)
            weight += len(rows)
    return total / weight if weight else float("nan")


def ceilings(world: World) -> dict[str, dict[str, float]]:
    """Compute AUC, GAUC and new-ad AUC on the test day, for those who know different parts of the truth.

    `everything` knows the logit but for its noise; `without_pixels` only the parts that IDs carry;
    `ids_and_memory` in addition remembers, for each item that is not new, how its look does with the average user;
    `behavior_pictures` in addition reads tastes and moods from the pictures that the user looked at in the 14 days
    before (the best linear reading of their mean look), and knows by their IDs the looks of ads that are not new.
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
        "behavior_pictures": remembered_N + read_from_pictures(world),
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
    """Compute the share of the logit's variance of each part; they add up to 1 but for chance correlations."""
    variance = {name: float(np.var(part_N)) for name, part_N in world.clicks.parts.items()}
    total = sum(variance.values())
    return {name: value / total if total else 0.0 for name, value in variance.items()}


def read_from_pictures(world: World) -> FloatArray:
    """Read match and mood from the pictures of users' behaviours, (N,): least squares on the days before.

    Inputs: for each attribute of a look its mean over the behaviours times that of the ad, and the mean vividness.
    Behaviours are those of 14 days before the impression that were no accidents. Of ads new on the last day the looks
    are not known.
    """
    mean_NK = mean_looks(world)
    is_known_N = world.launch_day_I[world.shown.item_N] < world.num_days - 1
    meeting_NK = mean_NK * world.catalogue.look_IK[world.shown.item_N] * is_known_N[:, None]
    vivid_N1 = mean_NK[:, world.catalogue.vivid, None]
    inputs_NW = np.concatenate([meeting_NK, vivid_N1, np.ones_like(vivid_N1)], axis=1)
    wanted_N = world.clicks.parts["match"] + world.clicks.parts["mood"]
    train_N = world.shown.day_N < world.num_days - 1
    weight_W = np.linalg.lstsq(inputs_NW[train_N], wanted_N[train_N], rcond=None)[0]
    read_N: FloatArray = inputs_NW @ weight_W
    return read_N


def mean_looks(world: World) -> FloatArray:
    """Average the looks that each impression's user saw for a while in the 14 days before, (N, K); 0: nothing."""
    done, shown = world.behaviors, world.shown
    long_M = np.flatnonzero(done.dwell_s_N >= _SHORT_S)
    # One number for user and time: the users' behaviours lie one after the other, each user's in order of time.
    begin_s = world.start_s - truth.HISTORY_DAYS * truth.DAY_S
    span_s = 2 * (truth.HISTORY_DAYS + world.num_days) * truth.DAY_S
    key_M = done.user_N[long_M] * span_s + done.time_N[long_M] - begin_s
    order_M = np.argsort(key_M, kind="stable")
    look_MK = world.catalogue.look_IK[done.item_N[long_M[order_M]]]
    total_MK = np.concatenate([np.zeros((1, look_MK.shape[1])), np.cumsum(look_MK, axis=0)])
    end_N = shown.user_N * span_s + shown.time_N - begin_s
    first_N = np.maximum(end_N - truth.HISTORY_DAYS * truth.DAY_S, shown.user_N * span_s)
    low_N, high_N = (np.searchsorted(key_M[order_M], each) for each in (first_N, end_N))
    mean_NK: FloatArray = (total_MK[high_N] - total_MK[low_N]) / np.maximum(high_N - low_N, 1)[:, None]
    return mean_NK


def _mean_by_item(world: World, value_N: NDArray[Any]) -> FloatArray:
    """Average `value_N` over all rows of the item of each row (N,)."""
    item_N, num_items = world.shown.item_N, world.catalogue.num_items
    sum_I = np.bincount(item_N, weights=value_N, minlength=num_items)
    mean_I: FloatArray = sum_I / np.maximum(np.bincount(item_N, minlength=num_items), 1)
    return mean_I[item_N]
