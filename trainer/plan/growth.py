"""How many different keys so many samples have: measured by drawing, and beyond the data by the law that fits it."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_EXPONENTS = np.linspace(0.0, 2.0, 41)
_MOST_KEYS = 1e13
_HEAD = 512


class Point(NamedTuple):
    """Different keys, on average, among the keys of so many samples that follow each other in an epoch's order."""

    samples: int
    unique: float


@dataclass(frozen=True)
class Zipf:
    """Draws of `keys` keys whose popularity falls as rank ** -exponent, `draws` of them a sample.

    The number of different keys among n independent draws is the sum over keys of 1 - exp(-n p): Poisson occupancy
    (Good and Toulmin, 1956). For exponents above one it grows as a power of n, which is Heaps' law (van Leijenhorst and
    van der Weide, "A formal derivation of Heaps' law", 2005); with few keys it saturates, as a catalogue does.
    """

    exponent: float
    keys: float
    draws: float

    def unique(self, samples: float) -> float:
        """Different keys among those of `samples` samples."""
        return expected_unique(self.exponent, self.keys, samples * self.draws)


@dataclass(frozen=True)
class Curve:
    """Different keys against samples: measured points, a straight line of logarithms between them, a law beyond them.

    `most`: keys that there are at all, as the rows of the store; no figure goes beyond it. `error`: what the law, when
    fitted to the points up to half of the samples, got wrong at the last point, relative; None with too few points.
    """

    points: tuple[Point, ...]
    beyond: Zipf | None = None
    most: float = math.inf
    error: float | None = None

    def unique(self, samples: float) -> float:
        """Different keys among those of `samples` samples."""
        first, last = self.points[0], self.points[-1]
        if samples <= first.samples:
            return first.unique * samples / first.samples
        if samples > last.samples:
            grown = self.beyond.unique(samples) if self.beyond else power_law(self.points[-2:], samples)
            return min(max(grown, last.unique), self.most, last.unique * samples / last.samples)
        pair = next((low, high) for low, high in itertools.pairwise(self.points) if samples <= high.samples)
        return power_law(pair, samples)

    def is_extrapolated(self, samples: float) -> bool:
        """Whether there was not so much data."""
        return samples > self.points[-1].samples


def power_law(points: Sequence[Point], samples: float) -> float:
    """Heaps' law through the first and the last of `points`: unique = k samples ** b."""
    low, high = points[0], points[-1]
    if high.samples == low.samples or low.unique <= 0:
        return high.unique * samples / high.samples
    slope = math.log(high.unique / low.unique) / math.log(high.samples / low.samples)
    return high.unique * math.exp(slope * math.log(samples / high.samples))


def expected_unique(exponent: float, keys: float, draws: float) -> float:
    """Sum over ranks r = 1 .. keys of 1 - exp(-draws p_r), p_r proportional to r ** -exponent.

    The first 512 ranks one by one, the others by the trapezium rule over the logarithm of the rank: some 1e-4 off.
    """
    head_R = np.arange(1.0, min(_HEAD, math.ceil(keys)) + 1)
    total, weight_R = _generalised_harmonic(exponent, keys), head_R**-exponent
    found = float(-np.expm1(-draws * weight_R / total).sum())
    if keys <= _HEAD:
        return found
    log_T = np.linspace(math.log(_HEAD + 0.5), math.log(keys + 0.5), 2_000)
    rank_T = np.exp(log_T)
    return found + float(np.trapezoid(-np.expm1(-draws * rank_T**-exponent / total) * rank_T, log_T))


def fit(points: Sequence[Point], draws: float, most: float = math.inf) -> Curve:
    """The curve through `points`, ascending; beyond them a Zipf law, if there are three points and any repeated key.

    `draws`: keys of a sample, those that repeat within a group left out. For each exponent the number of keys is the
    one that meets the last point; the exponent is the one that is nearest to the others, in logarithms.
    """
    points = tuple(points)
    law = _fit_law(points, draws, most)
    if law is None:
        return Curve(points, None, most)
    half = [point for point in points if point.samples <= points[-1].samples / 2]
    earlier = _fit_law(half, draws, most)
    error = abs(earlier.unique(points[-1].samples) / points[-1].unique - 1) if earlier else None
    return Curve(points, law, most, error)


def _fit_law(points: Sequence[Point], draws: float, most: float) -> Zipf | None:
    if len(points) < 3 or points[-1].unique < 2:
        return None
    laws = [law for exponent in _EXPONENTS if (law := _through(points[-1], float(exponent), draws, most)) is not None]
    return min(laws, key=lambda law: _misfit(law, points), default=None)


def _misfit(law: Zipf, points: Sequence[Point]) -> float:
    return sum(math.log(law.unique(point.samples) / point.unique) ** 2 for point in points if point.unique > 0)


def _through(last: Point, exponent: float, draws: float, most: float) -> Zipf | None:
    """The law of this exponent that gives the last point, by bisection of the logarithm of its number of keys."""
    low, high = math.log(max(last.unique, 2.0)), math.log(min(most, _MOST_KEYS))
    if Zipf(exponent, math.exp(high), draws).unique(last.samples) < 0.98 * last.unique:
        return None
    for _ in range(50):
        middle = (low + high) / 2
        if Zipf(exponent, math.exp(middle), draws).unique(last.samples) < last.unique:
            low = middle
        else:
            high = middle
    return Zipf(exponent, math.exp(high), draws)


def _generalised_harmonic(exponent: float, keys: float) -> float:
    """Sum of r ** -exponent for r = 1 .. keys; beyond the first 512 ranks the integral from half to half."""
    head = float((np.arange(1.0, min(_HEAD, math.ceil(keys)) + 1) ** -exponent).sum())
    if keys <= _HEAD:
        return head
    low, high = _HEAD + 0.5, keys + 0.5
    if abs(exponent - 1) < 1e-9:
        return head + math.log(high / low)
    return head + float(high ** (1 - exponent) - low ** (1 - exponent)) / (1 - exponent)
