"""Predictions of a run for every test impression, as arrays; and the few metrics of them that a run itself reports."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from featurestore.published.channels import VersionName
from featurestore.published.paths import RunPath, run_path
from trainer.comm import Comm, SoloComm
from trainer.errors import TrainerError
from trainer.evaluation.bootstrap import Float
from trainer.evaluation.impressions import Impressions, places, read_impressions
from trainer.evaluation.metrics import measure
from trainer.runs.saved import Opened, RunSource, open_source
from trainer.samples.batch import Batch
from trainer.samples.columns import Index
from trainer.samples.prefetch import ReadAhead

Metrics = dict[str, float | int | None]


@dataclass(frozen=True)
class Predictions:
    """Logits of N impressions, and what is known of them, in the order of the sample files."""

    logit_N: Float
    impressions: Impressions
    notes: tuple[str, ...] = ()
    """What a reader of the figures should know."""
    is_new_ad_N: NDArray[np.bool_] | None = None
    """Whether the ad is in none of the run's training samples; None where that was not looked up."""


def predict_run(
    folder: RunPath | str,
    comm: Comm | None = None,
    *,
    checkpoint: str | None = None,
    samples: str | None = None,
    store: str | None = None,
    store_version: VersionName | None = None,
) -> Predictions:
    """Predict by the run in `folder` for its test samples, or for those of `samples`; see `open_source`.

    One rank where no `comm` is given, else on all of its ranks, the same on each.
    """
    comm = comm or SoloComm()
    source = RunSource(run_path(folder), checkpoint, samples, store, store_version)
    with contextlib.closing(open_source(source, comm)) as opened:
        impressions = read_impressions(comm, opened.test, opened.run.schema)
        logit_N = predict(opened)
        missing = opened.saved.notes_on_missing(opened.run.missing_lookups())
        is_new_ad_N = ~places(opened.run.known_ads, impressions.ad_N)[1]
        return Predictions(logit_N, impressions, (*opened.notes, *missing), is_new_ad_N)


def predict(opened: Opened) -> Float:
    """Predict logits of all test impressions (N,), the same on every rank; all call it. Raises TrainerError."""
    run = opened.run
    with contextlib.closing(ReadAhead(opened.reader.batches(), run.config.data.prefetch_batches)) as ahead:
        own = np.concatenate([np.empty(0), *(run.engine.predict(each) for each in run.engine.prepared(ahead, "eval"))])
    logit_N: Float = run.comm.allgather(torch.from_numpy(own), "logits").numpy()
    if len(logit_N) != opened.test.num_samples or not np.isfinite(logit_N).all():
        raise TrainerError("the model's predictions are not finite numbers; try a checkpoint from before")
    return logit_N


def predict_without(opened: Opened, share: float, seed: int) -> Float:
    """Predict logits (N,) as if this share of all image keys had no feature, in every store that the model reads.

    Keys are chosen by a hash of key and seed: the same at any number of ranks, and a larger share hides all that a
    smaller one hid. They get what the run gives to images without a feature: zeros, or its trained vector.
    """
    partitions = [service.partition for service in opened.run.engine.services.values()]
    for partition in partitions:
        partition.hide(share, seed)
    try:
        return predict(opened)
    finally:
        for partition in partitions:
            partition.hide(0)


def has_feature(opened: Opened, store: str, key_I: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Find which keys have a feature in the store that a field names, (I,); None where the model does not read it."""
    service = opened.run.engine.services.get(store)
    if service is None:
        return None
    held_I = torch.from_numpy(service.partition.contains(key_I).astype(np.int64))
    found: NDArray[np.bool_] = opened.run.comm.allreduce_sum_(held_I, "has_feature").numpy() > 0
    return found


def evaluate(comm: Comm, predicted: Iterable[tuple[Batch, Float]], known_ads: Index, new_ad_field: str) -> Metrics:
    """Measure all test impressions, and under `new_ad_…` those whose ad is in no training sample.

    `predicted`: this rank's batches, each with its logits. `known_ads`: sorted values of `new_ad_field` in training.
    Every rank predicts its part and calls this, rank 0 measures the whole. Raises TrainerError where a prediction is
    not finite.
    """
    parts = []
    for batch, logit_B in predicted:
        is_new_B = ~places(known_ads, batch.fields[new_ad_field].values_N)[1]
        parts.append((logit_B, batch.label_B, batch.group_id_B, is_new_B))
    logit_N, label_N, user_N, new_N = (np.concatenate(column) for column in zip(*parts, strict=True))
    real_N2 = comm.allgather(
        torch.from_numpy(np.stack([logit_N.astype(np.float64), label_N], axis=1)), "scores"
    ).numpy()
    whole_N2 = comm.allgather(torch.from_numpy(np.stack([user_N, new_N.astype(np.int64)], axis=1)), "users").numpy()
    if not np.isfinite(real_N2).all():
        raise TrainerError("the model's predictions are not finite numbers; try a lower optim.lr")
    metrics: Metrics = {}
    if comm.rank == 0:
        for prefix, chosen in {"": slice(None), "new_ad_": whole_N2[:, 1] == 1}.items():
            metrics |= measure(real_N2[chosen, 0], real_N2[chosen, 1], whole_N2[chosen, 0]).named(prefix)
    return comm.broadcast_object(metrics)
