"""Other ways to bring images into the model: E and the model alone, features in the samples, features from a server.

- `Compute`: the work that no trainer can avoid, in isolation. E takes the rows as the store has them: to make numbers
  of them that its products can take is its part.
- `StoreInWorker`: features travel in the samples, E runs once per occurrence, PyTorch's DataLoader reads ahead. The
  batches are those of the trainer, written to Parquet with the features in the rows: fixed-size bytes, uncompressed, as
  drawn features do not shrink. `grouped`: the images that a group has seen stand in its row once; else each sample is a
  row of its own.
- `StoreInServer`: features lie with their owners as with ours, but travel raw, and E runs where they are asked for. A
  rank asks for each image of its part of the batch once; those of the next step come while this one computes.

Letters of shapes as in trainer/samples/reader.py.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from featurestore.keys import Int64Array, owner_of, shard_of
from featurestore.lookup.embedding import EmbeddingModel, EmbeddingService
from featurestore.lookup.ondevice import Gathered, as_tensor
from featurestore.lookup.partition import FeaturePartition
from trainer.engine.wiring import model_name
from trainer.exchange.exchange import Exchange, KeyRequest
from trainer.exchange.routing import bucketize_by_owner, unique
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


KEPT_BATCHES = 2
"""On disk, read over and over: a batch of the paper's shape is 0.8 GB."""


class Compute:
    """Counts the time of the matrix products and of the worker model alone; the rest is done beside the clock."""

    ahead = False

    def __init__(self, run: Run) -> None:
        (self._service,) = run.engine.services.values()
        self.model = Model(run, self._service)
        self._batches = self.model.batches()
        self._stored = StoredFeatures(self._service)
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


@dataclass(frozen=True)
class FullBatch:
    """A batch, and of each content field the features of its values, (N, D)."""

    batch: Batch
    features: dict[str, Tensor]


class BatchFiles(Dataset[FullBatch]):
    """Batches on disk: a file of each side, one row group a batch."""

    def __init__(self, folder: Path, sides: dict[str, str], content: list[str], dim: int) -> None:
        self._folder, self._sides, self._content, self._dim = folder, sides, content, dim

    def __getitem__(self, number: int) -> FullBatch:
        pa.set_cpu_count(1)  # the workers share the cores already
        tables = {side: pq.read_table(self._folder / f"{number}.{side}.parquet") for side in ("user", "ad")}
        fields, features = {}, {}
        for name, side in self._sides.items():
            column: Any = tables[side].column(name).combine_chunks()
            lengths_M = np.diff(column.offsets.to_numpy()).astype(np.int32)
            if name in self._content:
                bits = np.frombuffer(column.values.buffers()[1], np.uint16).reshape(-1, self._dim)
                features[name] = torch.from_numpy(bits).view(torch.bfloat16)
                fields[name] = Jagged(np.empty(0, np.int64), lengths_M)
            else:
                fields[name] = Jagged(column.values.to_numpy(), lengths_M)
        ad = {name: tables["ad"].column(name).to_numpy() for name in ("group_of_sample", "label", "user_of_sample")}
        return FullBatch(
            Batch(fields, {}, ad["group_of_sample"], ad["label"], ad["user_of_sample"], len(ad["label"])), features
        )


class StoreInWorker:
    """One rank. The features that the model needs come with the batch."""

    ahead = True

    def __init__(self, run: Run, folder: Path, grouped: bool) -> None:
        assert run.partition is not None
        (service,) = run.engine.services.values()
        self.model, self._stored = Model(run, service), StoredFeatures(service)
        self._names = {field.name: model_name(field, run.config.model) for field in self.model.content}
        place = folder / ("grouped" if grouped else "plain")
        fields = run.engine.fields
        if not (place / "done").exists():
            place.mkdir(parents=True, exist_ok=True)
            for number, batch in enumerate(itertools.islice(self.model.batches(), KEPT_BATCHES)):
                whole = batch if grouped else per_sample(batch, fields)
                write_batch(whole, {f.name: f.side for f in fields}, list(self._names), run.partition, place, number)
            (place / "done").touch()
        files = BatchFiles(place, {f.name: f.side for f in fields}, list(self._names), run.partition.dim)

        # The batches on disk, again and again.
        loader: DataLoader[FullBatch] = DataLoader(
            files,
            batch_size=None,
            sampler=itertools.cycle(range(KEPT_BATCHES)),
            num_workers=torch.get_num_threads(),
            prefetch_factor=1,
        )
        self._loaded = iter(loader)

    def prepare(self) -> tuple[FullBatch, KeyRequest]:
        """Prepare the next batch, and exchange its ID keys."""
        full = next(self._loaded)
        return full, self.model.request(full.batch)

    def step(self, prepared: tuple[FullBatch, KeyRequest]) -> tuple[float, None]:
        """Train on one batch."""
        full, request = prepared
        return self.model.train_step(full.batch, request, lambda _: self._images(full)), None

    def _images(self, full: FullBatch) -> Images:
        return {
            field: occurrences(
                self._stored.embed(name, full.features[field], field), full.batch.fields[field].lengths_M
            )
            for field, name in self._names.items()
        }


def write_batch(
    batch: Batch, sides: dict[str, str], content: list[str], partition: FeaturePartition, place: Path, number: int
) -> None:
    """Write two files: the rows of the user side and those of the ad side, features in place of image keys."""
    columns: dict[str, dict[str, Any]] = {"user": {}, "ad": {}}
    for name, side in sides.items():
        jagged = batch.fields[name]
        values: Any = pa.array(jagged.values_N)
        if name in content:
            rows = pa.py_buffer(partition.lookup(jagged.values_N).features_UD.data)
            kind = pa.binary(partition.dim * partition.info.storage_dtype.itemsize)
            values = pa.FixedSizeBinaryArray.from_buffers(kind, len(jagged.values_N), [None, rows])
        offsets: Any = pa.array(np.concatenate([[0], np.cumsum(jagged.lengths_M)]).astype(np.int32))
        columns[side][name] = pa.ListArray.from_arrays(offsets, values)
    columns["ad"]["group_of_sample"] = batch.group_of_sample_B
    columns["ad"]["label"] = batch.label_B
    columns["ad"]["user_of_sample"] = batch.group_id_B
    for side, table in columns.items():
        pq.write_table(pa.table(table), place / f"{number}.{side}.parquet", compression="none", use_dictionary=False)


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
        assert run.partition is not None
        (self._service,) = run.engine.services.values()
        self.model = Model(run, self._service)
        self._partition: FeaturePartition = run.partition
        self._comm = run.comm
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
        if len(self._looked_up) < len(keys_R):
            self._looked_up = np.empty((len(keys_R) * 9 // 8, self._partition.dim), self._looked_up.dtype)
        features_RD = self._partition.lookup(keys_R.numpy(), out=self._looked_up[: len(keys_R)]).features_UD
        bits_RD = torch.from_numpy(features_RD.view(np.uint8))
        received, _ = self._comm.alltoall(bits_RD, counts_P, name="raw.features")
        self._network.numbers(as_tensor(received.numpy().view(self._looked_up.dtype)), out=numbers_UD)
        return numbers_UD, torch.from_numpy(asked.inverse_N)

    def _images(self, fetched: Fetched) -> Images:
        visual_UV = self._service.embed(self._name, Gathered(fetched.numbers_UD, None))
        fields = [(field.name, fetched.batch.fields[field.name]) for field in self.model.content]
        places = torch.split(fetched.index_N, [len(jagged.values_N) for _, jagged in fields])
        return {
            name: FieldVectors(visual_UV, index_N, torch.from_numpy(jagged.lengths_M.astype(np.int64)))
            for (name, jagged), index_N in zip(fields, places, strict=True)
        }


def _splits(counts_P: Int64Array) -> Tensor:
    return torch.from_numpy(counts_P.astype(np.int32))
