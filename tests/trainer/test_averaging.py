"""How much of an average is left after many steps."""

import math

import pytest
import torch

from trainer.engine.choices import StepAverage


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3, 0.01, 0.001])
def test_what_is_left_is_the_product_of_the_steps(share: float) -> None:
    average = StepAverage(share)
    left = [math.nan, *(1 - average.weight_in(step) for step in range(1, 301))]
    assert left[1] == 0, "after the first step the average is its parameters"
    since_Q = torch.arange(301, dtype=torch.int32)
    for now in (0, 1, 2, 50, 300):
        average.num_steps = now
        expected = [math.prod(left[max(1, since) + 1 : now + 1]) for since in range(now + 1)]
        torch.testing.assert_close(
            average.kept(since_Q[: now + 1]), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0
        )


@pytest.mark.parametrize(("share", "steps"), [(1.0, 1000), (0.5, 667), (0.2, 333)])
def test_about_the_last_share_of_the_steps_counts(share: float, steps: int) -> None:
    """A step's weight in the average after 1,000: the mean age of what counts is that of the last `steps`, by half."""
    average = StepAverage(share)
    average.num_steps = 1000
    weights = [average.weight_in(step) * average.kept(torch.tensor([step])).item() for step in range(1, 1001)]
    assert sum(weights) == pytest.approx(1, rel=1e-9)
    age = sum(weight * (1000 - step) for step, weight in enumerate(weights, 1))
    assert age == pytest.approx(steps / 2, rel=0.01)


def test_a_billion_steps_are_no_more_work() -> None:
    average = StepAverage(0.5)
    average.num_steps = 1_000_000_000
    left = average.kept(torch.tensor([999_999_000, 500_000_000], dtype=torch.int32))
    torch.testing.assert_close(left, torch.tensor([1 - 2e-6, 0.25], dtype=torch.float64), rtol=1e-5, atol=0)
