"""Compatibility: whether a run may use a snapshot, its scores on both, and the report.

Of a store of any size only the rows are read that the impressions name: they go into a small store of their own.
Letters of shapes: N impressions, U unique keys.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import FeatureStoreError, SnapshotNotFoundError
from featurestore.format.rows import FeatureRows
from featurestore.identity import SnapshotId
from featurestore.keys import Int64Array, shard_of
from featurestore.published.channels import VersionName
from featurestore.published.paths import RunPath
from featurestore.snapshot import Snapshot
from featurestore.storage.threads import Progress
from featurestore.store import FeatureStore
from featurestore.upkeep.promotion import Likeness, compare
from trainer.comm import Comm
from trainer.compat import MAX_LOGLOSS_CHANGE, SAMPLE
from trainer.engine.machine import share_machine
from trainer.errors import ConfigError, TrainerError
from trainer.evaluation.bootstrap import log_loss
from trainer.models.layers import used_fields
from trainer.runs import accepted, checkpoint
from trainer.runs.saved import SavedRun, open_test, read_run, with_rows
from trainer.runs.stores import StorePlace, kind_of_features, open_partition, recorded_kind
from trainer.samples.reader import Batch, SampleIndex, SampleReader

Float = NDArray[np.float64]
_SHARDS, _ROWS_A_PUT = 8, 8_192


@dataclass(frozen=True)
class CanaryScores:
    """Logits and labels of N impressions, in the order of the batches, and how many of their images have no feature."""

    logit_N: Float
    label_N: Float
    num_images: int
    num_missing: int

    @property
    def logloss(self) -> float | None:
        """Mean binary cross entropy; None without impressions."""
        return log_loss(self.logit_N, self.label_N)


def drawn_batches(saved: SavedRun, index: SampleIndex, count: int | None) -> list[Batch]:
    """Draw about `count` impressions out of windows of the files that a fixed seed draws; all of them for None."""
    data, size = saved.config.data, saved.config.train.eval_batch_size
    seed, window = (None, 1) if count is None else (0, data.shuffle_window_groups)
    size = size if count is None else min(size, count)
    reader = SampleReader(index, saved.schema, batch_size=size, seed=seed, window_groups=window)
    steps = reader.steps_per_epoch if count is None else min(reader.steps_per_epoch, -(-count // size))
    batches = reader.batches()
    return [next(batches) for _ in range(steps)]


def score(saved: SavedRun, snapshots: Mapping[str, Snapshot], batches: Sequence[Batch], comm: Comm) -> CanaryScores:
    """Score the impressions of `batches` by the run's checkpoint, each store's features from the snapshot of its name.

    For one rank. Raises TrainerError where a logit is not finite, and FeatureStoreError.
    """
    device = share_machine(saved.config, comm)
    with TemporaryDirectory() as folder, contextlib.ExitStack() as opened:
        config = saved.config.changed(data={"cache_dir": f"{folder}/cache"})
        partitions, images, missing = {}, 0, 0
        for place in saved.places:
            keys_U = keys_of(saved, place.name, batches)
            small = _small_store(Path(folder) / place.name, snapshots[place.name], keys_U)
            here = SnapshotId.of(small.snapshot())
            partition = opened.enter_context(open_partition(config, comm, replace(place, url=here.url), here))
            partitions[place.name] = partition
            images, missing = images + len(keys_U), missing + len(keys_U) - partition.num_rows
        engine = with_rows(saved, config, comm, saved.places, partitions, device).engine
        logits: list[Any] = [np.empty(0), *(engine.predict(engine.prepare(batch, "eval")) for batch in batches)]
    logit_N = np.concatenate(logits).astype(np.float64)
    if not np.isfinite(logit_N).all():
        raise TrainerError("the model's predictions are not finite numbers; try a checkpoint from before")
    labels: list[Any] = [np.empty(0), *(batch.label_B for batch in batches)]
    return CanaryScores(logit_N, np.concatenate(labels).astype(np.float64), images, missing)


def keys_of(saved: SavedRun, store: str, batches: Sequence[Batch]) -> Int64Array:
    """Return all that content fields of the store ask for in the batches, ascending."""
    names = [
        each.name
        for each in used_fields(saved.schema, saved.config.model)
        if each.kind == "content" and each.store_name == store
    ]
    values = [batch.fields[name].values_N for name in names for batch in batches]
    return np.unique(np.concatenate([np.empty(0, np.int64), *values]))


def _small_store(folder: Path, snapshot: Snapshot, keys_U: Int64Array) -> FeatureStore:
    """A store with those of the keys that the snapshot has, their features as they are."""
    info = snapshot.info
    store = FeatureStore.create(folder, info.model_copy(update={"num_shards": min(_SHARDS, info.num_shards)}))
    if info.reduction is not None:
        store.storage.write_bytes(info.reduction.path, snapshot.storage.read_bytes(info.reduction.path))
    keys, features, count = [np.empty(0, np.int64)], [np.empty((0, info.dim), info.storage_dtype)], 0
    for some_K in _by_shard(keys_U, info.num_shards):
        features_KD, found_K = snapshot.shard_reader(int(shard_of(some_K[:1], info.num_shards)[0])).features(some_K)
        keys.append(some_K[found_K])
        features.append(features_KD[found_K])
        count += len(keys[-1])
        if count >= _ROWS_A_PUT:
            _put(store, keys, features)
            keys, features, count = keys[:1], features[:1], 0
    _put(store, keys, features)
    return store


def _by_shard(keys_U: Int64Array, num_shards: int) -> Iterator[Int64Array]:
    """The keys of each shard, some thousands at a time."""
    shard_U = shard_of(keys_U, num_shards)
    for shard in np.unique(shard_U):
        here_K = keys_U[shard_U == shard]
        yield from np.split(here_K, range(_ROWS_A_PUT, len(here_K), _ROWS_A_PUT))


def _put(store: FeatureStore, keys: Sequence[Int64Array], features: Sequence[NDArray[Any]]) -> None:
    keys_K = np.concatenate(keys)
    if len(keys_K):
        uris = [f"key/{key}" for key in keys_K]
        store.put(FeatureRows.of(uris, np.concatenate(features), keys=keys_K))


Relation = Literal["the same snapshot", "the same store", "another store"]
Verdict = Literal["compatible", "not compatible", "unknown"]
# The share of the compared features that may differ: an image that was replaced without a new digest, say.
OTHER_SHARE = 0.001


@dataclass(frozen=True)
class CompatOptions:
    """What to compare, and how much of it: `sample` is the number of rows and of impressions to look at.

    Where the recorded snapshot is gone, all test impressions are scored, as only their whole can be compared with what
    the run reported.
    """

    checkpoint: str | None = None
    store_name: str | None = None
    version: VersionName | None = None
    sample: int = SAMPLE
    max_logloss_change: float = MAX_LOGLOSS_CHANGE


@dataclass(frozen=True)
class ScoreDrift:
    """Log loss of the impressions with the recorded features, and with those here.

    The recorded features' loss may be the one that the run reported. `mean_logit_change` is set where both could be
    scored.
    """

    impressions: int
    before: float | None
    here: float | None
    mean_logit_change: float | None
    images: int
    missing_before: int | None
    missing_here: int

    @property
    def change(self) -> float | None:
        """The relative change of the log loss; None where one of the two is unknown."""
        if self.before is None or self.here is None:
            return None
        return (self.here - self.before) / max(self.before, 1e-30)


@dataclass
class Compatibility:
    """What was found. `recorded`: the snapshot that the run was trained on."""

    run: str
    checkpoint: RunPath
    store_name: str
    recorded: SnapshotId
    found: SnapshotId
    relation: Relation
    kind: str
    can_read_recorded: bool | None = None  # None: not looked, as the network or the snapshot says enough
    rows: Likeness | None = None
    scores: ScoreDrift | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """Compatible where something was compared, and nothing speaks against it."""
        if self.problems:
            return "not compatible"
        scored = self.scores is not None and self.scores.change is not None
        compared = self.rows is not None and self.rows.num_sampled > 0
        return "compatible" if self.relation == "the same snapshot" or scored or compared else "unknown"

    def report(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        rows = {**asdict(self.rows), "gained": self.rows.num_gained, "lost": self.rows.num_lost} if self.rows else None
        scores = {**asdict(self.scores), "change": self.scores.change} if self.scores else None
        return {
            **asdict(self),
            "checkpoint": self.checkpoint.name,
            "recorded": self.recorded.model_dump(),
            "found": self.found.model_dump(),
            "rows": rows,
            "scores": scores,
            "verdict": self.verdict,
        }


def examine(
    folder: RunPath, url: str, options: CompatOptions, comm: Comm, progress: Progress = lambda done, total: None
) -> Compatibility:
    """Compare the store at `url` with the one that the run in `folder` was trained on.

    Raises ConfigError for a run without images or a wrong name of a store, and TrainerError, FeatureStoreError.
    """
    saved = read_run(folder, options.checkpoint)
    place = _place(saved, options.store_name)
    snapshot = FeatureStore.open(url).snapshot(options.version)
    recorded = checkpoint.read_recorded(saved.path).stores[place.name]
    info = snapshot.info
    result = Compatibility(
        run=str(folder),
        checkpoint=saved.path,
        store_name=place.name,
        recorded=recorded,
        found=SnapshotId.of(snapshot).model_copy(update={"url": url}),
        relation=_relation(recorded, SnapshotId.of(snapshot)),
        kind=f"{info.extractor.backbone} {info.extractor.layer}, {info.dim:,} numbers, {info.dtype}",
    )
    result.problems += _kind_differences(saved, place.name, snapshot)
    if result.problems or result.relation == "the same snapshot":
        return result
    before = _still_there(recorded, url)
    result.can_read_recorded = before is not None
    if before is not None:
        result.rows = compare(before, snapshot, options.sample, progress=progress)
        result.problems += _row_problems(result.rows)
    _score(saved, place, snapshot, before, options, comm, result)
    return result


def accept(found: Compatibility) -> str:
    """Let the run's commands take this store for the one that it was trained on, from now on.

    Says what was done for that. Raises TrainerError where something speaks against the store.
    """
    if found.problems:
        raise TrainerError(f"not accepted: {found.problems[0]}")
    if found.relation != "another store":
        back = accepted.withdraw(found.checkpoint, found.store_name, found.recorded)
        return f"no other store any more: {back}" if back else "nothing to accept: it would not be refused"
    figures = {name: found.report()[name] for name in ("rows", "scores", "notes", "verdict")}
    entry = accepted.AcceptedStore(
        name=found.store_name, recorded=found.recorded, accepted=found.found, figures=figures
    )
    return f"kept in {accepted.accept(found.checkpoint, entry)}"


def _place(saved: SavedRun, name: str | None) -> StorePlace:
    places = {place.name: place for place in saved.places}
    if not places:
        raise ConfigError(f"{saved.folder} has model.images=none: it was trained without a store")
    if name is not None and name not in places:
        raise ConfigError(f"--name {name}: the content fields of {saved.folder} name {', '.join(places)}")
    return places[name] if name is not None else next(iter(places.values()))


def _relation(recorded: SnapshotId, found: SnapshotId) -> Relation:
    if recorded.commit_id == found.commit_id:
        return "the same snapshot"
    return "the same store" if recorded.is_same(found) else "another store"


def _kind_differences(saved: SavedRun, name: str, snapshot: Snapshot) -> list[str]:
    theirs = dict(checkpoint.flat(recorded_kind(saved.state, name)))
    mine = dict(checkpoint.flat(kind_of_features(snapshot.info)))
    return [
        f"{each} is {mine.get(each)!r} here, {theirs.get(each)!r} in the checkpoint: its E makes nothing of these"
        for each in sorted(mine.keys() | theirs.keys())
        if mine.get(each) != theirs.get(each)
    ]


def _still_there(recorded: SnapshotId, url: str) -> Snapshot | None:
    """The snapshot that the run was trained on, at either address."""
    for each in (url, recorded.url):
        try:
            snapshot = FeatureStore.open(each).snapshot(recorded.version)
        except FeatureStoreError:
            continue
        if snapshot.manifest.commit_id == recorded.commit_id:
            return snapshot
    return None


def _row_problems(rows: Likeness) -> list[str]:
    if rows.num_old and not rows.num_common:
        return ["no image of the recorded snapshot is in this one"]
    if rows.num_other > OTHER_SHARE * rows.num_sampled:
        share = rows.num_other / rows.num_sampled
        return [f"{share:.1%} of {rows.num_sampled:,} features that were compared are others for the same image"]
    return []


def _score(
    saved: SavedRun,
    place: StorePlace,
    snapshot: Snapshot,
    before: Snapshot | None,
    options: CompatOptions,
    comm: Comm,
    result: Compatibility,
) -> None:
    """Adds the scores of test impressions to `result`, and what speaks against it."""
    try:
        index = open_test(comm, saved.config, saved.schema, None)
    except TrainerError as failure:
        result.notes.append(f"no scores to compare: {failure}")
        return
    batches = drawn_batches(saved, index, None if before is None else options.sample)
    others = {each.name: _other(saved, each, result) for each in saved.places if each.name != place.name}
    here = score(saved, {**others, place.name: snapshot}, batches, comm)
    old = None if before is None else score(saved, {**others, place.name: before}, batches, comm)
    recorded_loss = _reported(saved, len(here.label_N)) if old is None else old.logloss
    if recorded_loss is None:
        result.notes.append("the run has no log loss of these test impressions at this checkpoint to compare with")
    drift = ScoreDrift(
        impressions=len(here.label_N),
        before=recorded_loss,
        here=here.logloss,
        mean_logit_change=None if old is None else _mean_change(old, here),
        images=here.num_images,
        missing_before=None if old is None else old.num_missing,
        missing_here=here.num_missing,
    )
    result.scores = drift
    result.problems += _score_problems(drift, saved, options)


def _other(saved: SavedRun, place: StorePlace, result: Compatibility) -> Snapshot:
    """The snapshot of a store of the run that is not asked about: the one trained on, else the newest, and a note."""
    store, recorded = FeatureStore.open(place.url), saved.state.stores[place.name]
    try:
        snapshot = store.snapshot(saved.state.version_of(place.name))
    except SnapshotNotFoundError:
        snapshot = store.snapshot()
    if SnapshotId.of(snapshot).commit_id != recorded.commit_id:
        result.notes.append(f"store {place.name} is not as in training either: {SnapshotId.of(snapshot).described()}")
    return snapshot


def _score_problems(drift: ScoreDrift, saved: SavedRun, options: CompatOptions) -> list[str]:
    problems = []
    if drift.change is not None and abs(drift.change) > options.max_logloss_change:
        problems.append(
            f"log loss of the test impressions changes by {drift.change:+.2%}, from {drift.before:.5f} to "
            f"{drift.here:.5f}; --max-logloss-change allows {options.max_logloss_change:.2%}"
        )
    if drift.missing_here > (drift.missing_before or 0) and saved.missing_in_training == "error":
        problems.append(
            f"{drift.missing_here:,} of {drift.images:,} images of the test impressions have no feature here, and the "
            "run has data.missing=error; add them with jobs/extract_features.py"
        )
    return problems


def _reported(saved: SavedRun, impressions: int) -> float | None:
    """The log loss that the run found at the checkpoint's step, on as many test impressions."""
    entries: list[Mapping[str, Any]] = [each for each in saved.state.history if each["step"] == saved.state.step]
    if not entries or entries[-1].get("impressions") != impressions:
        return None
    logloss: float | None = entries[-1]["logloss"]
    return logloss


def _mean_change(old: CanaryScores, here: CanaryScores) -> float | None:
    return float(np.abs(here.logit_N - old.logit_N).mean()) if len(old.logit_N) else None


_IDENTITY = {
    "the same snapshot": "the same snapshot that the run was trained on: nothing to compare",
    "the same store": "the same store, another snapshot",
    "another store": "another store than the one that the run was trained on",
}


def lines(found: Compatibility) -> list[str]:
    """Say what was compared with what."""
    recorded = found.recorded.described()
    if found.can_read_recorded is False:
        recorded += " (cannot be read any more)"
    return [
        f"run          {found.run}, {found.checkpoint.name}",
        f"trained on   {recorded}",
        f"found        {found.found.described()}",
        f"features     {found.kind}",
        f"identity     {_IDENTITY[found.relation]}",
    ]


def figures(found: Compatibility) -> list[tuple[str, str]]:
    """List names and values of the table; empty where nothing was compared."""
    return [*_rows(found), *_scores(found)]


def ending(found: Compatibility) -> list[str]:
    """List notes, what speaks against the store, and the verdict."""
    against = [f"against it   {each}" for each in found.problems]
    return [*(f"note         {each}" for each in found.notes), *against, f"verdict      {found.verdict}"]


def _rows(found: Compatibility) -> list[tuple[str, str]]:
    rows = found.rows
    if rows is None:
        return []
    table = [
        ("images before", f"{rows.num_old:,}"),
        ("images here", f"{rows.num_new:,}"),
        ("  gained", f"{rows.num_gained:,}"),
        ("  lost", f"{rows.num_lost:,}"),
        ("  changed (another image under the key)", f"{rows.num_changed:,}"),
        ("features compared, of unchanged images", f"{rows.num_sampled:,}"),
    ]
    if rows.mean_cosine is None or rows.largest_difference is None:
        return table
    return [
        *table,
        ("  equal to the bit", f"{rows.num_equal / rows.num_sampled:.2%}"),
        ("  others", f"{rows.num_other / rows.num_sampled:.2%}"),
        ("  mean cosine", f"{rows.mean_cosine:.6f}"),
        ("  largest difference, of a feature's length", f"{rows.largest_difference:.2e}"),
    ]


def _scores(found: Compatibility) -> list[tuple[str, str]]:
    scores = found.scores
    if scores is None:
        return []
    before = "log loss before" if found.can_read_recorded else "log loss, as the run reported it"
    return [
        ("test impressions scored", f"{scores.impressions:,}"),
        (f"  {before}", _text(scores.before, ".5f")),
        ("  log loss here", _text(scores.here, ".5f")),
        ("  change", _text(scores.change, "+.3%")),
        ("  mean change of a logit", _text(scores.mean_logit_change, ".2e")),
        ("images of these impressions", f"{scores.images:,}"),
        ("  without a feature before", _text(scores.missing_before, ",")),
        ("  without a feature here", f"{scores.missing_here:,}"),
    ]


def _text(value: float | None, form: str) -> str:
    return "not known" if value is None else format(value, form)
