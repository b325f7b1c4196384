"""Gates of a release: the scores of a run on a new snapshot, and a new model against the one in use.

Of a snapshot, only the rows are read that the impressions name. Two snapshots, or two models, are measured on the same
resamples of users. Two models score the same rows, each with the newest features of its stores. A model is worse where
GAUC falls, or log loss rises, by more than its limit and by more than noise: the interval of the paired difference,
over users, is on that side of zero. So a small day, on which nothing can be told, stops no model that is as good.
"""

from dataclasses import dataclass, replace

import numpy as np

from featurestore.errors import SnapshotNotFoundError, UserError
from featurestore.keys import Int64Array
from featurestore.published.channels import VersionName
from featurestore.published.paths import RunPath
from featurestore.snapshot import Snapshot
from featurestore.store import FeatureStore
from featurestore.upkeep.promotion import GateLimits, GateResult
from trainer.comm import Comm, SoloComm
from trainer.compat.check import drawn_batches, keys_of, score
from trainer.errors import CheckpointError, ConfigError, DataNotFoundError
from trainer.evaluation.bootstrap import LEVEL
from trainer.evaluation.compare import Difference, compare
from trainer.evaluation.predict import Predictions
from trainer.evaluation.slices import Impressions, read_impressions
from trainer.runs.saved import TEST, SavedRun, open_test, read_run
from trainer.samples.reader import SampleIndex, open_index


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


MAX_MODEL_GAUC_LOSS, MAX_MODEL_LOGLOSS_RISE = 0.002, 0.002
"""Of a new model, against the one in use."""
MOST_ROWS = 200_000
"""Evaluation rows that are scored; of more, about as many are drawn."""
_GATES = (("gauc", MAX_MODEL_GAUC_LOSS, 1), ("logloss", MAX_MODEL_LOGLOSS_RISE, -1))
"""Metric, limit, and the sign of a better value."""
_SAME_DRAW = {"data": {"shuffle_window_groups": 128}, "train": {"eval_batch_size": 8192}}


@dataclass(frozen=True, kw_only=True)
class RunInUse:
    """The run whose model is in use: its folder, the checkpoint that was published and its digest."""

    folder: RunPath
    checkpoint: str
    digest: str


def gate_model(
    folder: RunPath, checkpoint: str | None, in_use: RunInUse, *, store_version: VersionName | None = None
) -> list[GateResult]:
    """Compare the run in `folder` with the one in use on its evaluation rows; what cannot be compared does not hold.

    `store_version`: the snapshot of the new run's first store. For one rank.
    """
    try:
        return _compared(read_run(folder, checkpoint), in_use, store_version, SoloComm())
    except UserError as failure:
        text = f"it cannot be compared with the model in use: {failure}"
        return [GateResult(gate="comparison", value=None, limit=0, holds=False, text=text)]


def _compared(ours: SavedRun, in_use: RunInUse, store_version: VersionName | None, comm: Comm) -> list[GateResult]:
    if ours.digest == in_use.digest:
        return [GateResult(gate="comparison", value=0, limit=0, holds=True, text="it is the checkpoint that is in use")]
    theirs = read_run(in_use.folder, in_use.checkpoint)
    if theirs.digest != in_use.digest:
        raise CheckpointError(f"{theirs.path} has been trained again since it was published")
    if ours.config.data.test_days == []:
        raise DataNotFoundError(
            f"{ours.folder} has no evaluation rows yet; name an earlier day's run, or wait for the next day's samples"
        )
    rows = open_test(comm, ours.config, ours.schema, None)
    same = open_index(comm, ours.config.data.samples, TEST, theirs.schema, ours.config.data.test_days)
    new, old = _predictions(ours, rows, store_version, comm), _predictions(theirs, same, None, comm)
    found = compare([new], [old], metrics=[metric for metric, _, _ in _GATES])
    where = f"{len(new.logit_N):,} impressions of {', '.join(ours.config.data.test_days or ()) or 'the test samples'}"
    return [_result(found[metric], limit, sign, where) for metric, limit, sign in _GATES]


def _predictions(saved: SavedRun, index: SampleIndex, version: VersionName | None, comm: Comm) -> Predictions:
    """Score the rows; those drawn of many are the same for every run."""
    drawn = replace(saved, config=saved.config.changed(**_SAME_DRAW))
    batches = drawn_batches(drawn, index, None if index.num_samples <= MOST_ROWS else MOST_ROWS)
    versions = {place.name: version if number == 0 else None for number, place in enumerate(drawn.places)}
    snapshots = {place.name: drawn.snapshot(place, versions[place.name]) for place in drawn.places}
    ad = drawn.schema.new_ad_field
    rows = Impressions(
        label_N=np.concatenate([batch.label_B for batch in batches]),
        user_N=np.concatenate([batch.group_id_B for batch in batches]),
        ad_N=np.concatenate([batch.fields[ad].values_N for batch in batches]),
        image_N=None,
        history_N=None,
        time_s_N=None,
    )
    return Predictions(score(drawn, snapshots, batches, comm).logit_N, rows)


def _result(found: Difference, limit: float, sign: int, where: str) -> GateResult:
    if found.value is None or found.low is None or found.high is None or found.ours is None or found.baseline is None:
        text = f"{found.metric} of {where} has no interval: fewer than ten users with and without a click"
        return GateResult(gate=found.metric, value=None, limit=limit, holds=False, text=text)
    best = found.high if sign > 0 else found.low
    holds = sign * found.value >= -limit or sign * best >= 0
    text = (
        f"{found.metric} is {found.ours:.4f}, that of the model in use {found.baseline:.4f}: {found.value:+.4f} "
        f"({LEVEL:.0%} interval {found.low:+.4f} to {found.high:+.4f}) on {where}"
    )
    return GateResult(gate=found.metric, value=found.value, limit=limit, holds=holds, text=text)
