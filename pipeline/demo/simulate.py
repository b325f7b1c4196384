"""A simulated shop: its items come and go, its people browse and are shown ads. Everything follows from one seed."""

from dataclasses import dataclass, replace

import numpy as np

from pipeline.demo import truth
from pipeline.demo.ads import Clicks, ShownAds, click, show_ads
from pipeline.demo.browse import Behaviors, browse
from pipeline.demo.catalogue import BoolArray, Catalogue, FloatArray, IntArray
from pipeline.demo.options import Taste
from pipeline.demo.people import People, make_people
from pipeline.errors import DemoError

_NEVER = 10**6  # days


@dataclass(frozen=True)
class World:
    """A simulated shop: what is on sale, who looks, and what happened."""

    catalogue: Catalogue
    people: People
    taste: Taste
    advertised_I: BoolArray
    launch_day_I: IntArray  # day of the log on which an item comes in; negative: before the log
    popularity_I: FloatArray
    behaviors: Behaviors
    shown: ShownAds
    clicks: Clicks
    num_days: int
    start_s: int


def simulate(
    catalogue: Catalogue, num_users: int, num_days: int, seed: int, start_s: int, taste: Taste = "items"
) -> World:
    """Simulate the whole world; `start_s` is midnight (UTC) of the first day of the log. Some seconds of numpy.

    With taste "items" every item is advertised and looked at. With "pictures" a few items are advertised, so that their
    looks can be learned by their IDs; people look at the others, each offered by `truth.SELLERS` sellers under IDs of
    their own, of which a model sees too little to learn their looks. Raises DemoError for too few items.
    """
    people = make_people(catalogue, num_users, truth.HISTORY_DAYS, num_days, seed)
    advertised_I, launch_day_I = _supply(catalogue.num_items, num_days, seed, taste)
    popularity_I = np.random.default_rng([seed, 3]).normal(size=catalogue.num_items)
    ad_day_I = np.where(advertised_I, launch_day_I, _NEVER)
    offer_day_I = launch_day_I if taste == "items" else np.where(advertised_I, _NEVER, launch_day_I)
    shown = show_ads(people, ad_day_I, num_days, seed, start_s)
    behaviors = browse(catalogue, people, offer_day_I, popularity_I, num_days, seed, start_s)
    if taste == "pictures":
        sellers = np.random.default_rng([seed, 8]).integers(truth.SELLERS, size=len(behaviors.item_N))
        behaviors = replace(behaviors, seller_N=sellers)
    return World(
        catalogue=catalogue,
        people=people,
        taste=taste,
        advertised_I=advertised_I,
        launch_day_I=launch_day_I,
        popularity_I=popularity_I,
        behaviors=behaviors,
        shown=shown,
        clicks=click(catalogue, people, popularity_I, shown, seed),
        num_days=num_days,
        start_s=start_s,
    )


def advertised(num_items: int, seed: int, taste: Taste) -> BoolArray:
    """Choose which items are shown as ads, (I,). Raises DemoError where too few are left to be looked at."""
    advertised_I = np.ones(num_items, dtype=np.bool_)
    if taste == "pictures":
        num_ads = max(truth.MIN_ITEMS, round(truth.ADVERTISED_SHARE * num_items))
        if num_items - num_ads < truth.MIN_OFFERED:
            needed = truth.MIN_ITEMS + truth.MIN_OFFERED
            raise DemoError(f"taste=pictures needs at least {needed} items, and items={num_items}; give more --items")
        order = np.random.default_rng([seed, 9]).permutation(num_items)
        advertised_I[order[num_ads:]] = False
    return advertised_I


def _supply(num_items: int, num_days: int, seed: int, taste: Taste) -> tuple[BoolArray, IntArray]:
    """Choose which items are advertised, and when each comes in; with few ads, some are new on the last day."""
    advertised_I, launch_day_I = advertised(num_items, seed, taste), launch_days(num_items, num_days, seed)
    if taste == "pictures":
        launch_day_I[advertised_I] = launch_days(int(advertised_I.sum()), num_days, seed)
    return advertised_I, launch_day_I


def launch_days(num_items: int, num_days: int, seed: int) -> IntArray:
    """Draw the day of each item: most before the log, some in it, `NEW_ITEM_SHARE` on its last day."""
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
