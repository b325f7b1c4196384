"""Sample groups out of rows: pure functions on sorted arrays.

Letters of shapes: N impressions, H behaviours (the history of all users at hand), G groups, K behaviours in groups.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.samples.logs import Columns
from pipeline.samples.pieces import MICROSECONDS

Int64Array = npt.NDArray[np.int64]

DAY = 86_400 * MICROSECONDS
BEHAVIOR_ORDER = ("user", "timestamp", "item", "image", "category")
IMPRESSION_ORDER = ("user", "session", "timestamp", "scene", "item", "image", "category")


@dataclass(frozen=True)
class GroupRules:
    """The rules of what belongs into a group; see build_samples of pipeline.samples."""

    window_s: int
    max_behaviors: int
    midnight_pause_s: int
    behavior_age: bool = False


@dataclass(frozen=True)
class LogGroups:
    """Groups in any order: `first_N` and `size_G` cut the impressions, `take_G` the behaviours."""

    impressions: Columns  # sorted and distinct, (N,)
    behaviors: Columns  # in groups, newest first, (K,); age: seconds before the group's first impression
    start_G: Int64Array  # first impression of each group
    size_G: Int64Array  # impressions
    take_G: Int64Array  # behaviours
    over_limit_G: Int64Array  # behaviours in the window beyond max_behaviors
    num_behaviors: int  # distinct ones
    num_used: int  # of them, in some group


def make_groups(impressions: Columns, behaviors: Columns, rules: GroupRules) -> LogGroups:
    """Make groups of all impressions of some users, with those users' behaviours, all rows in any order.

    A group is a user's session on one day; one that continues over midnight without a pause longer than
    `midnight_pause_s` stays one, on the day of its first impression. Its behaviours are strictly before its first
    impression and at most `window_s` back, newest first, ties by larger item, image, category; at most
    `max_behaviors`. Rows that are equal (but for label and user columns) count once, as a click if one of them is.
    """
    impressions = distinct_impressions(impressions)
    behaviors = _distinct(behaviors, BEHAVIOR_ORDER, ())
    start_G = _group_starts(impressions, rules.midnight_pause_s)
    num_impressions = len(impressions["user"])
    size_G = np.diff(start_G, append=num_impressions)
    user_G, first_G = impressions["user"][start_G], impressions["timestamp"][start_G]
    low_G = _count_before(behaviors["user"], behaviors["timestamp"], user_G, first_G - rules.window_s * MICROSECONDS)
    high_G = _count_before(behaviors["user"], behaviors["timestamp"], user_G, first_G)
    take_G = np.minimum(high_G - low_G, rules.max_behaviors)
    chosen_K = _descending_runs(high_G, take_G)
    num_behaviors = len(behaviors["user"])
    chosen = {name: behaviors[name][chosen_K] for name in ("item", "image", "category")}
    if rules.behavior_age:
        chosen["age"] = (np.repeat(first_G, take_G) - behaviors["timestamp"][chosen_K]) // MICROSECONDS
    return LogGroups(
        impressions,
        chosen,
        start_G,
        size_G,
        take_G,
        high_G - low_G - take_G,
        num_behaviors,
        _count_covered(high_G - take_G, high_G, num_behaviors),
    )


def distinct_impressions(impressions: Columns) -> Columns:
    """Sort impressions by user, session and time, and leave out repetitions.

    Of equal rows that differ in label or user columns the click stays, then the smallest user columns: any rule will do
    that does not depend on the order of the files."""
    profile = tuple(sorted(name for name in impressions if name not in (*IMPRESSION_ORDER, "label")))
    return _distinct(impressions | {"no_click": 1 - impressions["label"]}, IMPRESSION_ORDER, ("no_click", *profile))


def _distinct(columns: Columns, order: tuple[str, ...], preference: tuple[str, ...]) -> Columns:
    """Sort rows by `order`; of those equal in it, keep the first by `preference`."""
    sorted_N = _sorted(columns, order[: order.index("timestamp") + 1], (*order, *preference))
    columns = {name: values_N[sorted_N] for name, values_N in columns.items()}
    is_new_N = np.zeros(len(sorted_N), dtype=bool)
    is_new_N[:1] = True
    for name in order:
        is_new_N[1:] |= columns[name][1:] != columns[name][:-1]
    return {name: values_N[is_new_N] for name, values_N in columns.items()}


def _sorted(columns: Columns, first: tuple[str, ...], order: tuple[str, ...]) -> Int64Array:
    """Sort rows by `order`, which begins with `first`; return their numbers, (N,).

    All are sorted by `first`, and only the few that are equal there by the others, which takes half of the time."""
    sorted_N: Int64Array = np.lexsort([columns[name] for name in reversed(first)])
    is_tied_N = np.ones(max(0, len(sorted_N) - 1), dtype=bool)  # a row with the one after it
    for name in first:
        is_tied_N &= np.diff(columns[name][sorted_N]) == 0
    is_tied_N = np.append(is_tied_N, False) | np.append(False, is_tied_N)
    tied = sorted_N[is_tied_N[: len(sorted_N)]]
    sorted_N[is_tied_N[: len(sorted_N)]] = tied[np.lexsort([columns[name][tied] for name in reversed(order)])]
    return sorted_N


def _group_starts(impressions: Columns, midnight_pause_s: int) -> Int64Array:
    """Find the positions where a group starts in sorted impressions, (G,)."""
    time_N = impressions["timestamp"]
    is_start_N = np.zeros(len(time_N), dtype=bool)
    is_start_N[:1] = True
    for name in ("user", "session"):
        is_start_N[1:] |= np.diff(impressions[name]) != 0
    has_paused_N = np.diff(time_N) > midnight_pause_s * MICROSECONDS
    is_start_N[1:] |= has_paused_N & (np.diff(time_N // DAY) != 0)
    start_G: Int64Array = np.flatnonzero(is_start_N)
    return start_G


def _count_before(user_H: Int64Array, time_H: Int64Array, user_G: Int64Array, time_G: Int64Array) -> Int64Array:
    """Count the (user, time) pairs H, sorted, that are smaller than each pair G: searchsorted on pairs, (G,)."""
    low_G: Int64Array = np.searchsorted(user_H, user_G)
    high_G: Int64Array = np.searchsorted(user_H, user_G, side="right")
    while (is_open_G := low_G < high_G).any():  # by halves of each user's rows
        middle_G = np.where(is_open_G, (low_G + high_G) // 2, 0)
        is_smaller_G = time_H[middle_G] < time_G
        low_G = np.where(is_open_G & is_smaller_G, middle_G + 1, low_G)
        high_G = np.where(is_open_G & ~is_smaller_G, middle_G, high_G)
    return low_G


def _descending_runs(high_G: Int64Array, take_G: Int64Array) -> Int64Array:
    """Count down: high - 1, high - 2, ... (`take` numbers) of each group, one after the other, (K,)."""
    end_G = np.cumsum(take_G)
    rank_K = np.arange(end_G[-1] if len(end_G) else 0) - np.repeat(end_G - take_G, take_G)
    run_K: Int64Array = np.repeat(high_G - 1, take_G) - rank_K
    return run_K


def _count_covered(low_G: Int64Array, high_G: Int64Array, size: int) -> int:
    """Count how many of `size` positions are in at least one of the ranges [low, high)."""
    change = np.bincount(low_G, minlength=size + 1) - np.bincount(high_G, minlength=size + 1)
    return int(np.count_nonzero(np.cumsum(change)[:size] > 0))
