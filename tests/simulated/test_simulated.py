"""Simulated histories: the same each time, sound, and able to find what is planted."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.simulated.__main__ import BUGS, history_of, shortened
from tests.simulated.world import BEGIN_S, ObjectStore, World, simulated

pytestmark = pytest.mark.long


@pytest.mark.parametrize("seed", range(1, 12, 2))
def test_the_same_seed_gives_the_same_history(seed: int) -> None:
    one, other = history_of(seed).play().world, history_of(seed).play().world
    assert not one.failure and one.faults.total() > 10
    assert one.trace == other.trace


def test_other_threads_keep_their_clock() -> None:
    """Else those of a Dask client would wait for years with what they send."""
    world, now_s = World(0), time.time()
    with simulated(world, ObjectStore(world, lambda *_: None)), ThreadPoolExecutor(1) as pool:
        assert time.time() < BEGIN_S + 1 and pool.submit(time.time).result() >= now_s


def test_planted_bugs_have_their_places() -> None:
    for bug in BUGS:
        with bug.planted():
            pass


def test_a_planted_bug_is_found_and_its_history_is_made_shorter() -> None:
    bug = next(each for each in BUGS if each.guard.startswith("what others put behind"))
    with bug.planted():
        seed = next(seed for seed in range(200) if history_of(seed).play().world.failure)
        shortest = shortened(seed, history_of(seed).play())
    assert shortest.world.failure and 0 < sum(map(len, shortest.clients)) <= 3
    assert not history_of(seed).play().world.failure
