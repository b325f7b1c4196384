"""The slope of a soak: what grows is found, and what only swings or has jumped once before is not taken for growth."""

import numpy as np
import pytest

from benchmarks.soak.measure import growth

AT_S = np.arange(0, 3_000, 10.0)


def test_growth_is_an_hour_s_and_its_interval_has_the_truth() -> None:
    noise = np.random.default_rng(0).normal(size=len(AT_S))
    slope, half = growth(list(AT_S), list(300 + 20 * AT_S / 3_600 + noise))
    assert abs(slope - 20) < half < 2


@pytest.mark.parametrize("period_s", [30, 600])
def test_what_swings_does_not_grow(period_s: float) -> None:
    slope, half = growth(list(AT_S), list(300 + 5 * np.sin(2 * np.pi * AT_S / period_s)))
    assert abs(slope) < half


def test_what_stays_the_same_has_no_interval() -> None:
    assert growth(list(AT_S), [17.0] * len(AT_S)) == pytest.approx((0, 0), abs=1e-6)
