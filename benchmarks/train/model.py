"""The trainer's model, ID path, losses and optimiser, with another way to come by the vectors of the images.

Every variant of the benchmark takes its batches, its initial values and everything but the images from here, so that
what differs between two of them is the image path alone. Letters of shapes as in trainer/samples/reader.py.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from featurestore.lookup.embedding import EmbeddingModel, EmbeddingService
from featurestore.lookup.ondevice import Gathered
from trainer.exchange.exchange import Exchange, KeyRequest
from trainer.exchange.vectors import FieldVectors
from trainer.optim import DenseOptimizer, rates_at
from trainer.runs.open import Run
from trainer.samples.columns import ranges
from trainer.samples.reader import Batch, Jagged
from trainer.schema import Field
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
        self.run.engine.move_rows(rates)
        self._dense.finish_reduction()
        self._steps += 1
        self._dense.step(rates, self._steps)
        return loss


class StoredFeatures:
    """E on features as the store has them: the numbers that its products take lie in memory that is used again."""

    def __init__(self, service: EmbeddingService) -> None:
        self._service = service
        self._memory: dict[str, Tensor] = {}

    def embed(self, network: str, features_UD: Tensor, place: str) -> Tensor:
        """Make visual vectors (U, V). `place`: features that are there at the same time need another one."""
        return self._service.embed(network, Gathered(self.numbers(network, features_UD, place), None))

    def numbers(self, network: str, features_UD: Tensor, place: str) -> Tensor:
        """Return what the network's first product takes: the features themselves where they are of its type."""
        model = self._service.models[network]
        assert isinstance(model, EmbeddingModel)
        if features_UD.dtype == model.compute_dtype:
            return features_UD
        memory = self._memory.get(place)
        if memory is None or len(memory) < len(features_UD):
            rows = len(features_UD) + len(features_UD) // 8
            memory = self._memory[place] = torch.empty(rows, features_UD.shape[1], dtype=model.compute_dtype)
        return model.numbers(features_UD, out=memory[: len(features_UD)])


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


def occurrences(vectors_NV: Tensor, lengths_M: NDArray[np.int32]) -> FieldVectors:
    """Make a field whose N values have a vector each, whatever of them are the same image."""
    return FieldVectors(vectors_NV, torch.arange(len(vectors_NV)), torch.from_numpy(lengths_M.astype(np.int64)))
