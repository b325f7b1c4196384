"""The people of the demo: tastes, moods and habits. Of these only age and gender are in the logs."""

from dataclasses import dataclass

import numpy as np

from pipeline.demo import truth
from pipeline.demo.catalogue import Catalogue, FloatArray, IntArray

NUM_AGES = 5
NUM_GENDERS = 2
SHARE_WITHOUT_CLICKS = 0.06
SHARE_LATE = 0.25


@dataclass(frozen=True)
class People:
    """Hidden truth about the users; D counts the days of history before the log, then the days of the log."""

    age_U: IntArray  # 1 .. NUM_AGES
    gender_U: IntArray  # 1 .. NUM_GENDERS
    taste_UDK: FloatArray  # length 1: which looks please on that day, not how much
    category_taste_UC: FloatArray
    mood_UD: FloatArray  # how much vivid things please today
    activity_U: FloatArray  # plain readiness to click
    browsing_U: FloatArray  # organic clicks expected in 14 days
    sessions_U: FloatArray  # sessions with ads expected in a day
    first_day_U: IntArray  # of the log, 0-based: no ads before it

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
    constant_UDK = np.sqrt(truth.SEGMENT_SHARE) * segment_SK[segment_U][:, None] + np.sqrt(
        truth.LASTING_SHARE
    ) * rng.normal(size=(num_users, 1, num_attributes))
    passing_UDK = _wander(rng, (num_users, num_days, num_attributes), truth.TASTE_MEMORY)
    taste_UDK = constant_UDK + np.sqrt(1 - truth.SEGMENT_SHARE - truth.LASTING_SHARE) * passing_UDK
    taste_UDK *= catalogue.weight_K
    taste_UDK /= np.linalg.norm(taste_UDK, axis=2, keepdims=True)
    level_U1 = rng.normal(size=(num_users, 1))
    mood_UD = np.sqrt(0.5) * (level_U1 + _wander(rng, (num_users, num_days), truth.MOOD_MEMORY))
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
        sessions_U=np.clip(
            rng.lognormal(mean=np.log(truth.SESSIONS), sigma=truth.SESSIONS_SIGMA, size=num_users), 0.1, 3
        ),
        first_day_U=np.where(late_U, rng.integers(0, log_days, size=num_users), 0),
    )


def _wander(rng: np.random.Generator, shape: tuple[int, ...], memory: float) -> FloatArray:
    """Draw a first-order autoregression along axis 1, the days: variance 1, correlation `memory` day to day."""
    wave = rng.normal(size=shape)
    for day in range(1, shape[1]):
        wave[:, day] = memory * wave[:, day - 1] + np.sqrt(1 - memory**2) * wave[:, day]
    return wave
