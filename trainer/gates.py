"""Check of a snapshot for a run, or of a run for another one's place: differences in scores, and their gates.

Scores are of two (run, snapshots) pairs on the same impressions: one run with two snapshots of a store, or two runs,
each with its own stores. Both are measured on the same resamples of users. A metric is worse if it falls (log loss:
rises) by more than its limit and by more than noise, i.e. the interval of the paired difference excludes zero. So a
small day, which cannot show a difference, does not stop a model that is as good. Only the rows that the impressions
name are read from a store, and copied to a small store of their own.

Letters of shapes: N impressions, U unique keys, D feature width.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from featurestore.errors import FeatureStoreError, SnapshotNotFoundError, UserError
from featurestore.format.datafile import FeatureRows
from featurestore.keys import Int64Array, shard_of
from featurestore.published.paths import RunPath
from featurestore.published.versions import VersionName
from featurestore.store import FeatureStore, Snapshot, SnapshotId
from trainer.cli import GateLimits
from trainer.comm import Comm, SoloComm
from trainer.errors import CheckpointError, ConfigError, DataNotFoundError, TrainerError
from trainer.evaluation.bootstrap import LEVEL, Difference, compare, log_loss
from trainer.evaluation.predict import Predictions, gathered
from trainer.models.layers import used_fields
from trainer.problems import Problem
from trainer.runs import checkpoint
from trainer.runs.open import StorePlace, other_features
from trainer.runs.saved import TEST, RunSource, SavedRun, open_at, open_test, read_run
from trainer.samples.index import SampleIndex, open_index
from trainer.samples.reader import Batch, SampleReader

MOST_IMPRESSIONS = 200_000
"""Impressions to score; of more, about as many are drawn, the same for both sides."""
_BATCH, _WINDOW, _SHARDS, _ROWS_A_PUT = 8_192, 250_000, 8, 8_192


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """The finding of one gate; `value` is None if there was nothing to measure."""

    gate: str
    value: float | None = None
    limit: float = 0
    holds: bool
    text: str

    @property
    def failure(self) -> str:
        """The line on why the gate fails: its name, value, limit and text."""
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        return f"gate {self.gate}: {value}, limit {self.limit:g}: {self.text}"


@dataclass(frozen=True)
class Scores:
    """Predictions of one pair, and the number of the impressions' images without a feature."""

    predictions: Predictions
    num_images: int
    num_missing: int


@dataclass(kw_only=True)
class Comparison:
    """Differences of GAUC and log loss, new less old, and results of the gates; empty if there was nothing to compare.

    Against the run's report, only that of log loss, without an interval: a GAUC moves by whole pairs.
    """

    num_impressions: int = 0
    differences: list[Difference] = field(default_factory=list)
    mean_logit_change: float | None = None
    gates: list[GateResult] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """One line for each gate that fails."""
        return [each.failure for each in self.gates if not each.holds]

    def report(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        return {**asdict(self), "holds": not self.failures}


def score(
    saved: SavedRun, snapshots: Mapping[str, Snapshot], index: SampleIndex, comm: Comm, most: int = MOST_IMPRESSIONS
) -> Scores:
    """Score about `most` impressions by the run's checkpoint, with each store's features in the snapshot of its name.

    For one rank. Raises TrainerError where a logit is not finite, and FeatureStoreError.
    """
    batches = _drawn_batches(saved, index, most)
    keys = {place.name: _keys_of(saved, place.name, batches) for place in saved.places}
    with TemporaryDirectory() as folder:
        small = {
            name: _small_store(Path(folder) / name, snapshots[name], keys_U).snapshot() for name, keys_U in keys.items()
        }
        scored = replace(saved, config=saved.config.changed(data={"cache_dir": f"{folder}/cache"}))
        places = [replace(place, url=small[place.name].storage.url) for place in saved.places]
        with contextlib.closing(open_at(scored, comm, places, lambda place: small[place.name])) as opened:
            engine = opened.engine
            predicted = ((batch, engine.predict(engine.prepare(batch, "eval"))) for batch in batches)
            predictions = Predictions(*gathered(comm, predicted, saved.schema))
            num_rows = sum(partition.num_rows for partition in opened.partitions.values())
    images = sum(map(len, keys.values()))
    return Scores(predictions, images, images - num_rows)


def compare_scores(new: Scores, old: Scores, limits: GateLimits) -> Comparison:
    """Compare two pairs. Raises DataError if they did not score the same impressions."""
    differences = compare(new.predictions, old.predictions, metrics=("gauc", "logloss"))
    change_N = np.abs(new.predictions.logit_N - old.predictions.logit_N)
    mean = float(change_N.mean()) if len(change_N) else None
    return _comparison([*differences.values()], len(change_N), mean, limits)


def _comparison(differences: list[Difference], count: int, mean: float | None, limits: GateLimits) -> Comparison:
    """Compare each difference with its limit; an unknown one fails. `mean`: change of logits, None if unknown."""
    where = f"{count:,} impressions"
    where += "" if mean is None else f", whose logits move by {mean:.1e} on average"
    gates = [_gate(each, limits, mean is not None, where) for each in differences]
    return Comparison(num_impressions=count, differences=differences, mean_logit_change=mean, gates=gates)


def _gate(found: Difference, limits: GateLimits, is_paired: bool, where: str) -> GateResult:
    gate, sign = found.metric, 1 if found.metric == "gauc" else -1
    limit = limits.max_gauc_loss if gate == "gauc" else limits.max_logloss_rise
    no_noise = found.low is None or found.high is None
    if found.value is None or (is_paired and no_noise):
        why = "fewer than ten users with and without a click" if is_paired else "the run did not report that of as many"
        text = f"{gate} of {where} cannot be compared: {why}"
        return GateResult(gate=gate, limit=limit, holds=False, text=text)
    holds, noise = sign * found.value >= -limit, ""
    if found.low is not None and found.high is not None:
        holds = holds or sign * (found.high if sign > 0 else found.low) >= 0
        noise = f" ({LEVEL:.0%} interval {found.low:+.5f} to {found.high:+.5f})"
    text = f"{gate} is {found.ours:.5f}, and {found.baseline:.5f} before: {found.value:+.5f}{noise} on {where}"
    return GateResult(gate=gate, value=found.value, limit=limit, holds=holds, text=text)


def gate_model(
    folder: RunPath,
    checkpoint: str | None,
    in_use: RunSource,
    digest: str,
    *,
    store_version: VersionName | None = None,
) -> list[GateResult]:
    """Compare the run in `folder` with the one in use on its evaluation rows; if that is impossible, the gate fails.

    `digest`: that of the checkpoint in use when it was published. Each is scored with the newest features of its
    stores; `store_version`: the snapshot of the new run's first store. For one rank.
    """
    try:
        ours, comm = read_run(folder, checkpoint), SoloComm()
        if ours.digest == digest:
            return [GateResult(gate="comparison", value=0, holds=True, text="it is the checkpoint that is in use")]
        theirs = read_run(in_use.folder, in_use.checkpoint)
        if theirs.digest != digest:
            raise CheckpointError(Problem.TRAINED_SINCE_PUBLISHED, str(theirs.checkpoint))
        if ours.config.data.test_days == []:
            raise DataNotFoundError(Problem.RUN_NOT_EVALUATED, folder)
        rows = open_test(comm, ours.config, ours.schema, None)
        same = open_index(comm, ours.config.data.samples, TEST, theirs.schema, ours.config.data.test_days)
        new = score(ours, _snapshots(ours, store_version), rows, comm)
        return compare_scores(new, score(theirs, _snapshots(theirs, None), same, comm), GateLimits()).gates
    except UserError as failure:
        text = f"it cannot be compared with the model in use: {failure}"
        return [GateResult(gate="comparison", holds=False, text=text)]


def _snapshots(saved: SavedRun, first: VersionName | None) -> dict[str, Snapshot]:
    return {place.name: saved.snapshot(place, None if number else first) for number, place in enumerate(saved.places)}


def _drawn_batches(saved: SavedRun, index: SampleIndex, most: int) -> list[Batch]:
    """Read all impressions, or, if there are more, about `most` from random windows of the files, by a fixed seed."""
    is_drawn = index.num_samples > most
    seed, window = (0, _WINDOW) if is_drawn else (None, 1)
    reader = SampleReader(index, saved.schema, batch_size=min(_BATCH, most), seed=seed, window=window)
    steps = min(reader.steps_per_epoch, -(-most // min(_BATCH, most))) if is_drawn else reader.steps_per_epoch
    batches = reader.batches()
    return [next(batches) for _ in range(steps)]


def _keys_of(saved: SavedRun, store: str, batches: Sequence[Batch]) -> Int64Array:
    """Return all keys of the store's content fields in the batches, ascending."""
    used = used_fields(saved.schema, saved.config.model)
    names = [each.name for each in used if each.kind == "content" and each.store_name == store]
    values = [batch.fields[name].values_N for name in names for batch in batches]
    return np.unique(np.concatenate([np.empty(0, np.int64), *values]))


def _small_store(folder: Path, snapshot: Snapshot, keys_U: Int64Array) -> FeatureStore:
    """Copy the rows of those keys that the snapshot has into a new store."""
    info = snapshot.info
    store = FeatureStore.create(folder, info.model_copy(update={"num_shards": min(_SHARDS, info.num_shards)}))
    if info.reduction is not None:
        store.storage.write_bytes(info.reduction.path, snapshot.storage.read_bytes(info.reduction.path))
    by_shard_U = keys_U[np.argsort(shard_of(keys_U, info.num_shards), kind="stable")]
    for some_U in np.split(by_shard_U, range(_ROWS_A_PUT, len(keys_U), _ROWS_A_PUT)):
        features_UD, found_U = snapshot.find(some_U)
        if found_U.any():
            keys = some_U[found_U]
            store.put(FeatureRows.of([f"key/{key}" for key in keys], features_UD[found_U], keys=keys))
    return store


NETWORK = "network"
"""The gate that --force cannot overrule: the run's E was trained on features of another kind."""


class Check:
    """A run and its test impressions, or those of other `samples`, and a snapshot for its store of this name.

    Other stores of the run are read where training read them. For one rank. Raises ConfigError for a run without images
    or a wrong name of a store, and TrainerError, FeatureStoreError.
    """

    def __init__(
        self,
        saved: SavedRun,
        candidate: Snapshot,
        limits: GateLimits,
        name: str | None = None,
        samples: str | None = None,
    ) -> None:
        self.saved, self.candidate, self.place = saved, candidate, _place(saved, name)
        self.recorded = checkpoint.read_recorded(saved.checkpoint).stores[self.place.name]
        self._limits, self._samples, self._comm = limits, samples, SoloComm()

    def report(self, found: Comparison) -> dict[str, Any]:
        """Return inputs and findings, ready for JSON."""
        return {
            "run": str(self.saved.folder),
            "checkpoint": self.saved.checkpoint.name,
            "store_name": self.place.name,
            "recorded": self.recorded.model_dump(),
            "found": SnapshotId.of(self.candidate).model_dump(),
            **found.report(),
        }

    def compare(self) -> Comparison:
        """Compare the candidate with the snapshot that the run was trained on, which is searched at both addresses.

        If that snapshot is gone, compares log loss with the run's report.
        """
        if self.candidate.manifest.commit_id == self.recorded.commit_id:
            return Comparison()
        if differences := other_features(self.candidate.info, self.saved.state, self.place.name):
            text = "; ".join(differences) + ": its E makes nothing of these"
            return Comparison(gates=[GateResult(gate=NETWORK, holds=False, text=text)])
        try:
            index = open_test(self._comm, self.saved.config, self.saved.schema, self._samples)
        except TrainerError as failure:
            return Comparison(gates=[GateResult(gate="scores", holds=False, text=f"{failure}")])
        before = None
        for url in (self.recorded.url, self.candidate.storage.url):
            with contextlib.suppress(FeatureStoreError):
                snapshot = FeatureStore.open(url).snapshot(self.recorded.version)
                before = snapshot if snapshot.manifest.commit_id == self.recorded.commit_id else before
        # Only of all impressions can the log loss be compared with what the run reported.
        most = max(index.num_samples, 1) if before is None else MOST_IMPRESSIONS
        others = {place.name: self._other_store(place) for place in self.saved.places if place is not self.place}

        def scored(snapshot: Snapshot) -> Scores:
            return score(self.saved, {**others, self.place.name: snapshot}, index, self._comm, most)

        new, old = scored(self.candidate), None if before is None else scored(before)
        if old is None:
            found = _against_reported(self.saved, new, self._limits)
        else:
            found = compare_scores(new, old, self._limits)
        found.gates.insert(0, self._coverage(new, old))
        return found

    def accept(self, found: Comparison, force: str | None) -> str:
        """Let the run's commands use the candidate's store instead of that of its training.

        Returns a description of the change. Raises TrainerError if a gate fails and no `force`, a reason, is given, or
        if the features are of another network.
        """
        if found.failures and (force is None or found.gates[0].gate == NETWORK):
            raise TrainerError(Problem.STORE_NOT_ACCEPTED, found.failures[0])
        path, name, chosen = self.saved.checkpoint, self.place.name, SnapshotId.of(self.candidate)
        figures = {**found.report(), "forced": force}
        entry = checkpoint.AcceptedStore(name=name, recorded=self.recorded, accepted=chosen, figures=figures)
        file = checkpoint.accept(path, entry)
        if file is None:
            return "nothing to accept: it would not be refused"
        return f"no other store any more: {file}" if self.recorded.is_same(chosen) else f"kept in {file}"

    def _coverage(self, new: Scores, old: Scores | None) -> GateResult:
        """Measure the share of the impressions' images that have a row; of a run that stops without one, no fewer."""
        limit, num_found = self._limits.min_coverage, new.num_images - new.num_missing
        share = num_found / new.num_images if new.num_images else 1.0
        holds, text = share >= limit, f"{num_found:,} of {new.num_images:,} images of the impressions have a feature"
        if new.num_missing > (0 if old is None else old.num_missing) and self.saved.missing_in_training == "error":
            holds, text = False, f"{text}, and the run has data.missing=error; add them with crossmedia extract"
        return GateResult(gate="coverage", value=share, limit=limit, holds=holds, text=text)

    def _other_store(self, place: StorePlace) -> Snapshot:
        """Open a store of the run that is not asked about: the snapshot trained on, else the newest."""
        store = FeatureStore.open(place.url)
        try:
            return store.snapshot(self.saved.state.version_of(place.name))
        except SnapshotNotFoundError:
            return store.snapshot()


def _place(saved: SavedRun, name: str | None) -> StorePlace:
    places = {place.name: place for place in saved.places}
    if not places:
        raise ConfigError(Problem.RUN_WITHOUT_STORE, saved.folder)
    if name is not None and name not in places:
        raise ConfigError(Problem.NO_STORE_OF_NAME, name, saved.folder, ", ".join(places))
    return places[name] if name is not None else next(iter(places.values()))


def _against_reported(saved: SavedRun, new: Scores, limits: GateLimits) -> Comparison:
    """Compare with the run's evaluation at the checkpoint's step, where that was on as many test impressions."""
    count, step = len(new.predictions.logit_N), saved.state.step
    same = [each for each in saved.state.history if each["step"] == step and each.get("impressions") == count]
    before: float | None = same[-1]["logloss"] if same else None
    ours = log_loss(new.predictions.logit_N, new.predictions.impressions.label_N.astype(np.float64))
    value = None if ours is None or before is None else ours - before
    found = Difference(metric="logloss", value=value, low=None, high=None, ours=ours, baseline=before, p_value=None)
    return _comparison([found], count, None, limits)
