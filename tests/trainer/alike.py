"""Metrics of runs that differ by rounding alone: other ranks, other batches, another processor."""

from collections.abc import Mapping
from typing import Any

import pytest

_RANK_METRICS = {"auc", "gauc", "new_ad_auc", "new_ad_gauc"}


def alike(name: str, value: Any, within: float = 1e-4) -> Any:
    """What to compare another run's metric of that name with: a log loss within `within`, a rank metric within .03.

    A rank metric is no continuous number: where two logits change places, it moves by one over its pairs, 1 % and more
    of a few dozen impressions. Only the log loss can tell rounding from a mistake. Counts are compared as they are.
    """
    if not isinstance(value, float):
        return value
    return pytest.approx(value, abs=0.03 if name in _RANK_METRICS else within)


def all_alike(metrics: Mapping[str, Any], within: float = 1e-4) -> dict[str, Any]:
    """`alike` of each metric, to be compared with another run's metrics."""
    return {name: alike(name, value, within) for name, value in metrics.items()}
