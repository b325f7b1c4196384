"""Store in server: features lie with their owners as with ours, but travel raw, and E runs where they are asked for.

A rank asks for each image of its part of the batch once. Letters of shapes as in trainer/batch.py.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.train.model import Images, Model, StoredFeatures
from featurestore.keys import owner_of, shard_of
from featurestore.partition import FeaturePartition
from trainer.batch import Batch
from trainer.exchange import FieldVectors, Request
from trainer.routing import Int64, bucketize_by_owner, unique
from trainer.run import Run
from trainer.step import model_name


@dataclass(frozen=True)
class Fetched:
    """A batch and the features of its images: value n of its content fields, side by side, is row `index_N[n]`."""

    batch: Batch
    request: Request
    features_UD: Tensor
    index_N: Tensor


class StoreInServer:
    """Two alltoalls for the features. `ahead`: those of the next step run in a thread while this one computes."""

    def __init__(self, run: Run, ahead: bool) -> None:
        assert run.partition is not None
        (service,) = run.engine.services.values()
        self.model, self._stored = Model(run, service), StoredFeatures(service)
        self._partition: FeaturePartition = run.partition
        self._comm, self.ahead = run.comm, ahead
        self._batches = self.model.batches()
        names = {model_name(field, run.config.model) for field in self.model.content}
        (self._name,) = names  # one E for both sides, so that an image in both is sent once
        self._bytes = self._partition.dim * self._partition.info.storage_dtype.itemsize

    def prepare(self) -> Fetched:
        """The trainer's next batch, the exchange of its ID keys, and its features."""
        batch = next(self._batches)
        return Fetched(batch, self.model.request(batch), *self._fetch(batch))

    def step(self, fetched: Fetched) -> tuple[float, None]:
        """Trains on one batch."""
        return self.model.train_step(fetched.batch, fetched.request, lambda _: self._images(fetched)), None

    def _fetch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features of the different images of the batch, (U, D), and the row of each of N values among them."""
        keys_N = np.concatenate([batch.fields[field.name].values_N for field in self.model.content])
        keys_U, inverse_N = unique(keys_N)
        owner_U = owner_of(shard_of(keys_U, self._partition.info.num_shards), self._comm.size)
        asked = bucketize_by_owner(keys_U, inverse_N, owner_U, self._comm.size)
        keys_R, counts_P = self._comm.alltoall(
            torch.from_numpy(asked.keys_U), _splits(asked.send_counts_P), name="raw.keys"
        )
        features_RD = torch.from_numpy(self._partition.lookup(keys_R.numpy()).features_UD).view(torch.uint8)
        received, _ = self._comm.alltoall(features_RD.view(-1, self._bytes), counts_P, name="raw.features")
        return received.view(torch.bfloat16), torch.from_numpy(asked.inverse_N)

    def _images(self, fetched: Fetched) -> Images:
        visual_UV = self._stored.embed(self._name, fetched.features_UD)
        fields = [(field.name, fetched.batch.fields[field.name]) for field in self.model.content]
        places = torch.split(fetched.index_N, [len(jagged.values_N) for _, jagged in fields])
        return {
            name: FieldVectors(visual_UV, index_N, torch.from_numpy(jagged.lengths_M.astype(np.int64)))
            for (name, jagged), index_N in zip(fields, places, strict=True)
        }


def _splits(counts_P: Int64) -> Tensor:
    return torch.from_numpy(counts_P.astype(np.int32))
