"""A simulated shop: its items come and go, its people browse and are shown ads. Everything follows from one seed."""

from dataclasses import dataclass

import numpy as np

from pipeline.demo import truth
from pipeline.demo.ads import Clicks, Shown, click, show_ads
from pipeline.demo.browse import Behaviors, browse
from pipeline.demo.catalogue import Catalogue, FloatArray, IntArray
from pipeline.demo.people import People, make_people


@dataclass(frozen=True)
class World:
    """What is on sale, who looks, and what happened."""

    catalogue: Catalogue
    people: People
    launch_day_I: IntArray  # day of the log on which an item comes in; negative: before the log
    popularity_I: FloatArray
    behaviors: Behaviors
    shown: Shown
    clicks: Clicks
    num_days: int
    start_s: int


def simulate(catalogue: Catalogue, num_users: int, num_days: int, seed: int, start_s: int) -> World:
    """The whole world; `start_s` is midnight (UTC) of the first day of the log. Some seconds of numpy."""
    people = make_people(catalogue, num_users, truth.HISTORY_DAYS, num_days, seed)
    launch_day_I = launch_days(catalogue.num_items, num_days, seed)
    popularity_I = np.random.default_rng([seed, 3]).normal(size=catalogue.num_items)
    shown = show_ads(people, launch_day_I, num_days, seed, start_s)
    return World(
        catalogue=catalogue,
        people=people,
        launch_day_I=launch_day_I,
        popularity_I=popularity_I,
        behaviors=browse(catalogue, people, launch_day_I, popularity_I, num_days, seed, start_s),
        shown=shown,
        clicks=click(catalogue, people, popularity_I, shown, seed),
        num_days=num_days,
        start_s=start_s,
    )


def launch_days(num_items: int, num_days: int, seed: int) -> IntArray:
    """When each item comes in: most before the log, some on its days, `NEW_ITEM_SHARE` on its last day."""
    rng = np.random.default_rng([seed, 4])
    num_new = max(1, round(truth.NEW_ITEM_SHARE * num_items))
    num_during = round(truth.LAUNCHED_DURING_LOG * num_items)
    order = rng.permutation(num_items)
    launch_day_I = np.full(num_items, -truth.HISTORY_DAYS, dtype=np.int64)
    launch_day_I[order[:num_new]] = num_days - 1
    if num_days > 2:
        during = order[num_new : num_new + num_during]
        launch_day_I[during] = rng.integers(1, num_days - 1, size=len(during))
    return launch_day_I
