"""Organic clicks: people look at what they like, imperfectly, and now and then tap something by accident."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.demo import truth
from pipeline.demo.catalogue import Catalogue, FloatArray, IntArray
from pipeline.demo.people import People


@dataclass(frozen=True)
class Behaviors:
    """Organic clicks in order of time. Times are whole seconds since the epoch."""

    time_N: IntArray
    user_N: IntArray
    item_N: IntArray
    dwell_s_N: FloatArray
    seller_N: IntArray  # 0 where an item has one seller


def match_of(catalogue: Catalogue, taste_UK: FloatArray) -> FloatArray:
    """Measure how well each picture fits each taste (U, I), standard deviation 1 over all pairs."""
    match_UI: FloatArray = taste_UK @ catalogue.look_IK.T
    return match_UI / max(float(match_UI.std()), 1e-12)


def browse(
    catalogue: Catalogue,
    people: People,
    launch_day_I: IntArray,
    popularity_I: FloatArray,
    num_days: int,
    seed: int,
    start_s: int,
) -> Behaviors:
    """Draw the organic clicks of the history and of every day of the log, none on items new on the last day."""
    rng = np.random.default_rng([seed, 5])
    steady_UI = (
        truth.BROWSE_POPULARITY * popularity_I
        + truth.BROWSE_CATEGORY * people.category_taste_UC[:, catalogue.category_I]
    )
    vivid_I = catalogue.look_IK[:, catalogue.vivid]
    days: list[Behaviors] = []
    for day in range(-truth.HISTORY_DAYS, num_days):
        live_L = np.flatnonzero(launch_day_I <= min(day, num_days - 2))
        user_N = np.repeat(np.arange(people.num_users), rng.poisson(people.browsing_U / truth.HISTORY_DAYS))
        today = day + truth.HISTORY_DAYS
        score_UI = steady_UI + truth.BROWSE_MATCH * match_of(catalogue, people.taste_UDK[:, today])
        score_UI += truth.BROWSE_MOOD * people.mood_UD[:, today, None] * vivid_I
        wanted_N = live_L[_draw_columns(rng, score_UI[:, live_L], user_N)]
        any_N = live_L[rng.integers(len(live_L), size=len(user_N))]
        accident_N = rng.random(len(user_N)) < truth.ACCIDENT_SHARE
        time_N = start_s + day * truth.DAY_S + rng.integers(7 * 3600, truth.DAY_S, size=len(user_N))
        item_N = np.where(accident_N, any_N, wanted_N)
        days.append(Behaviors(time_N, user_N, item_N, _dwell_s(rng, accident_N), np.zeros_like(item_N)))
    return _by_time(days)


def _dwell_s(rng: np.random.Generator, accident_N: NDArray[np.bool_]) -> FloatArray:
    """Draw seconds spent: a moment after an accident, half a minute or so otherwise; they hardly overlap."""
    short_s_N = rng.lognormal(np.log(2.0), 0.35, size=len(accident_N))
    long_s_N = 8 + rng.lognormal(np.log(30), 0.8, size=len(accident_N))
    dwell_s_N: FloatArray = np.where(accident_N, short_s_N, long_s_N).round(1)
    return dwell_s_N


def _draw_columns(rng: np.random.Generator, score_UL: FloatArray, user_N: IntArray) -> IntArray:
    """Draw one column for each of `user_N`, with probability softmax(the scores of that user)."""
    mass_UL = np.cumsum(np.exp(score_UL - score_UL.max(axis=1, keepdims=True)), axis=1)
    draw_N = rng.random(len(user_N)) * mass_UL[user_N, -1]
    column_N: IntArray = (mass_UL[user_N] <= draw_N[:, None]).sum(axis=1)
    return column_N.clip(max=score_UL.shape[1] - 1)


def _by_time(days: list[Behaviors]) -> Behaviors:
    time_N = np.concatenate([day.time_N for day in days])
    order = np.argsort(time_N, kind="stable")
    return Behaviors(
        time_N=time_N[order],
        user_N=np.concatenate([day.user_N for day in days])[order],
        item_N=np.concatenate([day.item_N for day in days])[order],
        dwell_s_N=np.concatenate([day.dwell_s_N for day in days])[order],
        seller_N=np.concatenate([day.seller_N for day in days])[order],
    )
