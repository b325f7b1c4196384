"""Vectors of a trained two-tower run: of ads for an index, and of the users of samples."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trainer.errors import ConfigError
from trainer.exchange.exchange import FieldVectors
from trainer.models.nets.two_tower import TwoTower
from trainer.prerank.ads import Ads
from trainer.prerank.artifact import IndexOrigin
from trainer.runs.saved import TrainedRun, finite
from trainer.samples.batch import Batch

Vectors = NDArray[np.float32]


def towers(trained: TrainedRun) -> TwoTower:
    """Return the run's two towers. Raises ConfigError where it has another model."""
    model = trained.engine.model
    if not isinstance(model, TwoTower):
        raise ConfigError(
            f"{trained.saved.folder} has model.base={trained.config.model.base}: it has no vector of an ad; "
            "train one with model.base=two_tower"
        )
    return model


def origin_of(trained: TrainedRun) -> IndexOrigin:
    """Describe the vectors of this run and checkpoint for an index."""
    return IndexOrigin(
        run=trained.saved.folder.name,
        checkpoint=trained.saved.path.name,
        checkpoint_digest=trained.saved.digest,
        key_column=trained.schema.new_ad_column,
        bias=float(towers(trained).bias.detach()),
        stores={name: partition.snapshot_id for name, partition in trained.partitions.items()},
    )


def ad_vectors(
    trained: TrainedRun, ads: Ads, batch_size: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Vectors:
    """Compute the vectors of all ads, (N, W) float32; for a run opened by one rank.

    `progress` gets ads done and all of them. Raises TrainerError where a vector is not finite.
    """
    model = towers(trained)

    def network(fields: Mapping[str, FieldVectors], dense: Mapping[str, Tensor], _: Tensor) -> Tensor:
        return model.ad_vectors(fields, dense)

    parts = [np.empty((0, model.width))]
    for batch in ads.batches(trained.schema, model.ad_fields, batch_size):
        parts.append(trained.engine.compute(trained.engine.prepare(batch, "eval"), network))
        progress(sum(map(len, parts)), len(ads.keys_N))
    return finite(np.concatenate(parts).astype(np.float32))


def user_vectors(trained: TrainedRun, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Vectors]]:
    """Give each batch with the vectors of its groups, (G, W) float32. All ranks take equally many."""
    model = towers(trained)

    def network(fields: Mapping[str, FieldVectors], dense: Mapping[str, Tensor], _: Tensor) -> Tensor:
        return model.user_vectors(fields, dense)

    for batch in batches:
        yield batch, finite(trained.engine.compute(trained.engine.prepare(batch, "eval"), network).astype(np.float32))
