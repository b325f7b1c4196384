"""Simulated histories: the same each time, sound, and able to find what is planted."""

import pytest

from tests.simulated.history import KINDS, kind_of, play, shortened
from tests.simulated.planted import BUGS, Bug

pytestmark = pytest.mark.long


@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_the_same_seed_gives_the_same_history(seed: int) -> None:
    one, other = play(seed), play(seed)
    assert one.error is None and one.world.requests > 10
    assert one.world.trace == other.world.trace and one.world.digest == other.world.digest


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.guard)
def test_a_planted_bug_has_its_place(bug: Bug) -> None:
    with bug.planted():
        pass


def test_a_planted_bug_is_found_and_its_history_is_made_shorter() -> None:
    bug = next(each for each in BUGS if each.guard.startswith("what others put behind"))
    seeds = [seed for seed in range(200) if kind_of(seed).__name__ == bug.kind]
    with bug.planted():
        failed = next(each for each in map(play, seeds) if each.error is not None)
        shortest = shortened(failed)
    assert shortest.error is not None and 0 < sum(map(len, shortest.plan)) < sum(map(len, failed.plan))
    assert play(failed.seed).error is None
