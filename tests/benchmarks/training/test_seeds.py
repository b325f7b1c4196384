"""Statistics over seeds, against scipy."""

import pytest

from benchmarks.seeds import holm, p_value, seed_mean


def test_an_interval_is_students() -> None:
    from scipy import stats  # a second's import, of two tests

    values = [1.0, 2.0, 4.0]
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem(values))
    found = seed_mean(values)
    assert found.half_width == pytest.approx((high - low) / 2) and found.mean == pytest.approx(7 / 3)
    assert seed_mean([1.0]).half_width is None


def test_the_test_is_paired() -> None:
    from scipy import stats

    base, ours = [0.60, 0.62, 0.61, 0.65], [0.61, 0.635, 0.62, 0.662]
    found = p_value([a - b for a, b in zip(ours, base, strict=True)])
    assert found == pytest.approx(float(stats.ttest_rel(ours, base).pvalue))
    assert p_value([0.1]) is None and p_value([0.1, 0.1]) is None


def test_p_values_are_corrected_for_their_number() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": None, "d": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": None, "d": 0.06}
    )
    assert holm({"a": 0.8, "b": 0.9}) == {"a": 1.0, "b": 1.0}
