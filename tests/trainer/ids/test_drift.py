"""The moves that rows make up for: the polynomial's error, its memory beyond the first thousand steps, going on."""

import itertools

import numpy as np
import pytest
import torch

from trainer.ids.drift import TOLERANCE, Drift, degree_of, polynomial_error, window_of

STEPS = (1, 2, 3, 7, 30, 300, 5_000, 100_000)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.99), (0.99, 0.999), (0.5, 0.9)])
def test_the_error_is_below_the_tolerance_between_the_steps_that_chose_the_degree(
    betas: tuple[float, float], dtype: torch.dtype
) -> None:
    degree = degree_of(*betas, dtype)
    errors = {case: polynomial_error(*betas, dtype, degree, *case) for case in itertools.product(STEPS, STEPS)}
    assert max(errors.values()) <= 2 * TOLERANCE[dtype]
    assert max(polynomial_error(*betas, dtype, degree - 2, *case) for case in errors) > TOLERANCE[dtype]


def test_after_thirty_steps_it_is_below_rounding() -> None:
    degree = degree_of(0.9, 0.999, torch.float32)
    assert max(polynomial_error(0.9, 0.999, torch.float32, degree, step, 500) for step in STEPS if step >= 30) < 1e-9


def plain(drift_rates: list[float], last: int, m: float, v: float, eps: float) -> float:
    """The sum of the module's docstring, term by term."""
    return sum(
        rate * 0.9 ** (s - last) * m / (1 - 0.9**s) / ((0.999 ** (s - last) * v / (1 - 0.999**s)) ** 0.5 + eps)
        for s, rate in enumerate(drift_rates, 1)
        if s > last
    )


@pytest.fixture(scope="module")
def rates() -> list[float]:
    """More steps than the table begins with, at a rate that changes with each."""
    return np.random.default_rng(0).uniform(0, 0.1, 2_500).tolist()


@pytest.fixture(scope="module")
def drift(rates: list[float]) -> Drift:
    found = Drift(0.9, 0.999, 1e-8, torch.float64, "cpu")
    found.resume(rates)
    return found


@pytest.mark.parametrize("last", [1, 2, 50, 999, 1_023, 1_024, 1_500, 2_048, 2_400, 2_498, 2_499, 2_500])
def test_a_move_is_the_sum_of_its_terms(drift: Drift, rates: list[float], last: int) -> None:
    m, v = torch.tensor([[1e-3, -1e-9, 1.0, 0.0]]).double(), torch.tensor([[1e-6, 1e-17, 1e-12, 0.0]]).double()
    moved = drift.moved(torch.zeros(1, 4).double(), m, v, torch.tensor([last], dtype=torch.int32))
    expected = [-plain(rates, last, *pair, 1e-8) for pair in zip(m[0].tolist(), v[0].tolist(), strict=True)]
    np.testing.assert_allclose(moved[0].numpy(), expected, rtol=1e-12, atol=0)


def test_rows_of_no_step_stay(drift: Drift) -> None:
    weight = torch.ones(1, 2).double()
    zero = torch.zeros_like(weight)
    assert torch.equal(drift.moved(weight, zero, zero, torch.zeros(1, dtype=torch.int32)), weight)


def test_a_momentum_dies_out_within_the_window() -> None:
    assert window_of(0.0, torch.float32) == 1
    assert 0.9 ** window_of(0.9, torch.float32) <= 2.0**-30 < 0.9 ** (window_of(0.9, torch.float32) - 2)
