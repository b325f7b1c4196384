"""Scores of test impressions by a run with the features of one snapshot or another, without a rank's cache of a store.

Of a store of any size only the rows are read that the impressions name: they go into a small store of their own.
Letters of shapes: N impressions, U unique keys.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.format.rows import FeatureRows
from featurestore.identity import SnapshotId
from featurestore.keys import Int64Array, shard_of
from featurestore.snapshot import Snapshot
from featurestore.store import FeatureStore
from trainer.comm import Comm
from trainer.engine.machine import share_machine
from trainer.errors import TrainerError
from trainer.evaluation.metrics import log_loss
from trainer.models.fields import used_fields
from trainer.runs.saved import SavedRun, with_rows
from trainer.runs.stores import open_partition
from trainer.samples.batch import Batch
from trainer.samples.reader import SampleIndex, SampleReader

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
    for file in (info.codec, info.reduction):
        if file is not None:
            store.storage.write_bytes(file.path, snapshot.storage.read_bytes(file.path))
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
