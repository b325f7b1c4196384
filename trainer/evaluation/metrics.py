"""Log loss, AUC and GAUC, exact and in float64.

AUC of a set of impressions = (sum of the positives' mid-ranks - p (p + 1) / 2) / (p n), the Mann-Whitney form, with
mid-ranks for ties. GAUC ("Image Matters", arXiv 1711.06505) = sum over users of impressions x AUC of that user
/ sum of impressions, users with one class left out. AUC is that with all impressions in one group, so one code serves.
A metric that is not defined (no impression, or one class only) is None, JSON's null: never 0, 0.5 or NaN.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Metrics:
    """What is known of N scored impressions. `gauc_impressions`: of users with both classes (GAUC uses them)."""

    impressions: int
    clicks: int
    logloss: float | None
    auc: float | None
    gauc: float | None
    gauc_impressions: int

    def named(self, prefix: str = "") -> dict[str, float | int | None]:
        """Return the values by name, each with `prefix` before it."""
        return {prefix + name: value for name, value in asdict(self).items()}


def measure(logit_N: Float, label_N: Float, group_N: Int) -> Metrics:
    """Measure N impressions; `group_N` is the user of each. Order N log N."""
    gauc, gauc_impressions = grouped_auc(logit_N, label_N, group_N)
    return Metrics(
        impressions=len(label_N),
        clicks=int(label_N.sum()),
        logloss=log_loss(logit_N, label_N),
        auc=auc(logit_N, label_N),
        gauc=gauc,
        gauc_impressions=gauc_impressions,
    )


def log_loss(logit_N: Float, label_N: Float) -> float | None:
    """Compute mean binary cross entropy in nats, of logits: exact where a probability rounds to 0 or 1.

    None if empty.
    """
    if len(label_N) == 0:
        return None
    logit, label = torch.from_numpy(np.asarray(logit_N, np.float64)), torch.from_numpy(np.asarray(label_N, np.float64))
    return float(torch.nn.functional.binary_cross_entropy_with_logits(logit, label))


def auc(score_N: Float, label_N: Float) -> float | None:
    """Compute the area under the ROC curve; None with one class only."""
    return grouped_auc(score_N, label_N, np.zeros(len(label_N), np.int64))[0]


def grouped_auc(score_N: Float, label_N: Float, group_N: Int) -> tuple[float | None, int]:
    """Compute GAUC and the number of impressions that it counts; None and 0 when no group has both classes."""
    groups = auc_of_groups(score_N, label_N, group_N)
    counted = int(groups.impressions_G.sum())
    if counted == 0:
        return None, 0
    return float((groups.impressions_G * groups.auc_G).sum() / counted), counted


@dataclass(frozen=True)
class GroupAucs:
    """The groups that have both classes, ascending: their value of `group_N`, impressions and AUC."""

    group_G: Int
    impressions_G: Int
    auc_G: Float


def auc_of_groups(score_N: Float, label_N: Float, group_N: Int) -> GroupAucs:
    """Compute the AUC of each group by itself. Order N log N."""
    if len(label_N) == 0:
        return GroupAucs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    order_N = np.lexsort((score_N, group_N))
    score_N, label_N, group_N = score_N[order_N], np.asarray(label_N, np.float64)[order_N], group_N[order_N]
    new_group_N = np.r_[True, group_N[1:] != group_N[:-1]]
    starts_G = np.flatnonzero(new_group_N)
    impressions_G = np.diff(np.r_[starts_G, len(label_N)])
    clicks_G = np.add.reduceat(label_N, starts_G)
    rank_N = _mid_ranks(score_N, new_group_N) - np.repeat(starts_G, impressions_G)
    wins_G = np.add.reduceat(rank_N * label_N, starts_G) - clicks_G * (clicks_G + 1) / 2
    pairs_G = clicks_G * (impressions_G - clicks_G)
    both_G = pairs_G > 0
    return GroupAucs(group_N[starts_G[both_G]], impressions_G[both_G], wins_G[both_G] / pairs_G[both_G])


def _mid_ranks(score_N: Float, new_group_N: Bool) -> Float:
    """1-based ranks along sorted scores; a run of equal scores within one group shares the mean of its ranks."""
    starts_T = np.flatnonzero(new_group_N | np.r_[True, score_N[1:] != score_N[:-1]])
    ends_T = np.r_[starts_T[1:], len(score_N)]
    return np.repeat((starts_T + 1 + ends_T) / 2, ends_T - starts_T)
