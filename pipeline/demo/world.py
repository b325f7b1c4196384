"""The demo's world: a catalogue, users, ads, and what they click."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from featurestore.keys import AnyArray, BoolArray, Float64Array, Int64Array


@dataclass(frozen=True)
class Catalogue:
    """The items of a demo, in a fixed order.

    `look_IK` holds the attributes of each picture, every column with mean 0 and standard deviation 1. `weight_K` says
    how much each attribute counts in a taste.
    """

    uris: tuple[str, ...]
    category_I: Int64Array
    category_names: tuple[str, ...]
    look_IK: Float64Array
    weight_K: Float64Array
    vivid: int  # the column of look_IK that says how vivid the picture is

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.uris)


def standardize(values_IK: Float64Array) -> Float64Array:
    """Scale columns to mean 0 and standard deviation 1; a column without any variation becomes 0."""
    centred_IK = values_IK - values_IK.mean(axis=0)
    std_K = centred_IK.std(axis=0)
    flat_K = std_K < 1e-9 * (1 + np.abs(values_IK).max(axis=0, initial=0))
    return np.where(flat_K, 0.0, centred_IK / np.where(flat_K, 1.0, std_K))


NUM_AGES = 5
NUM_GENDERS = 2
SHARE_WITHOUT_CLICKS = 0.06
SHARE_LATE = 0.25


@dataclass(frozen=True)
class People:
    """Hidden truth about the users; D counts the days of history before the log, then the days of the log."""

    age_U: Int64Array  # 1 .. NUM_AGES
    gender_U: Int64Array  # 1 .. NUM_GENDERS
    taste_UDK: Float64Array  # length 1: which looks please on that day, not how much
    category_taste_UC: Float64Array
    mood_UD: Float64Array  # how much vivid things please today
    activity_U: Float64Array  # plain readiness to click
    browsing_U: Float64Array  # organic clicks expected in 14 days
    sessions_U: Float64Array  # sessions with ads expected in a day
    first_day_U: Int64Array  # of the log, 0-based: no ads before it

    @property
    def num_users(self) -> int:
        """Number of users."""
        return len(self.age_U)


def make_people(catalogue: Catalogue, num_users: int, history_days: int, log_days: int, seed: int) -> People:
    """Draw `num_users` people whose tastes are independent of the catalogue's categories."""
    rng = np.random.default_rng([seed, 2])
    age_U = rng.integers(1, NUM_AGES + 1, size=num_users)
    gender_U = rng.integers(1, NUM_GENDERS + 1, size=num_users)
    num_attributes = catalogue.look_IK.shape[1]
    segment_SK = rng.normal(size=(NUM_AGES * NUM_GENDERS, num_attributes))
    segment_U = (age_U - 1) * NUM_GENDERS + gender_U - 1
    num_days = history_days + log_days
    constant_UDK = np.sqrt(SEGMENT_SHARE) * segment_SK[segment_U][:, None] + np.sqrt(LASTING_SHARE) * rng.normal(
        size=(num_users, 1, num_attributes)
    )
    passing_UDK = _wander(rng, (num_users, num_days, num_attributes), TASTE_MEMORY)
    taste_UDK = constant_UDK + np.sqrt(1 - SEGMENT_SHARE - LASTING_SHARE) * passing_UDK
    taste_UDK *= catalogue.weight_K
    taste_UDK /= np.linalg.norm(taste_UDK, axis=2, keepdims=True)
    level_U1 = rng.normal(size=(num_users, 1))
    mood_UD = np.sqrt(0.5) * (level_U1 + _wander(rng, (num_users, num_days), MOOD_MEMORY))
    browsing_U = np.clip(rng.lognormal(mean=np.log(18), sigma=0.7, size=num_users), 1, 60)
    browsing_U[rng.random(num_users) < SHARE_WITHOUT_CLICKS] = 0
    late_U = rng.random(num_users) < SHARE_LATE
    return People(
        age_U=age_U,
        gender_U=gender_U,
        taste_UDK=taste_UDK,
        category_taste_UC=rng.normal(size=(num_users, len(catalogue.category_names))),
        mood_UD=mood_UD,
        activity_U=rng.normal(size=num_users),
        browsing_U=browsing_U,
        sessions_U=np.clip(rng.lognormal(mean=np.log(SESSIONS), sigma=SESSIONS_SIGMA, size=num_users), 0.1, 3),
        first_day_U=np.where(late_U, rng.integers(0, log_days, size=num_users), 0),
    )


def _wander(rng: np.random.Generator, shape: tuple[int, ...], memory: float) -> Float64Array:
    """Draw a first-order autoregression along axis 1, the days: variance 1, correlation `memory` day to day."""
    wave = rng.normal(size=shape)
    for day in range(1, shape[1]):
        wave[:, day] = memory * wave[:, day - 1] + np.sqrt(1 - memory**2) * wave[:, day]
    return wave


@dataclass(frozen=True)
class ShownAds:
    """The ads shown, to whom and when, in order of time. Times are whole seconds since the epoch."""

    time_N: Int64Array
    day_N: Int64Array  # 0 is the first day of the log
    user_N: Int64Array
    session_N: Int64Array
    scene_N: Int64Array
    item_N: Int64Array


@dataclass(frozen=True)
class Behaviors:
    """Organic clicks in order of time. Times are whole seconds since the epoch."""

    time_N: Int64Array
    user_N: Int64Array
    item_N: Int64Array
    dwell_s_N: Float64Array


@dataclass(frozen=True)
class Clicks:
    """The labels of the ads shown, and their true logit as bias + the sum of its parts."""

    label_N: Int64Array
    parts: dict[str, Float64Array]
    bias: float

    def logit(self, *names: str) -> Float64Array:
        """Add the named parts to the bias, (N,)."""
        total_N: Float64Array = np.full(len(self.label_N), self.bias)
        for name in names:
            total_N = total_N + self.parts[name]
        return total_N


def show_ads(people: People, launch_day_I: Int64Array, num_days: int, seed: int) -> ShownAds:
    """Draw the sessions of every day and the ads in them; 10 % of the last day's ads show items new on that day."""
    rng = np.random.default_rng([seed, 6])
    exposure_I = rng.normal(0, 0.7, size=len(launch_day_I))
    days: list[ShownAds] = []
    num_sessions = 0
    for day in range(num_days):
        shown = _one_day(rng, people, launch_day_I, exposure_I, day, num_days, num_sessions)
        num_sessions = int(shown.session_N.max(initial=num_sessions - 1)) + 1
        days.append(shown)
    columns = _joined(days)
    order = np.lexsort((columns["session_N"], columns["time_N"]))
    return ShownAds(**{name: column[order] for name, column in columns.items()})


def _joined(days: Sequence[ShownAds | Behaviors]) -> dict[str, AnyArray]:
    """Join the columns of all days."""
    return {name: np.concatenate([getattr(day, name) for day in days]) for name in vars(days[0])}


def click(catalogue: Catalogue, people: People, popularity_I: Float64Array, shown: ShownAds, seed: int) -> Clicks:
    """Draw labels from the logit; its bias is set so that `CLICK_RATE` of the ads are clicked."""
    rng = np.random.default_rng([seed, 7])
    raw = _raw_parts(rng, catalogue, people, popularity_I, shown)
    parts = {name: sd * _standard(raw[name]) for name, sd in LOGIT_PARTS.items()}
    total_N: Float64Array = np.sum(list(parts.values()), axis=0)
    bias = _bias_for(total_N, CLICK_RATE)
    label_N = (rng.random(len(total_N)) < _sigmoid(total_N + bias)).astype(np.int64)
    return Clicks(label_N, parts, bias)


def _one_day(
    rng: np.random.Generator,
    people: People,
    launch_day_I: Int64Array,
    exposure_I: Float64Array,
    day: int,
    num_days: int,
    first_session: int,
) -> ShownAds:
    """Draw one day's ads; S sessions with up to A ads each, none twice in one session."""
    last = day == num_days - 1
    low, high = ADS_PER_SESSION
    rate_U = people.sessions_U * (TEST_DAY_TRAFFIC if last else 1.0) * (people.first_day_U <= day)
    user_S = np.repeat(np.arange(people.num_users), rng.poisson(rate_U))
    scene_S = rng.integers(1, NUM_SCENES + 1, size=len(user_S))
    begin_S = START_S + day * DAY_S + rng.integers(7 * 3600, 23 * 3600, size=len(user_S))
    item_SA = _pick(rng, exposure_I, np.flatnonzero(launch_day_I <= min(day, num_days - 2)), len(user_S))
    if last:
        new_SA = _pick(rng, exposure_I, np.flatnonzero(launch_day_I == day), len(user_S))
        item_SA = np.where((rng.random(item_SA.shape) < NEW_AD_SHARE) & (new_SA >= 0), new_SA, item_SA)
    time_SA = begin_S[:, None] + np.cumsum(rng.integers(4, 60, size=item_SA.shape), axis=1)
    shown_SA = np.arange(high) < rng.integers(low, high + 1, size=len(user_S))[:, None]
    shown_SA &= item_SA >= 0
    row_N = np.nonzero(shown_SA)[0]
    return ShownAds(
        time_N=time_SA[shown_SA],
        day_N=np.full(len(row_N), day, dtype=np.int64),
        user_N=user_S[row_N],
        session_N=first_session + row_N,
        scene_N=scene_S[row_N],
        item_N=item_SA[shown_SA],
    )


def _pick(rng: np.random.Generator, exposure_I: Float64Array, live_L: Int64Array, num_sessions: int) -> Int64Array:
    """Pick different items for each session (S, A) by exposure (Gumbel top-k); -1 where too few are on sale."""
    high = ADS_PER_SESSION[1]
    picked_SA = np.full((num_sessions, high), -1, dtype=np.int64)
    if len(live_L) == 0 or num_sessions == 0:
        return picked_SA
    score_SL = exposure_I[live_L] + rng.gumbel(size=(num_sessions, len(live_L)))
    count = min(high, len(live_L))
    picked_SA[:, :count] = live_L[np.argsort(-score_SL, axis=1, kind="stable")[:, :count]]
    return picked_SA


def _raw_parts(
    rng: np.random.Generator, catalogue: Catalogue, people: People, popularity_I: Float64Array, shown: ShownAds
) -> dict[str, Float64Array]:
    """Compute the parts of the logit in any unit, (N,) each."""
    num_attributes = catalogue.look_IK.shape[1]
    season_K = rng.normal(size=num_attributes)
    season_EK = 0.7 * season_K + 0.7 * rng.normal(size=(NUM_GENDERS, num_attributes))
    trend_EI = _standard((season_EK * catalogue.weight_K) @ catalogue.look_IK.T)
    scene_C = rng.normal(size=NUM_SCENES + 1)
    user_N, item_N = shown.user_N, shown.item_N
    return {
        "match": np.einsum("nk,nk->n", people.taste_UDK[user_N, shown.day_N + HISTORY_DAYS], catalogue.look_IK[item_N]),
        "trend": trend_EI[people.gender_U[user_N] - 1, item_N],
        "mood": people.mood_UD[user_N, shown.day_N + HISTORY_DAYS],
        "category": people.category_taste_UC[user_N, catalogue.category_I[item_N]],
        "popularity": popularity_I[item_N],
        "activity": people.activity_U[user_N],
        "scene": scene_C[shown.scene_N],
        "noise": rng.normal(size=len(user_N)),
    }


def _standard(values: AnyArray) -> Float64Array:
    """Scale to mean 0 and standard deviation 1; zeros where nothing varies."""
    centred: Float64Array = values - values.mean()
    std = float(centred.std())
    return centred / std if std > 1e-12 else np.zeros_like(centred)


def _sigmoid(logit_N: Float64Array) -> Float64Array:
    return 1 / (1 + np.exp(-logit_N))


def _bias_for(logit_N: Float64Array, rate: float) -> float:
    """Find the bias with which mean(sigmoid(logit + bias)) is `rate`, by bisection."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(logit_N + middle).mean() < rate else (low, middle)
    return (low + high) / 2


def match_of(catalogue: Catalogue, taste_UK: Float64Array) -> Float64Array:
    """Measure how well each picture fits each taste (U, I), standard deviation 1 over all pairs."""
    match_UI: Float64Array = taste_UK @ catalogue.look_IK.T
    return match_UI / max(float(match_UI.std()), 1e-12)


def browse(
    catalogue: Catalogue, people: People, launch_day_I: Int64Array, popularity_I: Float64Array, num_days: int, seed: int
) -> Behaviors:
    """Draw the organic clicks of the history and of every day of the log, none on items new on the last day."""
    rng = np.random.default_rng([seed, 5])
    steady_UI = BROWSE_POPULARITY * popularity_I + BROWSE_CATEGORY * people.category_taste_UC[:, catalogue.category_I]
    vivid_I = catalogue.look_IK[:, catalogue.vivid]

    def draw_day(day: int) -> Callable[[], Behaviors]:
        live_L = np.flatnonzero(launch_day_I <= min(day, num_days - 2))
        user_N = np.repeat(np.arange(people.num_users), rng.poisson(people.browsing_U / HISTORY_DAYS))
        share_N = rng.random(len(user_N))
        any_N = live_L[rng.integers(len(live_L), size=len(user_N))]
        accident_N = rng.random(len(user_N)) < ACCIDENT_SHARE
        time_N = START_S + day * DAY_S + rng.integers(7 * 3600, DAY_S, size=len(user_N))
        dwell_s_N = _dwell_s(rng, accident_N)

        def choose() -> Behaviors:
            today = day + HISTORY_DAYS
            score_UI = steady_UI + BROWSE_MATCH * match_of(catalogue, people.taste_UDK[:, today])
            score_UI += BROWSE_MOOD * people.mood_UD[:, today, None] * vivid_I
            wanted_N = live_L[_columns_at(share_N, score_UI[:, live_L], user_N)]
            return Behaviors(time_N, user_N, np.where(accident_N, any_N, wanted_N), dwell_s_N)

        return choose

    chosen = [draw_day(day) for day in range(-HISTORY_DAYS, num_days)]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # nearly all of the time is numpy's
        columns = _joined(list(pool.map(lambda choose: choose(), chosen)))
    order = np.argsort(columns["time_N"], kind="stable")
    return Behaviors(**{name: column[order] for name, column in columns.items()})


def _dwell_s(rng: np.random.Generator, accident_N: BoolArray) -> Float64Array:
    """Draw seconds spent: a moment after an accident, half a minute or so otherwise; they hardly overlap."""
    short_s_N = rng.lognormal(np.log(2.0), 0.35, size=len(accident_N))
    long_s_N = 8 + rng.lognormal(np.log(30), 0.8, size=len(accident_N))
    dwell_s_N: Float64Array = np.where(accident_N, short_s_N, long_s_N).round(1)
    return dwell_s_N


def _columns_at(share_N: Float64Array, score_UL: Float64Array, user_N: Int64Array) -> Int64Array:
    """Find for each of `user_N` the column at this share of softmax(the scores of that user), summed from the left."""
    mass_UL = np.cumsum(np.exp(score_UL - score_UL.max(axis=1, keepdims=True)), axis=1)
    draw_N = share_N * mass_UL[user_N, -1]
    column_N: Int64Array = (mass_UL[user_N] <= draw_N[:, None]).sum(axis=1)
    return column_N.clip(max=score_UL.shape[1] - 1)


HISTORY_DAYS = 14  # organic clicks before the first day of the log, so that its users have a past
DAY_S = 86_400
START_S = 1_772_323_200  # 2026-03-01, midnight in UTC: the first day of the log

MIN_ITEMS = 20  # fewer make no session

NUM_SCENES = 4
ADS_PER_SESSION = (3, 9)
CLICK_RATE = 0.22
TEST_DAY_TRAFFIC = 2.0  # the last day is a busy one: a test set of useful size from a small simulation
LAUNCHED_DURING_LOG = 0.35  # share of the items that come in while the log runs
NEW_ITEM_SHARE = 0.09  # share of the items that come in on the last day
NEW_AD_SHARE = 0.10  # share of the last day's impressions that show them

# Standard deviation of each part of the logit, over the impressions.
LOGIT_PARTS = {
    "match": 1.5,  # the user's taste of that day meets the picture's look
    "trend": 0.7,  # looks that everybody, or one gender, likes this season
    "mood": 0.9,  # people who look at vivid things just now click more
    "category": 0.6,  # the user's taste for categories
    "popularity": 0.4,  # of the item, whatever its look
    "activity": 0.3,  # of the user
    "scene": 0.2,
    "noise": 0.3,
}
PIXEL_PARTS = ("match", "trend", "mood")
ID_PARTS = ("category", "popularity", "activity", "scene")

# Organic clicks: an item is drawn with probability softmax(sum of these times the standardised part).
BROWSE_MATCH = 2.2
BROWSE_MOOD = 1.5
BROWSE_CATEGORY = 0.7
BROWSE_POPULARITY = 0.3
ACCIDENT_SHARE = 0.2  # of the organic clicks: on anything, and short

# Sessions with ads per user and day are log-normal: many see few ads, so a user's id alone says little of the taste.
SESSIONS = 0.15  # median
SESSIONS_SIGMA = 0.7

# A taste is made of three independent parts; the shares are of its variance, what is left over passes.
SEGMENT_SHARE = 0.1  # common to the users of one age and gender
LASTING_SHARE = 0.3  # the user's own, for ever
TASTE_MEMORY = 0.93  # correlation of the passing part from one day to the next
MOOD_MEMORY = 0.8  # the same of the passing half of a mood


@dataclass(frozen=True)
class World:
    """A simulated shop: what is on sale, who looks, and what happened."""

    catalogue: Catalogue
    people: People
    launch_day_I: Int64Array  # day of the log on which an item comes in; negative: before the log
    behaviors: Behaviors
    shown: ShownAds
    clicks: Clicks
    num_days: int


def simulate(catalogue: Catalogue, num_users: int, num_days: int, seed: int) -> World:
    """Simulate the whole world. Some seconds of numpy."""
    people = make_people(catalogue, num_users, HISTORY_DAYS, num_days, seed)
    launch_day_I = launch_days(catalogue.num_items, num_days, seed)
    popularity_I = np.random.default_rng([seed, 3]).normal(size=catalogue.num_items)
    shown = show_ads(people, launch_day_I, num_days, seed)
    return World(
        catalogue=catalogue,
        people=people,
        launch_day_I=launch_day_I,
        behaviors=browse(catalogue, people, launch_day_I, popularity_I, num_days, seed),
        shown=shown,
        clicks=click(catalogue, people, popularity_I, shown, seed),
        num_days=num_days,
    )


def launch_days(num_items: int, num_days: int, seed: int) -> Int64Array:
    """Draw the day of each item: most before the log, some in it, `NEW_ITEM_SHARE` on its last day."""
    rng = np.random.default_rng([seed, 4])
    num_new = max(1, round(NEW_ITEM_SHARE * num_items))
    num_during = round(LAUNCHED_DURING_LOG * num_items)
    order = rng.permutation(num_items)
    launch_day_I = np.full(num_items, -HISTORY_DAYS, dtype=np.int64)
    launch_day_I[order[:num_new]] = num_days - 1
    if num_days > 2:
        during = order[num_new : num_new + num_during]
        launch_day_I[during] = rng.integers(1, num_days - 1, size=len(during))
    return launch_day_I


def ceiling(world: World) -> dict[str, float | None]:
    """Compute AUC and new-ad AUC on the test day of the true logit but for its noise; None where they are undefined."""
    from trainer.evaluation.bootstrap import auc_of_groups  # loads torch, which the rest of the demo does without

    test_T = np.flatnonzero(world.shown.day_N == world.num_days - 1)
    new_T = world.launch_day_I[world.shown.item_N[test_T]] == world.num_days - 1
    score_T = world.clicks.logit(*PIXEL_PARTS, *ID_PARTS)[test_T]
    label_T = world.clicks.label_N[test_T].astype(np.float64)

    def auc(chosen_T: BoolArray) -> float | None:
        one_group = np.zeros(np.count_nonzero(chosen_T), np.int64)
        groups = auc_of_groups(score_T[chosen_T], label_T[chosen_T], one_group)
        return float(groups.auc_G[0]) if len(groups.auc_G) else None

    return {"auc": auc(np.ones_like(new_T)), "new_ad_auc": auc(new_T)}
