"""Everything that an evaluation reports, measured on one set of resamples: the whole, its slices, bins, the curve."""

from collections.abc import Mapping, Sequence

import numpy as np

from featurestore.keys import sampled
from trainer.evaluation.bootstrap import (
    METRICS,
    Float,
    MetricSums,
    ReliabilitySums,
    Replicates,
    bootstrap,
    interval,
)
from trainer.evaluation.figures import Bin, Figures, Hidden, Measured, SlicedBy
from trainer.evaluation.impressions import Impressions
from trainer.evaluation.slices import Slicing


def measure_all(
    logit_N: Float,
    impressions: Impressions,
    slicings: Sequence[Slicing],
    logits_of_share: Mapping[float, Float],
    *,
    resamples: int,
    seed: int,
) -> Figures:
    """Measure metrics with intervals.

    `logits_of_share`: (N,) for each share of hidden images; hidden by `seed` as well.
    """
    users_U, user_N = np.unique(impressions.user_N, return_inverse=True)
    label_N = impressions.label_N.astype(np.float64)
    reliability = ReliabilitySums(logit_N, label_N, user_N, len(users_U))
    whole = MetricSums(logit_N, label_N, user_N)
    chosen = [(each, name, each.slice_N == at) for each in slicings for at, name in enumerate(each.names)]
    chosen = [(slicing, name, in_N) for slicing, name, in_N in chosen if in_N.any()]
    slices = [MetricSums(logit_N[in_N], label_N[in_N], user_N[in_N]) for _, _, in_N in chosen]
    curve = [MetricSums(each, label_N, user_N) for each in logits_of_share.values()]
    of_bins, of_whole, *rest = bootstrap([reliability, whole, *slices, *curve], len(users_U), resamples, seed)

    sliced_by = {each.name: SlicedBy(each.title, {}) for each in slicings}
    for (slicing, name, _), sums, replicates in zip(chosen, slices, rest[: len(slices)], strict=True):
        sliced_by[slicing.name].slices[name] = _measured(sums, replicates)
    hidden = [
        _hidden(share, impressions, seed, sums, replicates, of_whole)
        for share, sums, replicates in zip(logits_of_share, curve, rest[len(slices) :], strict=True)
    ]
    return Figures(_measured(whole, of_whole), sliced_by, _bins(reliability, of_bins), hidden)


def _measured(sums: MetricSums, replicates: Replicates) -> Measured:
    metrics = {
        name: interval(
            replicates.value_M[at], replicates.draws_RM[:, at], users=sums.users_M[at], pivotal=name == "ece"
        )
        for at, name in enumerate(METRICS)
    }
    return Measured(sums.num_impressions, sums.num_users, sums.num_clicks, metrics)


def _bins(sums: ReliabilitySums, replicates: Replicates) -> list[Bin]:
    count = sums.num_bins
    return [
        Bin(
            int(sums.count_K[at]),
            float(replicates.value_M[at]),
            interval(replicates.value_M[count + at], replicates.draws_RM[:, count + at], users=int(sums.users_K[at])),
        )
        for at in range(count)
    ]


def _hidden(
    share: float,
    impressions: Impressions,
    seed: int,
    sums: MetricSums,
    replicates: Replicates,
    of_whole: Replicates,
) -> Hidden:
    at = METRICS.index("gauc")
    without = sampled(impressions.image_N, share, seed) if impressions.image_N is not None else np.zeros(0, np.bool_)
    change = interval(
        replicates.value_M[at] - of_whole.value_M[at],
        replicates.draws_RM[:, at] - of_whole.draws_RM[:, at],
        users=sums.users_M[at],
    )
    return Hidden(share, int(without.sum()), _measured(sums, replicates).metrics, change)
