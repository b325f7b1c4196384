"""Store in server: features lie with their owners as with ours, but travel raw, and E runs where they are asked for.

A rank asks for each image of its part of the batch once. Letters of shapes as in trainer/samples/reader.py.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.train.model import Images, Model
from featurestore.keys import owner_of, shard_of
from featurestore.lookup.embedding import EmbeddingModel
from featurestore.lookup.ondevice import Gathered, as_tensor
from featurestore.lookup.partition import FeaturePartition
from trainer.engine.wiring import model_name
from trainer.exchange.exchange import KeyRequest
from trainer.exchange.routing import Int64, bucketize_by_owner, unique
from trainer.exchange.vectors import FieldVectors
from trainer.runs.open import Run
from trainer.samples.reader import Batch


@dataclass(frozen=True)
class Fetched:
    """A batch and what E takes of its images: value n of its content fields, side by side, is row `index_N[n]`."""

    batch: Batch
    request: KeyRequest
    numbers_UD: Tensor
    index_N: Tensor


class StoreInServer:
    """The way "store in server": features come from a server in each step.

    `ahead`: the features of the next step come in a thread while this one computes. `pieces`: the number of alltoalls,
    between which the collectives of the step may pass; Horovod runs one after the other.
    """

    def __init__(self, run: Run, ahead: bool, pieces: int = 1) -> None:
        assert run.partition is not None
        (self._service,) = run.engine.services.values()
        self.model = Model(run, self._service)
        self._partition: FeaturePartition = run.partition
        self._comm, self.ahead, self._pieces = run.comm, ahead, pieces
        self._batches = self.model.batches()
        names = {model_name(field, run.config.model) for field in self.model.content}
        (self._name,) = names  # one E for both sides, so that an image in both is sent once
        network = self._service.models[self._name]
        assert isinstance(network, EmbeddingModel)
        self._network = network
        self._looked_up = np.empty((0, self._partition.dim), self._partition.info.storage_dtype)
        # A step's numbers, and those that come for the next one.
        self._memory = [torch.empty(0, self._partition.dim, dtype=network.compute_dtype) for _ in range(2)]

    def prepare(self) -> Fetched:
        """Prepare the trainer's next batch: exchange its ID keys, and look up its features."""
        batch = next(self._batches)
        return Fetched(batch, self.model.request(batch), *self._fetch(batch))

    def step(self, fetched: Fetched) -> tuple[float, None]:
        """Train on one batch."""
        return self.model.train_step(fetched.batch, fetched.request, lambda _: self._images(fetched)), None

    def _fetch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What E takes of the different images of the batch, (U, D), and the row of each of N values among them."""
        keys_N = np.concatenate([batch.fields[field.name].values_N for field in self.model.content])
        keys_U, inverse_N = unique(keys_N)
        owner_U = owner_of(shard_of(keys_U, self._partition.info.num_shards), self._comm.size)
        asked = bucketize_by_owner(keys_U, inverse_N, owner_U, self._comm.size)
        keys_R, counts_P = self._comm.alltoall(
            torch.from_numpy(asked.keys_U), _splits(asked.send_counts_P), name="raw.keys"
        )
        self._memory.reverse()
        if len(self._memory[0]) < len(keys_U):
            self._memory[0] = torch.empty(len(keys_U) * 9 // 8, self._partition.dim, dtype=self._network.compute_dtype)
        numbers_UD = self._memory[0][: len(keys_U)]
        to_send = _pieces(counts_P.numpy().astype(np.int64), self._pieces)
        to_come = _pieces(asked.send_counts_P, self._pieces)
        for sent_P, coming_P in zip(to_send, to_come, strict=True):
            self._exchange(keys_R.numpy(), sent_P, coming_P, numbers_UD)
        return numbers_UD, torch.from_numpy(asked.inverse_N)

    def _exchange(self, keys_R: Int64, sent_P: list[slice], coming_P: list[slice], numbers_UD: Tensor) -> None:
        """One piece for every rank: of `keys_R` the rows of `sent_P` go out, and numbers come for `coming_P`."""
        keys_C = np.concatenate([keys_R[each] for each in sent_P])
        if len(self._looked_up) < len(keys_C):
            self._looked_up = np.empty((len(keys_C) * 9 // 8, self._partition.dim), self._looked_up.dtype)
        features_CD = self._partition.lookup(keys_C, out=self._looked_up[: len(keys_C)]).features_UD
        splits_P = _splits(np.array([each.stop - each.start for each in sent_P]))
        bits_CD = torch.from_numpy(features_CD.view(np.uint8))
        received, counts_P = self._comm.alltoall(bits_CD, splits_P, name="raw.features")
        features = as_tensor(received.numpy().view(self._looked_up.dtype))
        for rows, part in zip(coming_P, torch.split(features, counts_P.tolist()), strict=True):
            self._network.numbers(part, out=numbers_UD[rows])

    def _images(self, fetched: Fetched) -> Images:
        visual_UV = self._service.embed(self._name, Gathered(fetched.numbers_UD, None))
        fields = [(field.name, fetched.batch.fields[field.name]) for field in self.model.content]
        places = torch.split(fetched.index_N, [len(jagged.values_N) for _, jagged in fields])
        return {
            name: FieldVectors(visual_UV, index_N, torch.from_numpy(jagged.lengths_M.astype(np.int64)))
            for (name, jagged), index_N in zip(fields, places, strict=True)
        }


def _pieces(counts_P: Int64, pieces: int) -> list[list[slice]]:
    """Of rows that lie rank by rank, `counts_P` of each: which rows of every rank are in each piece."""
    ends_P = np.cumsum(counts_P)
    starts_P = ends_P - counts_P
    cuts = [starts_P + counts_P * piece // pieces for piece in range(pieces + 1)]
    return [
        [slice(int(first), int(end)) for first, end in zip(before_P, after_P, strict=True)]
        for before_P, after_P in itertools.pairwise(cuts)
    ]


def _splits(counts_P: Int64) -> Tensor:
    return torch.from_numpy(counts_P.astype(np.int32))
