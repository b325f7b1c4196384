"""Simulated histories: the same each time, sound, and able to find what is planted."""

import pytest

from tests.planted import Bug
from tests.simulated.play import BUGS, KINDS, kind_of, plan_of, play, shortened

pytestmark = pytest.mark.long


@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_the_same_seed_gives_the_same_history(seed: int) -> None:
    one, other = play(seed), play(seed)
    assert one.failure is None and one.faults.total() > 10
    assert one.trace == other.trace


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.guard)
def test_a_planted_bug_has_its_place(bug: Bug) -> None:
    with bug.planted():
        pass


def test_a_planted_bug_is_found_and_its_history_is_made_shorter() -> None:
    bug = next(each for each in BUGS if each.guard.startswith("what others put behind"))
    with bug.planted():
        seed = next(seed for seed in range(200) if kind_of(seed).__name__ == bug.kind and play(seed).failure)
        plan, world = shortened(seed, plan_of(seed)[0])
    assert world.failure is not None and 0 < sum(map(len, plan)) <= 3
    assert play(seed).failure is None
