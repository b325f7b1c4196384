"""A canary evaluation: the GAUC of a trained run on test impressions, with the features of two snapshots.

Only the rows are read that the impressions name. Both are measured on the same resamples of users.
"""

from dataclasses import dataclass, replace

from featurestore.errors import SnapshotNotFoundError
from featurestore.keys import Int64Array
from featurestore.published.paths import RunPath
from featurestore.snapshot import Snapshot
from featurestore.store import FeatureStore
from featurestore.upkeep.promotion import GateLimits, GateResult
from trainer.comm import SoloComm
from trainer.compat.scores import drawn_batches, keys_of, score
from trainer.errors import ConfigError
from trainer.evaluation.bootstrap import LEVEL
from trainer.evaluation.compare import Difference, compare
from trainer.evaluation.impressions import read_impressions
from trainer.evaluation.predict import Predictions
from trainer.runs.saved import open_test, read_run


@dataclass(frozen=True, kw_only=True)
class CanaryResult:
    """The difference of GAUC, candidate less stable; of the images of the impressions, how many have no feature."""

    gauc: Difference
    num_impressions: int
    num_images: int
    missing_stable: int
    missing_candidate: int


class Canary:
    """A run, its test samples, and one store of it: evaluated with two snapshots of that store.

    `store`: where the store is; `name`: which of the run's stores it is, by default the first. Other stores of the run
    are read where training read them. For one rank. Raises TrainerError, FeatureStoreError; ConfigError for a run
    without images; AnotherStoreError where the run was trained on another store.
    """

    def __init__(
        self,
        folder: RunPath,
        store: str,
        *,
        checkpoint: str | None = None,
        samples: str | None = None,
        name: str | None = None,
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        self._comm = SoloComm()
        self._saved = read_run(folder, checkpoint, samples)
        places = {place.name: place for place in self._saved.places}
        if not places:
            raise ConfigError(f"{folder} has model.images=none: it needs no store, so it cannot test one")
        if name is not None and name not in places:
            raise ConfigError(f"--name {name}: the content fields of {folder} name {', '.join(places)}")
        self._place = replace(places[name] if name is not None else next(iter(places.values())), url=store)
        self._others = [place for place in places.values() if place.name != self._place.name]
        self._index = open_test(self._comm, self._saved.config, self._saved.schema, samples)
        self._batches = drawn_batches(self._saved, self._index, None)
        self._resamples, self._seed = resamples, seed

    def keys(self) -> Int64Array:
        """Return the keys that the test impressions ask the store for, ascending."""
        return keys_of(self._saved, self._place.name, self._batches)

    def compare(self, candidate: Snapshot, stable: Snapshot) -> CanaryResult:
        """Score all test impressions with both snapshots, and compare."""
        others = {place.name: self._trained_on(place.name, place.url) for place in self._others}
        scored = []
        for snapshot in (candidate, stable):
            chosen = self._saved.snapshot(self._place, snapshot.version)  # refuses what E was not trained on
            scored.append(score(self._saved, {**others, self._place.name: chosen}, self._batches, self._comm))
        impressions = read_impressions(self._comm, self._index, self._saved.schema)
        ours, baseline = (Predictions(each.logit_N, impressions) for each in scored)
        found = compare([ours], [baseline], metrics=("gauc",), resamples=self._resamples, seed=self._seed)
        return CanaryResult(
            gauc=found["gauc"],
            num_impressions=len(impressions.label_N),
            num_images=scored[0].num_images,
            missing_stable=scored[1].num_missing,
            missing_candidate=scored[0].num_missing,
        )

    def gate(self, limits: GateLimits) -> "CanaryGate":
        """Return the gate of this canary."""
        return CanaryGate(self, limits)

    def _trained_on(self, name: str, url: str) -> Snapshot:
        store = FeatureStore.open(url)
        try:
            return store.snapshot(self._saved.state.version_of(name))
        except SnapshotNotFoundError:
            return store.snapshot()


class CanaryGate:
    """The gate `gauc`: at the lower end of its interval the difference is no worse than the limit."""

    def __init__(self, canary: Canary, limits: GateLimits) -> None:
        self._canary, self._limits = canary, limits

    def __call__(self, candidate: Snapshot, stable: Snapshot | None) -> GateResult:
        limit = -self._limits.max_gauc_loss
        if stable is None:
            return GateResult(gate="gauc", value=None, limit=limit, holds=True, text="no stable rows to compare with")
        found = self._canary.compare(candidate, stable)
        low, about = found.gauc.low, f"{found.num_impressions:,} impressions"
        if low is None or found.gauc.high is None:
            text = f"GAUC of {about} has no interval: fewer than ten users with and without a click"
            return GateResult(gate="gauc", value=None, limit=limit, holds=False, text=text)
        text = (
            f"lower end of the {LEVEL:.0%} interval of the difference of GAUC, {found.gauc.value:+.5f} ({low:+.5f} to"
            f" {found.gauc.high:+.5f}), from {found.gauc.baseline:.5f} to {found.gauc.ours:.5f} on {about};"
            f" {found.missing_stable:,} and now {found.missing_candidate:,} of {found.num_images:,} images missing"
        )
        return GateResult(gate="gauc", value=low, limit=limit, holds=low >= limit, text=text)
