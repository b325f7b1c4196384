"""Other ways to bring images into the model: E and the model alone, and features from a server.

- `Compute`: the work that no trainer can avoid, in isolation. E takes the rows as the store has them: to make numbers
  of them that its products can take is its part.
- `StoreInServer`: features lie with their owners as with ours, but travel raw, and E runs where they are asked for. A
  rank asks for each image of its part of the batch once; those of the next step come while this one computes.

Letters of shapes as in trainer/samples/reader.py.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from featurestore.keys import Int64Array, owner_of, shard_of
from featurestore.lookup.ondevice import Gathered, as_tensor
from featurestore.lookup.partition import FeaturePartition
from trainer.exchange.exchange import Exchange, KeyRequest
from trainer.exchange.routing import bucketize_by_owner, unique
from trainer.exchange.vectors import FieldVectors
from trainer.optim import DenseOptimizer, rates_at
from trainer.runs.open import Run
from trainer.samples.columns import ranges
from trainer.samples.reader import Batch, Jagged
from trainer.schema.fields import Field
from trainer.stages import ReadAhead

Images = Mapping[str, FieldVectors]
ImagePath = Callable[[Batch], Images]


class Model:
    """One rank's model. `image_model`: what makes vectors of images, its parameters are trained along."""

    def __init__(self, run: Run, image_model: nn.Module) -> None:
        engine = run.engine
        self.run, self.comm, self.net = run, run.comm, engine.model
        self.content: list[Field] = [field for field in engine.fields if field.kind == "content"]
        self._optim = run.config.optim
        parts = nn.ModuleDict({"model": self.net, "images": image_model})
        trained = {name: parameter for name, parameter in parts.named_parameters() if parameter.requires_grad}
        self._dense = DenseOptimizer(run.comm, trained, self._optim)
        self.ids = Exchange(
            run.comm, engine.id_sources, {field.name: field.table_name for field in engine.fields if field.is_id}
        )
        self._steps = 0

    def batches(self) -> Iterator[Batch]:
        """Yield this rank's batches as the trainer has them, read ahead, epoch after epoch without end."""
        for epoch in itertools.count():
            with closing(ReadAhead(self.run.train_reader.batches(epoch))) as ahead:
                yield from ahead

    def loss(self, batch: Batch, vectors: Images) -> Tensor:
        """Compute this rank's part of the mean loss over the global batch."""
        logit_B = self.net(vectors, {}, torch.from_numpy(batch.group_of_sample_B))
        label_B = torch.from_numpy(batch.label_B)
        return functional.binary_cross_entropy_with_logits(logit_B, label_B, reduction="sum") / batch.global_samples

    def unique_keys(self, batch: Batch) -> tuple[Int64Array, Int64Array]:
        """Return the different images of the content fields, (U,), and the place of each of their N values, (N,)."""
        return unique(np.concatenate([batch.fields[field.name].values_N for field in self.content]))

    def images(self, batch: Batch, visual_UV: Tensor, index_N: Tensor) -> Images:
        """Make the content fields, whose values, one field after the other, are rows `index_N` of `visual_UV`."""
        fields = {field.name: batch.fields[field.name] for field in self.content}
        places = torch.split(index_N, [len(jagged.values_N) for jagged in fields.values()])
        return {
            name: FieldVectors(visual_UV, place_N, torch.from_numpy(jagged.lengths_M.astype(np.int64)))
            for (name, jagged), place_N in zip(fields.items(), places, strict=True)
        }

    def request(self, batch: Batch) -> KeyRequest:
        """Exchange the keys of the ID fields; needs no weights, so it may run a step ahead in a thread."""
        return self.ids.request(batch.fields, "step")

    def train_step(self, batch: Batch, request: KeyRequest, image_path: ImagePath) -> float:
        """Forward, backward and update; the loss over the global batch."""
        self.zero_grad()
        loss = self.loss(batch, {**self.ids.vectors(request), **image_path(batch)})
        self.note(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        self.ids.release(request)
        return self.update()

    def zero_grad(self) -> None:
        """Clear the gradients before a backward that `update` follows."""
        self._dense.zero_grad()

    def note(self, loss: Tensor) -> None:
        """Take the loss over this rank's samples, before a backward that `update` follows."""
        self._dense.note(loss)

    def update(self) -> float:
        """Do one step of both optimisers after backward, and return the loss over the global batch."""
        rates = rates_at(self._optim, self._steps)
        self._dense.start_reduction()
        loss, _ = self._dense.outcome()
        self.run.engine.step_rows(rates)
        self._dense.finish_reduction()
        self._steps += 1
        self._dense.step(rates, self._steps)
        return loss


def per_sample(batch: Batch, fields: tuple[Field, ...]) -> Batch:
    """Return the same samples, each with a user side of its own (G = B), as where samples do not come in groups."""
    widened = dict(batch.fields)
    for field in fields:
        if field.side == "user" and field.name in widened:
            jagged = batch.fields[field.name]
            starts_G = np.cumsum(jagged.lengths_M, dtype=np.int64) - jagged.lengths_M
            lengths_B = jagged.lengths_M[batch.group_of_sample_B]
            places_N = ranges(starts_G[batch.group_of_sample_B], lengths_B.astype(np.int64))
            widened[field.name] = Jagged(jagged.values_N[places_N], lengths_B)
    return replace(batch, fields=widened, group_of_sample_B=np.arange(batch.num_samples))


def occurrences(vectors_NV: Tensor, lengths_M: NDArray[np.int64]) -> FieldVectors:
    """Make a field whose N values have a vector each, whatever of them are the same image."""
    return FieldVectors(vectors_NV, torch.arange(len(vectors_NV)), torch.from_numpy(lengths_M.astype(np.int64)))


class Compute:
    """Counts the time of the matrix products and of the worker model alone; the rest is done beside the clock."""

    ahead = False

    def __init__(self, run: Run) -> None:
        (self._service,) = run.engine.services.values()
        self.model = Model(run, self._service)
        self._batches = self.model.batches()
        self._memory = torch.empty(0, self._service.partition.dim, dtype=self._service.model.compute_dtype)

    def prepare(self) -> Batch:
        """Prepare the trainer's next batch."""
        return next(self._batches)

    def step(self, batch: Batch) -> tuple[float, float]:
        """Return the loss, and the seconds of E's and the worker model's forward and backward."""
        keys_U, inverse_N = self.model.unique_keys(batch)
        features_UD = as_tensor(self._service.partition.lookup(keys_U).features_UD)
        request = self.model.request(batch)
        ids = self.model.ids.vectors(request)
        rows = {id(field.vectors_UV): field.vectors_UV for field in ids.values()}
        leaves = {each: rows_UV.detach().requires_grad_() for each, rows_UV in rows.items()}
        vectors = {
            name: FieldVectors(leaves[id(field.vectors_UV)], field.index_N, field.lengths_M)
            for name, field in ids.items()
        }
        self.model.zero_grad()
        start = time.perf_counter()
        visual_UV = self._service.embed(Gathered(self._numbers(features_UD), None))
        loss = self.model.loss(batch, {**vectors, **self.model.images(batch, visual_UV, torch.from_numpy(inverse_N))})
        self.model.note(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        seconds = time.perf_counter() - start
        torch.autograd.backward(list(rows.values()), [leaves[each].grad for each in rows])
        self.model.ids.release(request)
        return self.model.update(), seconds

    def _numbers(self, features_UD: Tensor) -> Tensor:
        """Return what E's first product takes, in memory that is used again; the features themselves if of its type."""
        if features_UD.dtype == self._memory.dtype:
            return features_UD
        self._memory = _with_room(self._memory, len(features_UD))
        return self._service.model.numbers(features_UD, out=self._memory[: len(features_UD)])


@dataclass(frozen=True)
class Fetched:
    """A batch and what E takes of its images: value n of its content fields, side by side, is row `index_N[n]`."""

    batch: Batch
    request: KeyRequest
    numbers_UD: Tensor
    index_N: Tensor


class StoreInServer:
    """One rank. The features of a step come in one alltoall, after that of their keys."""

    ahead = True

    def __init__(self, run: Run) -> None:
        (self._service,), (partition,) = run.engine.services.values(), run.partitions.values()
        self.model = Model(run, self._service)
        self._partition: FeaturePartition = partition
        self._comm = run.comm
        self._batches = self.model.batches()
        self._network = network = self._service.model
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
        keys_U, inverse_N = self.model.unique_keys(batch)
        owner_U = owner_of(shard_of(keys_U, self._partition.info.num_shards), self._comm.size)
        asked = bucketize_by_owner(keys_U, inverse_N, owner_U, self._comm.size)
        keys_R, counts_P = self._comm.alltoall(
            torch.from_numpy(asked.keys_U), _splits(asked.send_counts_P), name="raw.keys"
        )
        self._memory.reverse()
        self._memory[0] = _with_room(self._memory[0], len(keys_U))
        numbers_UD = self._memory[0][: len(keys_U)]
        if len(self._looked_up) < len(keys_R):
            self._looked_up = np.empty((len(keys_R) * 9 // 8, self._partition.dim), self._looked_up.dtype)
        features_RD = self._partition.lookup(keys_R.numpy(), out=self._looked_up[: len(keys_R)]).features_UD
        bits_RD = torch.from_numpy(features_RD.view(np.uint8))
        received, _ = self._comm.alltoall(bits_RD, counts_P, name="raw.features")
        self._network.numbers(as_tensor(received.numpy().view(self._looked_up.dtype)), out=numbers_UD)
        return numbers_UD, torch.from_numpy(asked.inverse_N)

    def _images(self, fetched: Fetched) -> Images:
        visual_UV = self._service.embed(Gathered(fetched.numbers_UD, None))
        return self.model.images(fetched.batch, visual_UV, fetched.index_N)


def _with_room(memory: Tensor, num_rows: int) -> Tensor:
    """Return memory for that many rows: this one, or a larger one in its place."""
    return memory if len(memory) >= num_rows else memory.new_empty(num_rows * 9 // 8, memory.shape[1])


def _splits(counts_P: Int64Array) -> Tensor:
    return torch.from_numpy(counts_P.astype(np.int32))
