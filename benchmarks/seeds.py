"""Figures over training seeds: mean, interval, and whether paired differences are more than noise.

Seeds are shared by the variants of a table, so a variant is compared with its baseline seed by seed: the paired t test
and the interval of Student's t (of scipy.special; scipy.stats takes a second to import). Several rows of a table are
several looks: Holm's correction holds the chance of any false difference at the level of one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.95


@dataclass(frozen=True)
class SeedMean:
    """Mean over seeds, and half the width of its 95 % interval; None for one seed."""

    mean: float
    half_width: float | None


def seed_mean(values: Sequence[float]) -> SeedMean:
    """Compute the mean and Student's interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return SeedMean(mean, None)
    return SeedMean(mean, float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * _error(values))


def p_value(differences: Sequence[float]) -> float | None:
    """Test paired differences against zero, two-sided; None for one seed, or where all differences are equal."""
    if len(differences) < 2 or float(np.std(differences)) == 0:
        return None
    return 2 * float(stdtr(len(differences) - 1, -abs(float(np.mean(differences))) / _error(differences)))


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Correct p-values by Holm's step-down: the k-th smallest of m times m - k + 1, never below the one before."""
    tested = sorted((value, name) for name, value in p_values.items() if value is not None)
    corrected, highest = dict(p_values), 0.0
    for place, (value, name) in enumerate(tested):
        highest = max(highest, min(1.0, value * (len(tested) - place)))
        corrected[name] = highest
    return corrected


def _error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))
