"""The number of different keys in a number of samples: measured by drawing, and beyond the data by a law."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

_EXPONENTS = np.linspace(0.0, 2.0, 41)
_MOST_KEYS = 1e13
_HEAD = 512


class GrowthPoint(NamedTuple):
    """The mean number of different keys among those of `samples` samples that follow each other in an epoch."""

    samples: int
    unique: float


@dataclass(frozen=True)
class Zipf:
    """A law: `draws` keys a sample, drawn from `keys` keys whose popularity falls as rank ** -exponent.

    The number of different keys among n independent draws is the sum over keys of 1 - exp(-n p): Poisson occupancy
    (Good and Toulmin, 1956). For exponents above one it grows as a power of n, which is Heaps' law (van Leijenhorst and
    van der Weide, "A formal derivation of Heaps' law", 2005); with few keys it saturates, as a catalogue does.
    """

    exponent: float
    keys: float
    draws: float

    def unique(self, samples: float) -> float:
        """Estimate the number of different keys among those of `samples` samples."""
        return expected_unique(self.exponent, self.keys, samples * self.draws)


@dataclass(frozen=True)
class GrowthCurve:
    """Different keys against samples: measured points, a straight line of logarithms between them, a law beyond them.

    `most`: keys that there are at all, as the rows of the store; no figure goes beyond it. `error`: what the law, when
    fitted to the points up to half of the samples, got wrong at the last point, relative; None with too few points.
    """

    points: tuple[GrowthPoint, ...]
    beyond: Zipf | None = None
    most: float = math.inf
    error: float | None = None

    def unique(self, samples: float) -> float:
        """Estimate the number of different keys among those of `samples` samples."""
        first, last = self.points[0], self.points[-1]
        if samples <= first.samples:
            return first.unique * samples / first.samples
        if samples > last.samples:
            grown = self.beyond.unique(samples) if self.beyond else power_law(self.points[-2:], samples)
            return min(max(grown, last.unique), self.most, last.unique * samples / last.samples)
        pair = next((low, high) for low, high in itertools.pairwise(self.points) if samples <= high.samples)
        return power_law(pair, samples)

    def is_extrapolated(self, samples: float) -> bool:
        """Return whether there was less data."""
        return samples > self.points[-1].samples


def power_law(points: Sequence[GrowthPoint], samples: float) -> float:
    """Return Heaps' law through the first and the last of `points`: unique = k samples ** b."""
    low, high = points[0], points[-1]
    if high.samples == low.samples or low.unique <= 0:
        return high.unique * samples / high.samples
    slope = math.log(high.unique / low.unique) / math.log(high.samples / low.samples)
    return high.unique * math.exp(slope * math.log(samples / high.samples))


def expected_unique(exponent: float, keys: float, draws: float) -> float:
    """Sum over the ranks r = 1 .. keys of 1 - exp(-draws p_r), p_r proportional to r ** -exponent; some 1e-4 off."""
    rank_T, count_T = _ranks(keys)
    weight_T = rank_T**-exponent
    return float(count_T @ -np.expm1(-draws / (count_T @ weight_T) * weight_T))


def _ranks(keys: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return some ranks from 1 to `keys`, and how many each stands for: the first 512 for themselves, the others by the
    trapezium rule over the logarithm of the rank."""
    head_R = np.arange(1.0, min(_HEAD, math.ceil(keys)) + 1)
    if keys <= _HEAD:
        return head_R, np.ones_like(head_R)
    log_T, step = np.linspace(math.log(_HEAD + 0.5), math.log(keys + 0.5), 2_000, retstep=True)
    rank_T = np.exp(log_T)
    count_T = rank_T * step
    count_T[[0, -1]] /= 2
    return np.concatenate([head_R, rank_T]), np.concatenate([np.ones_like(head_R), count_T])


def fit(points: Sequence[GrowthPoint], draws: float, most: float = math.inf) -> GrowthCurve:
    """Fit the curve through `points`, ascending; beyond them by a Zipf law, from three points and any repeated key.

    `draws`: keys of a sample, those that repeat within a group left out. For each exponent the number of keys is the
    one that meets the last point; the exponent is the one that is nearest to the others, in logarithms.
    """
    points = tuple(points)
    law = _fit_law(points, draws, most)
    if law is None:
        return GrowthCurve(points, None, most)
    half = [point for point in points if point.samples <= points[-1].samples / 2]
    earlier = _fit_law(half, draws, most)
    error = abs(earlier.unique(points[-1].samples) / points[-1].unique - 1) if earlier else None
    return GrowthCurve(points, law, most, error)


def _fit_law(points: Sequence[GrowthPoint], draws: float, most: float) -> Zipf | None:
    if len(points) < 3 or points[-1].unique < 2:
        return None
    laws = [law for exponent in _EXPONENTS if (law := _through(points[-1], float(exponent), draws, most)) is not None]
    return min(laws, key=lambda law: _misfit(law, points), default=None)


def _misfit(law: Zipf, points: Sequence[GrowthPoint]) -> float:
    return sum(math.log(law.unique(point.samples) / point.unique) ** 2 for point in points if point.unique > 0)


def _through(last: GrowthPoint, exponent: float, draws: float, most: float) -> Zipf | None:
    """Find the law of this exponent that gives the last point; None where no number of keys does."""

    def excess(log_keys: float) -> float:
        return Zipf(exponent, math.exp(log_keys), draws).unique(last.samples) - last.unique

    low, high = math.log(max(last.unique, 2.0)), math.log(min(most, _MOST_KEYS))
    if excess(high) < -0.02 * last.unique:
        return None
    log_keys = low if excess(low) >= 0 else high if excess(high) <= 0 else brentq(excess, low, high)
    return Zipf(exponent, math.exp(log_keys), draws)
