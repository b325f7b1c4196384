"""The engine: forward, backward and update of one batch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from featurestore.keys import AnyArray, Float64Array
from featurestore.lookup.ondevice import on_device
from trainer.engine.wiring import EngineParts
from trainer.exchange.exchange import KeyRequest
from trainer.exchange.vectors import FieldVectors, HostLengths
from trainer.optim import Rates, rates_at
from trainer.samples.reader import Batch
from trainer.stages import Kind, StageSequence

# Fields, dense values and the group of each sample in; as trainer.models.ctr.CtrModel.forward.
NetworkPart = Callable[[Mapping[str, FieldVectors], Mapping[str, Tensor], Tensor], Tensor]


@dataclass
class PreparedBatch:
    """A batch whose keys have been exchanged."""

    batch: Batch
    request: KeyRequest


@dataclass(frozen=True)
class StepResult:
    """The metrics of one training step: `loss` is the mean over the global batch, the rest is this rank's."""

    loss: float
    num_samples: int
    learning_rate: float


class Engine(EngineParts):
    """Exchanges the keys of batches, trains on them, and predicts, with the parts of one rank."""

    def prepared(self, batches: Iterator[Batch], kind: Kind = "step") -> Iterator[PreparedBatch]:
        """Exchange the keys of each batch in turn, and gather the rows that their owners need.

        It does not depend on weights, so it may run a step ahead, in a second thread during the step before.
        All ranks ask for batches of one kind in the same order. One that cannot be read, or does not fit the model,
        stops all ranks: this one raises its error, others RemoteRankError.
        """
        while True:
            try:
                batch = next(batches)
                self.model.check(batch)
            except StopIteration:
                return
            except Exception as failure:  # any error: the other ranks are blocked on this rank's keys
                self._exchange.refuse(failure, kind)
            yield PreparedBatch(batch, self._exchange.request(batch.fields, kind))

    def prepare(self, batch: Batch, kind: Kind = "step") -> PreparedBatch:
        """Prepare one batch like `prepared`; all ranks call it."""
        return next(self.prepared(iter([batch]), kind))

    def train_step(self, prepared: PreparedBatch) -> StepResult:
        """Do one training step: forward, backward, one allreduce, both optimisers. All ranks call it.

        The host waits for the device once, for loss and failures, before anything is updated. A rank that failed raises
        its error and the others RemoteRankError; then no parameter and no row has moved.
        """
        batch, request = prepared.batch, prepared.request
        rates = rates_at(self._optim, self.num_steps - self.first_step, self.num_plateaus)
        self._modules.train()
        self._dense.zero_grad()
        logit_B = self._outputs(prepared, self.model, {})
        label_B = self._on_device(batch.label_B, self._dtype)
        loss = functional.binary_cross_entropy_with_logits(logit_B, label_B, reduction="sum") / batch.global_samples
        self._dense.note(loss, request.failures)
        request.backward = StageSequence(self.stages, "worker backward")
        loss.backward()  # type: ignore[no-untyped-call]
        request.backward.switch(None)
        self._dense.start_reduction()
        with self.stages.timed("wait for the loss"):
            global_loss, num_failures = self._dense.outcome()
        if num_failures:
            self._dense.finish_reduction()  # so that nothing is running when the error is raised
        self._exchange.check(request, num_failures)
        with self.stages.timed("update id rows"):
            self.step_rows(rates)
        with self.stages.timed("reduce gradients"):
            self._dense.finish_reduction()
        with self.stages.timed("update dense"):
            self._dense.step(rates, self.num_steps + 1)
        self._exchange.release(request)
        self.num_steps += 1
        return StepResult(loss=global_loss, num_samples=batch.num_samples, learning_rate=rates.lr)

    def step_rows(self, rates: Rates) -> None:
        """Move the ID rows by the gradients of the last backward. All ranks call it once a step."""
        for source in self.id_sources:
            source.move(rates)
        self._rows.end_step(rates)

    def predict(self, prepared: PreparedBatch) -> Float64Array:
        """Return logits (B,) in float64. All ranks call it equally often."""
        return self.compute(prepared, self.model)

    @torch.no_grad()
    def compute(
        self, prepared: PreparedBatch, network: NetworkPart, given: Mapping[str, FieldVectors] | None = None
    ) -> Float64Array:
        """Return the outputs of `network`, a part of the model, for a batch, in float64.

        `given`: vectors of fields in place of those that are looked up. All ranks call it equally often.
        """
        self._modules.eval()
        values = self._outputs(prepared, network, given or {}).double().cpu().numpy()
        failures = prepared.request.failures
        self._exchange.check(prepared.request, 0 if failures is None else int(failures))
        self._exchange.release(prepared.request)
        return values

    def _outputs(self, prepared: PreparedBatch, network: NetworkPart, given: Mapping[str, FieldVectors]) -> Tensor:
        batch, place = prepared.batch, self.model.place
        vectors, numbers = self._vectors(prepared), [each.name for each in self.fields if each.kind == "dense"]
        dense = {name: self._on_device(batch.dense[name], self._dtype) for name in numbers}
        group_of_sample_B = self._on_device(batch.group_of_sample_B)
        with self.stages.timed("worker forward", prepared.request.kind):
            place.step, place.place_B = self.num_steps, batch.places
            if self.model.training:
                vectors = self._dropout(vectors, batch, place.step)
            fields = self.model.with_pictures_of_ads({**vectors, **given})
            return network(fields, dense, group_of_sample_B)

    def _vectors(self, prepared: PreparedBatch) -> dict[str, FieldVectors]:
        """Ask the exchange for the vectors of a batch, and put its weights and lengths beside them."""
        batch = prepared.batch
        vectors = self._exchange.vectors(prepared.request)
        for name in batch.weights.keys() & vectors.keys():
            vectors[name].weights_N = self._on_device(batch.weights[name], self._dtype)
        for each in self.fields:
            if each.side == "user" and each.name in vectors:
                lengths_M = batch.fields[each.name].lengths_M
                vectors[each.name].on_host = HostLengths(lengths_M, batch.group_of_sample_B)
        return vectors

    def _on_device(self, values: AnyArray, dtype: torch.dtype | None = None) -> Tensor:
        return on_device(values, self._device).to(dtype=dtype)
