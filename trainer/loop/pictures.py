"""Whether pictures of ads that training has not seen count (model.image_dropout): they are scored with and without.

What E and the networks know by heart of known pictures says nothing of new ones, and no sample of the training can tell
how much that is. So an evaluation scores the ads that are in no training sample twice, and what ranks these better, by
AUC, holds in scoring and serving until another evaluation finds otherwise. Ads with a trained ID row keep their
pictures either way, so only the others tell.
"""

from collections.abc import Callable

import numpy as np
import torch

from trainer.comm import Comm
from trainer.config.config import RunConfig
from trainer.evaluation.metrics import Float
from trainer.evaluation.predict import Metrics
from trainer.models.newads import NewAds

LEAST = 1_000
"""Impressions of ads without a trained row that decide; an evaluation with fewer leaves all as it was."""
_ROUNDING = 1e-5  # two evaluations of the same may differ by it, on a GPU


def can_tell(run: RunConfig) -> bool:
    """Return whether an ad without a trained row is new to E as well: not where E continues and ID rows begin anew."""
    return run.warm_start is None or "images" not in run.warm_parts or "ids" in run.warm_parts


def checked(
    measured: Callable[[], tuple[Metrics, Float]], new_ads: NewAds, comm: Comm, say: Callable[[str], None]
) -> Metrics:
    """Decide by one evaluation whether pictures count, and return its metrics as they are then. All ranks call it.

    `measured`: metrics of all test impressions, the same on every rank, and the logits of this rank's. Costs it twice
    where there are enough new ads. Stopped in between, all stays as it was.
    """
    earlier = new_ads.pictures_count
    metrics, logit_N = measured()
    num_new = int(metrics["new_ad_impressions"] or 0)
    if num_new < LEAST or metrics["new_ad_auc"] is None:
        return metrics
    try:
        new_ads.decide(pictures_count=not earlier)
        others, other_N = measured()
    finally:
        new_ads.decide(pictures_count=earlier)
    differing = (~np.isclose(logit_N, other_N, rtol=_ROUNDING, atol=_ROUNDING)).sum()
    num_telling = int(comm.allreduce_sum_(torch.tensor([int(differing)]), "new ads that tell"))
    counted = f"new ads: {num_telling:,} of {num_new:,} impressions are of ads without a trained ID row"
    if num_telling < LEAST:
        say(f"{counted}, and {LEAST:,} would tell whether their pictures count; that stays as it was")
        return metrics
    found = {earlier: metrics, not earlier: others}
    own, none = (float(found[count]["new_ad_auc"] or 0) for count in (True, False))
    if own != none:
        new_ads.decide(pictures_count=own > none)
    kept = "keep them" if new_ads.pictures_count else "have none"
    say(f"{counted}; AUC {own:.4f} with their pictures, {none:.4f} without; from here on they {kept}")
    return found[new_ads.pictures_count]
