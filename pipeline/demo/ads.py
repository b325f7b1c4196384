"""The ads shown and clicked: shown without regard to taste, and clicked by a logit of named parts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.demo import truth
from pipeline.demo.catalogue import Catalogue, FloatArray, IntArray
from pipeline.demo.people import NUM_GENDERS, People


@dataclass(frozen=True)
class ShownAds:
    """The ads shown, to whom and when, in order of time. Times are whole seconds since the epoch."""

    time_N: IntArray
    day_N: IntArray  # 0 is the first day of the log
    user_N: IntArray
    session_N: IntArray
    scene_N: IntArray
    item_N: IntArray


@dataclass(frozen=True)
class Clicks:
    """The labels of the ads shown, and their true logit as bias + the sum of its parts."""

    label_N: IntArray
    parts: dict[str, FloatArray]
    bias: float

    def logit(self, *names: str) -> FloatArray:
        """Add the named parts to the bias, (N,)."""
        total_N: FloatArray = np.full(len(self.label_N), self.bias)
        for name in names:
            total_N = total_N + self.parts[name]
        return total_N


def show_ads(people: People, launch_day_I: IntArray, num_days: int, seed: int, start_s: int) -> ShownAds:
    """Draw the sessions of every day and the ads in them; 10 % of the last day's ads show items new on that day."""
    rng = np.random.default_rng([seed, 6])
    exposure_I = rng.normal(0, 0.7, size=len(launch_day_I))
    days: list[ShownAds] = []
    num_sessions = 0
    for day in range(num_days):
        shown = _one_day(rng, people, launch_day_I, exposure_I, day, num_days, start_s, num_sessions)
        num_sessions = int(shown.session_N.max(initial=num_sessions - 1)) + 1
        days.append(shown)
    columns = {name: np.concatenate([getattr(day, name) for day in days]) for name in ShownAds.__dataclass_fields__}
    order = np.lexsort((columns["session_N"], columns["time_N"]))
    return ShownAds(**{name: column[order] for name, column in columns.items()})


def click(catalogue: Catalogue, people: People, popularity_I: FloatArray, shown: ShownAds, seed: int) -> Clicks:
    """Draw labels from the logit; its bias is set so that `CLICK_RATE` of the ads are clicked."""
    rng = np.random.default_rng([seed, 7])
    raw = _raw_parts(rng, catalogue, people, popularity_I, shown)
    parts = {name: sd * _standard(raw[name]) for name, sd in truth.LOGIT_PARTS.items()}
    total_N: FloatArray = np.sum(list(parts.values()), axis=0)
    bias = _bias_for(total_N, truth.CLICK_RATE)
    label_N = (rng.random(len(total_N)) < _sigmoid(total_N + bias)).astype(np.int64)
    return Clicks(label_N, parts, bias)


def _one_day(
    rng: np.random.Generator,
    people: People,
    launch_day_I: IntArray,
    exposure_I: FloatArray,
    day: int,
    num_days: int,
    start_s: int,
    first_session: int,
) -> ShownAds:
    """Draw one day's ads; S sessions with up to A ads each, none twice in one session."""
    last = day == num_days - 1
    low, high = truth.ADS_PER_SESSION
    rate_U = people.sessions_U * (truth.TEST_DAY_TRAFFIC if last else 1.0) * (people.first_day_U <= day)
    user_S = np.repeat(np.arange(people.num_users), rng.poisson(rate_U))
    scene_S = rng.integers(1, truth.NUM_SCENES + 1, size=len(user_S))
    begin_S = start_s + day * truth.DAY_S + rng.integers(7 * 3600, 23 * 3600, size=len(user_S))
    item_SA = _pick(rng, exposure_I, np.flatnonzero(launch_day_I <= min(day, num_days - 2)), len(user_S))
    if last:
        new_SA = _pick(rng, exposure_I, np.flatnonzero(launch_day_I == day), len(user_S))
        item_SA = np.where((rng.random(item_SA.shape) < truth.NEW_AD_SHARE) & (new_SA >= 0), new_SA, item_SA)
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


def _pick(rng: np.random.Generator, exposure_I: FloatArray, live_L: IntArray, num_sessions: int) -> IntArray:
    """Pick different items for each session (S, A) by exposure (Gumbel top-k); -1 where too few are on sale."""
    high = truth.ADS_PER_SESSION[1]
    picked_SA = np.full((num_sessions, high), -1, dtype=np.int64)
    if len(live_L) == 0 or num_sessions == 0:
        return picked_SA
    score_SL = exposure_I[live_L] + rng.gumbel(size=(num_sessions, len(live_L)))
    count = min(high, len(live_L))
    picked_SA[:, :count] = live_L[np.argsort(-score_SL, axis=1, kind="stable")[:, :count]]
    return picked_SA


def _raw_parts(
    rng: np.random.Generator, catalogue: Catalogue, people: People, popularity_I: FloatArray, shown: ShownAds
) -> dict[str, FloatArray]:
    """Compute the parts of the logit in any unit, (N,) each."""
    num_attributes = catalogue.look_IK.shape[1]
    season_K = rng.normal(size=num_attributes)
    season_EK = 0.7 * season_K + 0.7 * rng.normal(size=(NUM_GENDERS, num_attributes))
    trend_EI = _standard((season_EK * catalogue.weight_K) @ catalogue.look_IK.T)
    scene_C = rng.normal(size=truth.NUM_SCENES + 1)
    user_N, item_N = shown.user_N, shown.item_N
    return {
        "match": np.einsum(
            "nk,nk->n", people.taste_UDK[user_N, shown.day_N + truth.HISTORY_DAYS], catalogue.look_IK[item_N]
        ),
        "trend": trend_EI[people.gender_U[user_N] - 1, item_N],
        "mood": people.mood_UD[user_N, shown.day_N + truth.HISTORY_DAYS],
        "category": people.category_taste_UC[user_N, catalogue.category_I[item_N]],
        "popularity": popularity_I[item_N],
        "activity": people.activity_U[user_N],
        "scene": scene_C[shown.scene_N],
        "noise": rng.normal(size=len(user_N)),
    }


def _standard(values: NDArray[Any]) -> FloatArray:
    """Scale to mean 0 and standard deviation 1; zeros where nothing varies."""
    centred: FloatArray = values - values.mean()
    std = float(centred.std())
    return centred / std if std > 1e-12 else np.zeros_like(centred)


def _sigmoid(logit_N: FloatArray) -> FloatArray:
    return 1 / (1 + np.exp(-logit_N))


def _bias_for(logit_N: FloatArray, rate: float) -> float:
    """Find the bias with which mean(sigmoid(logit + bias)) is `rate`, by bisection."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(logit_N + middle).mean() < rate else (low, middle)
    return (low + high) / 2
