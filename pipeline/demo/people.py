"""The people of the demo: tastes, moods and habits. Of these only age and gender are in the logs."""

from dataclasses import dataclass

import numpy as np

from pipeline.demo import truth
from pipeline.demo.catalogue import Catalogue, FloatArray, IntArray

NUM_AGES = 5
NUM_GENDERS = 2
MOOD_MEMORY = 0.8  # correlation of a user's mood from one day to the next
SEGMENT_SHARE = 0.3  # share of a taste's variance that is common to users of one age and gender
SHARE_WITHOUT_CLICKS = 0.06
SHARE_LATE = 0.25


@dataclass(frozen=True)
class People:
    """Hidden truth about the users; D counts the days of history before the log, then the days of the log."""

    age_U: IntArray  # 1 .. NUM_AGES
    gender_U: IntArray  # 1 .. NUM_GENDERS
    taste_UK: FloatArray  # length 1: which looks, not how much
    category_taste_UC: FloatArray
    mood_UD: FloatArray  # how much vivid things please today
    activity_U: FloatArray  # plain readiness to click
    browsing_U: FloatArray  # organic clicks expected in 14 days
    sessions_U: FloatArray  # sessions with ads expected in a day
    first_day_U: IntArray  # of the log, 0-based: no ads before it

    @property
    def num_users(self) -> int:
        """How many users there are."""
        return len(self.age_U)


def make_people(catalogue: Catalogue, num_users: int, history_days: int, log_days: int, seed: int) -> People:
    """`num_users` people whose tastes are independent of the catalogue's categories."""
    rng = np.random.default_rng([seed, 2])
    age_U = rng.integers(1, NUM_AGES + 1, size=num_users)
    gender_U = rng.integers(1, NUM_GENDERS + 1, size=num_users)
    num_attributes = catalogue.look_IK.shape[1]
    segment_SK = rng.normal(size=(NUM_AGES * NUM_GENDERS, num_attributes))
    segment_U = (age_U - 1) * NUM_GENDERS + gender_U - 1
    own_UK = rng.normal(size=(num_users, num_attributes))
    taste_UK = np.sqrt(SEGMENT_SHARE) * segment_SK[segment_U] + np.sqrt(1 - SEGMENT_SHARE) * own_UK
    taste_UK *= catalogue.weight_K
    taste_UK /= np.linalg.norm(taste_UK, axis=1, keepdims=True)
    browsing_U = np.clip(rng.lognormal(mean=np.log(18), sigma=0.7, size=num_users), 1, 60)
    browsing_U[rng.random(num_users) < SHARE_WITHOUT_CLICKS] = 0
    late_U = rng.random(num_users) < SHARE_LATE
    return People(
        age_U=age_U,
        gender_U=gender_U,
        taste_UK=taste_UK,
        category_taste_UC=rng.normal(size=(num_users, len(catalogue.category_names))),
        mood_UD=_moods(rng, num_users, history_days + log_days),
        activity_U=rng.normal(size=num_users),
        browsing_U=browsing_U,
        sessions_U=np.clip(
            rng.lognormal(mean=np.log(truth.SESSIONS), sigma=truth.SESSIONS_SIGMA, size=num_users), 0.1, 3
        ),
        first_day_U=np.where(late_U, rng.integers(0, log_days, size=num_users), 0),
    )


def _moods(rng: np.random.Generator, num_users: int, num_days: int) -> FloatArray:
    """A first-order autoregression per user around the user's own level; variance 1, half of it between users."""
    steps_UD = rng.normal(size=(num_users, num_days))
    wave_UD = np.empty_like(steps_UD)
    wave_UD[:, 0] = steps_UD[:, 0]
    for day in range(1, num_days):
        wave_UD[:, day] = MOOD_MEMORY * wave_UD[:, day - 1] + np.sqrt(1 - MOOD_MEMORY**2) * steps_UD[:, day]
    level_U = rng.normal(size=num_users)
    mood_UD: FloatArray = np.sqrt(0.5) * (wave_UD + level_U[:, None])
    return mood_UD
