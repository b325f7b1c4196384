"""The work that no trainer can avoid, in isolation: E and the worker model, forward and backward, rows in memory.

E takes the rows as the store has them: to make numbers of them that its products can take is its part, unless
`from_numbers` has that done before the clock runs, as the trainer does it ahead of the step.
"""

import time

import numpy as np
import torch

from benchmarks.train.model import Model, StoredFeatures
from featurestore.lookup.ondevice import as_tensor
from trainer.engine.wiring import model_name
from trainer.exchange.routing import unique
from trainer.exchange.vectors import FieldVectors
from trainer.runs.open import Run
from trainer.samples.reader import Batch


class Compute:
    """Counts the time of the matrix products and of the worker model alone; the rest is done beside the clock."""

    ahead = False

    def __init__(self, run: Run, from_numbers: bool = False) -> None:
        (self._service,) = run.engine.services.values()
        self.model = Model(run, self._service)
        self._batches = self.model.batches()
        self._stored, self._from_numbers = StoredFeatures(self._service), from_numbers
        self._names = {field.name: model_name(field, run.config.model) for field in self.model.content}

    def prepare(self) -> Batch:
        """Prepare the trainer's next batch."""
        return next(self._batches)

    def step(self, batch: Batch) -> tuple[float, float]:
        """Return the loss, and the seconds of E's and the worker model's forward and backward."""
        asked = {}
        for name in dict.fromkeys(self._names.values()):
            fields = [field for field, of in self._names.items() if of == name]
            keys_U, inverse_N = unique(np.concatenate([batch.fields[field].values_N for field in fields]))
            features_UD = as_tensor(self._service.partition.lookup(keys_U).features_UD)
            if self._from_numbers:
                features_UD = self._stored.numbers(name, features_UD, name)
            asked[name] = (features_UD, fields, torch.from_numpy(inverse_N))
        request = self.model.request(batch)
        ids = self.model.ids.vectors(request)
        rows = {id(field.vectors_UV): field.vectors_UV for field in ids.values()}
        leaves = {each: rows_UV.detach().requires_grad_() for each, rows_UV in rows.items()}
        vectors = {
            name: FieldVectors(leaves[id(field.vectors_UV)], field.index_N, field.lengths_M)
            for name, field in ids.items()
        }
        lengths = {name: torch.from_numpy(batch.fields[name].lengths_M.astype(np.int64)) for name in self._names}
        counts = {name: len(batch.fields[name].values_N) for name in self._names}
        self.model.zero_grad()
        start = time.perf_counter()
        for name, (features_UD, fields, index_N) in asked.items():
            visual_UV = self._stored.embed(name, features_UD, name)
            places = torch.split(index_N, [counts[field] for field in fields])
            for field, place_N in zip(fields, places, strict=True):
                vectors[field] = FieldVectors(visual_UV, place_N, lengths[field])
        loss = self.model.loss(batch, vectors)
        self.model.note(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        seconds = time.perf_counter() - start
        torch.autograd.backward(list(rows.values()), [leaves[each].grad for each in rows])
        self.model.ids.release(request)
        return self.model.update(), seconds
