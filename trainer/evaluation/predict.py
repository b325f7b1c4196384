"""Predictions of a run for every test impression, as arrays: what metrics, slices and comparisons start from."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.comm import Comm, SoloComm
from trainer.errors import TrainerError
from trainer.evaluation.impressions import Impressions, read_impressions
from trainer.evaluation.opening import Opened, Source, open_source
from trainer.samples.prefetch import ReadAhead

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """Logits of N impressions, and what is known of them, in the order of the sample files."""

    logit_N: Float
    impressions: Impressions


def predict_run(
    folder: Path | str,
    comm: Comm | None = None,
    *,
    checkpoint: str | None = None,
    samples: str | None = None,
    store: str | None = None,
) -> Predictions:
    """The predictions of the run in `folder` for its test samples, or for those of `samples`; see `open_source`.

    One rank where no `comm` is given, else on all of its ranks, the same on each.
    """
    comm = comm or SoloComm()
    with contextlib.closing(open_source(Source(Path(folder), checkpoint, samples, store), comm)) as opened:
        impressions = read_impressions(comm, opened.test, opened.run.schema)
        return Predictions(predict(opened), impressions)


def predict(opened: Opened) -> Float:
    """Logits of all test impressions (N,), the same on every rank; every rank calls it. Raises TrainerError."""
    run = opened.run
    with contextlib.closing(ReadAhead(opened.reader.batches(), run.config.data.prefetch_batches)) as ahead:
        own = np.concatenate([np.empty(0), *(run.engine.predict(each) for each in run.engine.prepared(ahead))])
    logit_N: Float = run.comm.allgather(torch.from_numpy(own), "logits").numpy()
    if len(logit_N) != opened.test.num_samples or not np.isfinite(logit_N).all():
        raise TrainerError("the model's predictions are not finite numbers; try a checkpoint from before")
    return logit_N


def predict_without(opened: Opened, share: float, seed: int) -> Float:
    """Logits (N,) as if this share of all image keys had no feature, in every store that the model reads.

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
    """Which keys have a feature in the store that a field names, (I,); None where the model does not read it."""
    service = opened.run.engine.services.get(store)
    if service is None:
        return None
    held_I = torch.from_numpy(service.partition.contains(key_I).astype(np.int64))
    found: NDArray[np.bool_] = opened.run.comm.allreduce_sum_(held_I, "has_feature").numpy() > 0
    return found
