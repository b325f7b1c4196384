"""Scores of two (run, snapshots) pairs on the same impressions: differences, and gates on GAUC and log loss.

The pairs are one run with two snapshots of a store, or two runs, each with its own stores. Both are measured on the
same resamples of users. A metric is worse if it falls (log loss: rises) by more than its limit and by more than noise,
i.e. the interval of the paired difference excludes zero. So a small day, which cannot show a difference, does not stop
a model that is as good.

Only the rows that the impressions name are read from a store, and copied to a small store of their own.
Letters of shapes: N impressions, U unique keys, D feature width.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from featurestore.errors import UserError
from featurestore.format.rows import FeatureRows
from featurestore.keys import Int64Array, shard_of
from featurestore.published.channels import VersionName
from featurestore.published.paths import RunPath
from featurestore.snapshot import Snapshot
from featurestore.store import FeatureStore
from trainer.comm import Comm, SoloComm
from trainer.compat import GateLimits, GateResult
from trainer.errors import CheckpointError, DataNotFoundError, TrainerError
from trainer.evaluation.bootstrap import LEVEL
from trainer.evaluation.compare import Difference, compare
from trainer.evaluation.predict import Predictions
from trainer.evaluation.slices import Impressions
from trainer.models.layers import used_fields
from trainer.runs.saved import TEST, SavedRun, open_at, open_test, read_run
from trainer.samples.index import SampleIndex, open_index
from trainer.samples.reader import Batch, SampleReader

MOST_IMPRESSIONS = 200_000
"""Impressions to score; of more, about as many are drawn, the same for both sides."""
_BATCH, _WINDOW_GROUPS, _SHARDS, _ROWS_A_PUT = 8_192, 128, 8, 8_192


@dataclass(frozen=True)
class Scores:
    """Predictions of one pair, and the number of the impressions' images without a feature."""

    predictions: Predictions
    num_images: int
    num_missing: int


@dataclass(frozen=True, kw_only=True)
class ScoreChange:
    """Differences of GAUC and log loss, new less old.

    Against what the run reported, only that of log loss, without an interval: a GAUC moves by whole pairs.
    """

    num_impressions: int
    differences: list[Difference]
    mean_logit_change: float | None


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
        config = saved.config.changed(data={"cache_dir": f"{folder}/cache"})
        places = [replace(place, url=small[place.name].storage.url) for place in saved.places]
        with contextlib.closing(open_at(saved, config, comm, places, lambda place: small[place.name])) as opened:
            engine = opened.engine
            logits: list[Any] = [np.empty(0), *(engine.predict(engine.prepare(batch, "eval")) for batch in batches)]
            num_rows = sum(partition.num_rows for partition in opened.partitions.values())
    logit_N = np.concatenate(logits).astype(np.float64)
    if not np.isfinite(logit_N).all():
        raise TrainerError("the model's predictions are not finite numbers; try an earlier checkpoint")
    images = sum(map(len, keys.values()))
    return Scores(Predictions(logit_N, _impressions(saved, batches)), images, images - num_rows)


def compare_scores(new: Scores, old: Scores) -> ScoreChange:
    """Compare two pairs. Raises DataError if they did not score the same impressions."""
    differences = compare([new.predictions], [old.predictions], metrics=("gauc", "logloss"))
    change_N = np.abs(new.predictions.logit_N - old.predictions.logit_N)
    mean = float(change_N.mean()) if len(change_N) else None
    return ScoreChange(num_impressions=len(change_N), differences=[*differences.values()], mean_logit_change=mean)


def score_gates(change: ScoreChange, limits: GateLimits) -> list[GateResult]:
    """Compare each difference with its limit; an unknown difference fails."""
    is_paired, where = change.mean_logit_change is not None, f"{change.num_impressions:,} impressions"
    if is_paired:
        where = f"{where}, whose logits move by {change.mean_logit_change:.1e} on average"
    return [_gate(each, limits, is_paired, where) for each in change.differences]


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


@dataclass(frozen=True, kw_only=True)
class RunInUse:
    """The run whose model is in use: its folder, the checkpoint that was published and its digest."""

    folder: RunPath
    checkpoint: str
    digest: str


def gate_model(
    folder: RunPath, checkpoint: str | None, in_use: RunInUse, *, store_version: VersionName | None = None
) -> list[GateResult]:
    """Compare the run in `folder` with the one in use on its evaluation rows; if that is impossible, the gate fails.

    Each is scored with the newest features of its stores; `store_version`: the snapshot of the new run's first store.
    For one rank.
    """
    try:
        return _compared(read_run(folder, checkpoint), in_use, store_version, SoloComm())
    except UserError as failure:
        text = f"it cannot be compared with the model in use: {failure}"
        return [GateResult(gate="comparison", holds=False, text=text)]


def _compared(ours: SavedRun, in_use: RunInUse, store_version: VersionName | None, comm: Comm) -> list[GateResult]:
    if ours.digest == in_use.digest:
        return [GateResult(gate="comparison", value=0, holds=True, text="it is the checkpoint that is in use")]
    theirs = read_run(in_use.folder, in_use.checkpoint)
    if theirs.digest != in_use.digest:
        raise CheckpointError(f"{theirs.checkpoint} has been trained again since it was published")
    if ours.config.data.test_days == []:
        raise DataNotFoundError(
            f"{ours.folder} has no evaluation rows yet; name an earlier day's run, or wait for the next day's samples"
        )
    rows = open_test(comm, ours.config, ours.schema, None)
    same = open_index(comm, ours.config.data.samples, TEST, theirs.schema, ours.config.data.test_days)
    new = score(ours, _snapshots(ours, store_version), rows, comm)
    return score_gates(compare_scores(new, score(theirs, _snapshots(theirs, None), same, comm)), GateLimits())


def _snapshots(saved: SavedRun, first: VersionName | None) -> dict[str, Snapshot]:
    versions = [first, *([None] * len(saved.places))]
    return {place.name: saved.snapshot(place, version) for place, version in zip(saved.places, versions, strict=False)}


def _drawn_batches(saved: SavedRun, index: SampleIndex, most: int) -> list[Batch]:
    """Read all impressions, or, if there are more, about `most` from random windows of the files, by a fixed seed."""
    is_drawn = index.num_samples > most
    seed, window = (0, _WINDOW_GROUPS) if is_drawn else (None, 1)
    reader = SampleReader(index, saved.schema, batch_size=min(_BATCH, most), seed=seed, window_groups=window)
    steps = min(reader.steps_per_epoch, -(-most // min(_BATCH, most))) if is_drawn else reader.steps_per_epoch
    batches = reader.batches()
    return [next(batches) for _ in range(steps)]


def _keys_of(saved: SavedRun, store: str, batches: Sequence[Batch]) -> Int64Array:
    """Return all keys of the store's content fields in the batches, ascending."""
    names = [
        each.name
        for each in used_fields(saved.schema, saved.config.model)
        if each.kind == "content" and each.store_name == store
    ]
    values = [batch.fields[name].values_N for name in names for batch in batches]
    return np.unique(np.concatenate([np.empty(0, np.int64), *values]))


def _impressions(saved: SavedRun, batches: Sequence[Batch]) -> Impressions:
    ad, none = saved.schema.new_ad_field, [np.empty(0, np.int64)]
    return Impressions(
        label_N=np.concatenate([np.empty(0, np.float32), *(batch.label_B for batch in batches)]),
        user_N=np.concatenate([*none, *(batch.group_id_B for batch in batches)]),
        ad_N=np.concatenate([*none, *(batch.fields[ad].values_N for batch in batches)]),
    )


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
