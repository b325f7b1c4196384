"""Whether pictures of ads that training has not seen count (model.image_dropout): they are scored with and without.

What E and the networks know by heart of known pictures says nothing of new ones, and no sample of the training can tell
how much that is. So an evaluation scores the ads that are in no training sample twice, and what ranks these better, by
AUC, holds in scoring and serving until the next evaluation with enough of such ads.
"""

from collections.abc import Callable

from trainer.evaluation.predict import Metrics
from trainer.models.newads import NewAds

LEAST = 1_000
"""Impressions of new ads that decide; an evaluation with fewer leaves all as it was."""


def checked(measured: Callable[[], Metrics], new_ads: NewAds, say: Callable[[str], None]) -> Metrics:
    """Decide by one evaluation whether pictures count, and return its metrics as they are then. All ranks call it.

    `measured`: predicts and measures all test impressions, the same on every rank. Costs it twice where there are
    enough new ads. Stopped in between, all stays as it was.
    """
    earlier = new_ads.pictures_count
    found = {earlier: measured()}
    of_new = found[earlier]
    if (of_new["new_ad_impressions"] or 0) < LEAST or of_new["new_ad_auc"] is None:
        return of_new
    try:
        new_ads.decide(pictures_count=not earlier)
        found[not earlier] = measured()
    finally:
        new_ads.decide(pictures_count=earlier)
    own, none = (float(found[count]["new_ad_auc"] or 0) for count in (True, False))
    new_ads.decide(pictures_count=own >= none)
    kept = "keep them" if new_ads.pictures_count else "have none"
    say(f"new ads: AUC {own:.4f} with their pictures, {none:.4f} without; from here on they {kept}")
    return found[new_ads.pictures_count]
