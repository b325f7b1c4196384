"""Slices of the test impressions: every impression is in one slice of each slicing.

Letters of shapes as in impressions.py; S slices of a slicing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.impressions import NEVER, Impressions, SeenInTraining
from trainer.samples.columns import Index

DAY_S = 86_400
AGE_DAYS = (1, 3, 7, 14)
AD_IMPRESSIONS = (1, 10, 30, 100, 300, 1000)
HISTORY = (1, 6, 11, 21, 51)


@dataclass(frozen=True)
class Slicing:
    """One way to cut: impression n is in the slice `names[slice_N[n]]`; some slices may be empty."""

    name: str
    title: str
    names: tuple[str, ...]
    slice_N: Index


def slicings(impressions: Impressions, seen: SeenInTraining, has_feature_I: NDArray[np.bool_] | None) -> list[Slicing]:
    """Cut by ad age, impressions of the ad in training, history length, and image: those that the schema has.

    `has_feature_I`: which of `seen.image_I` have one; None where the model reads no store.
    """
    ad_N = np.searchsorted(seen.ad_A, impressions.ad_N)
    shown_N = seen.impressions_A[ad_N]
    found = [
        _by_age(shown_N, seen.first_s_A[ad_N], impressions.time_s_N),
        Slicing(
            "ad_impressions",
            "impressions of the ad in training",
            _range_names(AD_IMPRESSIONS),
            _bins(shown_N, AD_IMPRESSIONS),
        ),
    ]
    if impressions.history_N is not None:
        lengths_N = impressions.history_N
        found.append(
            Slicing("history", "length of the user's history", _range_names(HISTORY), _bins(lengths_N, HISTORY))
        )
    if impressions.image_N is not None:
        image_N = np.searchsorted(seen.image_I, impressions.image_N)
        slice_N = np.where(seen.met_I[image_N], 0, 1)
        if has_feature_I is not None:
            slice_N = np.where(has_feature_I[image_N], slice_N, 2)
        names = ("known", "new", "missing")
        found.append(Slicing("image", "image of the ad", names, slice_N))
    return found


def _by_age(shown_N: Index, first_s_N: Index, time_s_N: Index | None) -> Slicing:
    """New: never in training. Else by the days since the ad's first training impression, where times are known."""
    name, title = "ad_age", "age of the ad"
    is_new_N = shown_N == 0
    if time_s_N is None or (first_s_N[~is_new_N] == NEVER).any():
        return Slicing(name, title, ("new", "in training"), np.where(is_new_N, 0, 1))
    # An impression from before the ad's first one in training (samples of an earlier day) counts as the first day.
    days_N = (time_s_N - np.where(is_new_N, time_s_N, first_s_N)) // DAY_S
    names = ("new", "under 1 day", *(f"{each} days" for each in _range_names(AGE_DAYS)[1:]))
    return Slicing(name, title, names, np.where(is_new_N, 0, 1 + _bins(days_N, AGE_DAYS)))


def _bins(values_N: Index, edges: Sequence[int]) -> Index:
    """0 below the first edge, 1 from there to below the second, and so on."""
    return np.searchsorted(edges, values_N, side="right").astype(np.int64)


def _range_names(edges: Sequence[int]) -> tuple[str, ...]:
    """Names of the bins between whole `edges`, the first of which is 1: 0, 1 to 9, …, 1,000 or more."""
    ends = [following - 1 for following in edges[1:]]
    inner = [f"{low:,} to {high:,}" if low < high else f"{low:,}" for low, high in zip(edges, ends, strict=False)]
    return ("0", *inner, f"{edges[-1]:,} or more")
