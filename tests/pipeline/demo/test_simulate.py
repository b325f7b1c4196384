"""The simulated shop: what is new is new, clicks follow the truth, and part of the truth is only in the pixels."""

import dataclasses

import numpy as np
import pytest

from pipeline.demo import world as truth
from pipeline.demo.items import catalogue_of, plan_garments
from pipeline.demo.world import World, ceiling, match_of, simulate
from trainer.evaluation.bootstrap import auc

DAYS = 19
START_S = 1_772_323_200


@pytest.fixture(scope="module")
def world() -> World:
    return simulate(catalogue_of(plan_garments(600, 0)), num_users=1200, num_days=DAYS, seed=0, start_s=START_S)


@pytest.fixture(scope="module")
def last(world: World) -> np.ndarray:
    """Which impressions are of the test day."""
    return world.shown.day_N == DAYS - 1


def _match(world: World, day_N: np.ndarray, user_N: np.ndarray, item_N: np.ndarray) -> np.ndarray:
    """How well each row's picture fits its user's taste of that day, in standard deviations over all pairs."""
    match_N = np.empty(len(day_N))
    for day in np.unique(day_N):
        rows = day_N == day
        match_UI = match_of(world.catalogue, world.people.taste_UDK[:, day + truth.HISTORY_DAYS])
        match_N[rows] = match_UI[user_N[rows], item_N[rows]]
    return match_N


@pytest.mark.long
def test_equal_seeds_give_equal_worlds(world: World) -> None:
    again, other = (simulate(world.catalogue, 1200, DAYS, seed, START_S) for seed in (0, 1))
    for part in ("shown", "behaviors", "clicks"):
        for name, column in vars(getattr(world, part)).items():
            if isinstance(column, np.ndarray):
                np.testing.assert_array_equal(column, getattr(getattr(again, part), name))
    assert not np.array_equal(world.behaviors.item_N[:100], other.behaviors.item_N[:100])


@pytest.mark.long
def test_a_tenth_of_the_last_days_ads_is_new(world: World, last: np.ndarray) -> None:
    new = np.flatnonzero(world.launch_day_I == DAYS - 1)
    assert np.isin(world.shown.item_N[last], new).mean() == pytest.approx(truth.NEW_AD_SHARE, abs=0.02)
    assert not np.isin(world.shown.item_N[~last], new).any(), "never shown before"
    assert not np.isin(world.behaviors.item_N, new).any(), "never clicked before"


def test_nothing_is_shown_or_clicked_before_it_is_on_sale(world: World) -> None:
    assert (world.launch_day_I[world.shown.item_N] <= world.shown.day_N).all()
    day_N = (world.behaviors.time_N - START_S) // truth.DAY_S
    assert (world.launch_day_I[world.behaviors.item_N] <= day_N).all()
    assert day_N.min() == -truth.HISTORY_DAYS
    assert day_N.max() == DAYS - 1


def test_times_are_sorted_and_on_their_day(world: World) -> None:
    for time_N in (world.shown.time_N, world.behaviors.time_N):
        assert (np.diff(time_N) >= 0).all()
    np.testing.assert_array_equal((world.shown.time_N - START_S) // truth.DAY_S, world.shown.day_N)


def test_a_session_is_one_user_in_one_scene_on_one_day_without_an_item_twice(world: World) -> None:
    shown = world.shown
    for name in ("user_N", "scene_N", "day_N"):
        pairs = np.unique(np.stack([shown.session_N, getattr(shown, name)]), axis=1)
        assert pairs.shape[1] == len(np.unique(shown.session_N)), name
    assert np.unique(np.stack([shown.session_N, shown.item_N]), axis=1).shape[1] == len(shown.item_N)
    low, high = truth.ADS_PER_SESSION
    assert set(np.bincount(shown.session_N)) == set(range(low, high + 1))


def test_users_have_none_to_some_sixty_behaviours_in_fourteen_days(world: World) -> None:
    recent = world.behaviors.time_N >= START_S + (DAYS - 14) * truth.DAY_S
    count_U = np.bincount(world.behaviors.user_N[recent], minlength=world.people.num_users)
    assert (count_U == 0).mean() > 0.03
    assert 12 < count_U.mean() < 32
    assert 45 < count_U.max() < 95


def test_organic_clicks_follow_taste_and_accidents_do_not(world: World) -> None:
    done = world.behaviors
    match_N = _match(world, (done.time_N - START_S) // truth.DAY_S, done.user_N, done.item_N)
    short = done.dwell_s_N < 5
    assert short.mean() == pytest.approx(truth.ACCIDENT_SHARE, abs=0.02)
    assert match_N[~short].mean() > 0.8, "in standard deviations over all pairs"
    assert abs(match_N[short].mean()) < 0.1
    assert (match_N[~short] < 0.5).mean() > 0.05, "imperfectly"


def test_moods_show_in_what_is_browsed(world: World) -> None:
    done = world.behaviors
    day_N = (done.time_N - START_S) // truth.DAY_S + truth.HISTORY_DAYS
    mood_N = world.people.mood_UD[done.user_N, day_N]
    vivid_N = world.catalogue.look_IK[done.item_N, world.catalogue.vivid]
    long = done.dwell_s_N >= 5
    assert np.corrcoef(mood_N[long], vivid_N[long])[0, 1] > 0.25


def test_tastes_last_in_part(world: World) -> None:
    taste_UDK = world.people.taste_UDK
    np.testing.assert_allclose(np.linalg.norm(taste_UDK, axis=2), 1)
    likeness = [float((taste_UDK[:, -1] * taste_UDK[:, -1 - days]).sum(axis=1).mean()) for days in (1, 10, 30)]
    assert likeness[0] > 0.9
    assert likeness[0] > likeness[1] + 0.1 > likeness[2] + 0.2, "what was browsed last tells most"
    assert likeness[2] > 0.3, "a part stays"


def test_moods_last_some_days_and_then_change(world: World) -> None:
    mood_UD = world.people.mood_UD
    after = [np.corrcoef(mood_UD[:, 0], mood_UD[:, days])[0, 1] for days in (1, 20)]
    assert after == pytest.approx([0.5 + 0.5 * truth.MOOD_MEMORY, 0.5], abs=0.1), (
        "half of a mood is the user's own level"
    )


def test_each_part_of_the_logit_has_its_size(world: World) -> None:
    for name, sd in truth.LOGIT_PARTS.items():
        assert world.clicks.parts[name].std() == pytest.approx(sd), name
        assert abs(world.clicks.parts[name].mean()) < 1e-9, name
    assert set(truth.LOGIT_PARTS) == {*truth.PIXEL_PARTS, *truth.ID_PARTS, "noise"}
    variance = {name: part_N.var() for name, part_N in world.clicks.parts.items()}
    assert sum(variance[name] for name in truth.PIXEL_PARTS) > 0.6 * sum(variance.values())


def test_labels_follow_the_logit(world: World) -> None:
    probability_N = 1 / (1 + np.exp(-world.clicks.logit(*truth.LOGIT_PARTS)))
    assert probability_N.mean() == pytest.approx(truth.CLICK_RATE, abs=1e-6)
    order = np.argsort(probability_N)
    for rows in np.array_split(order, 10):
        expected, error = probability_N[rows].mean(), np.sqrt(0.25 / len(rows))
        assert world.clicks.label_N[rows].mean() == pytest.approx(expected, abs=4 * error)


def test_ads_are_shown_without_regard_to_taste(world: World) -> None:
    match_N = _match(world, world.shown.day_N, world.shown.user_N, world.shown.item_N)
    assert abs(match_N.mean()) < 0.1


def test_who_cannot_see_stays_far_below_the_ceiling(world: World, last: np.ndarray) -> None:
    known = {name: value or 0.0 for name, value in ceiling(world).items()}
    blind_N = world.clicks.logit(*truth.ID_PARTS)
    new = last & (world.launch_day_I[world.shown.item_N] == DAYS - 1)
    label_N = world.clicks.label_N
    assert known["auc"] > (auc(blind_N[last], label_N[last]) or 1.0) + 0.15
    assert known["new_ad_auc"] > (auc(blind_N[new], label_N[new]) or 1.0) + 0.15


def test_a_catalogue_without_variation_still_makes_a_world(world: World) -> None:
    flat = dataclasses.replace(world.catalogue, look_IK=np.zeros_like(world.catalogue.look_IK))
    dull = simulate(flat, num_users=30, num_days=3, seed=0, start_s=START_S)
    assert np.isfinite(dull.clicks.logit(*truth.LOGIT_PARTS)).all()
    assert (dull.clicks.parts["match"] == 0).all()
