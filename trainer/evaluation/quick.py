"""The few metrics that a run reports of its test samples: every rank predicts its part, rank 0 measures the whole."""

from collections.abc import Iterable

import numpy as np
import torch

from trainer.comm import Comm
from trainer.errors import TrainerError
from trainer.evaluation.metrics import measure
from trainer.samples.batch import Batch
from trainer.samples.columns import Index

Metrics = dict[str, float | int | None]


def evaluate(comm: Comm, predicted: Iterable[tuple[Batch, np.ndarray]], known_ads: Index, new_ad_field: str) -> Metrics:
    """Metrics of all test impressions, and under `new_ad_…` of those whose ad is in no training sample.

    `predicted`: this rank's batches, each with its logits. `known_ads`: sorted values of `new_ad_field` in training.
    Every rank calls this and has equally many batches. Raises TrainerError where a prediction is not finite.
    """
    predictions = []
    for batch, logit_B in predicted:
        ad_B = batch.fields[new_ad_field].values_N
        at_B = np.minimum(np.searchsorted(known_ads, ad_B), len(known_ads) - 1)
        predictions.append((logit_B, batch.label_B, batch.group_id_B, known_ads[at_B] != ad_B))
    logit_N, label_N, user_N, new_N = (np.concatenate(column) for column in zip(*predictions, strict=True))
    real_N2 = comm.allgather(
        torch.from_numpy(np.stack([logit_N.astype(np.float64), label_N], axis=1)), "scores"
    ).numpy()
    whole_N2 = comm.allgather(torch.from_numpy(np.stack([user_N, new_N.astype(np.int64)], axis=1)), "users").numpy()
    if not np.isfinite(real_N2).all():
        raise TrainerError("the model's predictions are not finite numbers; try a lower optim.lr")
    return comm.broadcast_object(_measure(real_N2, whole_N2) if comm.rank == 0 else {})


def _measure(real_N2: np.ndarray, whole_N2: np.ndarray) -> Metrics:
    new_N = whole_N2[:, 1] == 1
    everything = measure(real_N2[:, 0], real_N2[:, 1], whole_N2[:, 0])
    new_ads = measure(real_N2[new_N, 0], real_N2[new_N, 1], whole_N2[new_N, 0])
    return everything.named() | new_ads.named("new_ad_")
