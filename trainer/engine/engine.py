"""The engine: forward, backward and update of one batch, and the model's parts it wires."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from featurestore.format.statistics import FeatureStatistics
from featurestore.lookup.embedding import EmbeddingModel, EmbeddingService, on_device
from featurestore.lookup.heldrows import held_bytes, hold_rows
from featurestore.lookup.partition import FeaturePartition
from trainer.comm import Comm
from trainer.config.options import ExactTableConfig, ModelConfig, OptimConfig, TableConfig, near_match
from trainer.engine.choices import TRAINED, dense_optimizer, row_optimizer
from trainer.engine.machine import check_memory, check_same, holds_features, with_compute_dtype
from trainer.engine.similarity import ImageComparison, Signatures, Similarity, pairs_of_fields
from trainer.errors import ConfigError
from trainer.exchange.exchange import ContentSource, Exchange, ExchangeSource, FieldVectors, HostLengths, KeyRequest
from trainer.ids.exact import ExactShape, ExactTable
from trainer.ids.optimizers import SHARED_STATE, RowOptimizer
from trainer.ids.tables import TableShape, apply_gradients, build_tables
from trainer.models.layers import IdDropout, chosen_values, nearest_of, tiers_of, width_of
from trainer.models.nets import build_model, check_logits
from trainer.models.pooling import gallery_vectors
from trainer.optim import Rates, check_names, rates_at
from trainer.samples.reader import Batch
from trainer.schema import Field, Schema
from trainer.stages import Kind, Stages

# Fields, dense values and the group of each sample in; as trainer.models.ctr.CtrModel.forward.
NetworkPart = Callable[[Mapping[str, FieldVectors], Mapping[str, Tensor], Tensor], Tensor]


@dataclass
class PreparedBatch:
    """A batch whose keys have been exchanged, and how similar the images of each behaviour field are to the ads'."""

    batch: Batch
    request: KeyRequest
    similarity: Mapping[str, Similarity]


@dataclass(frozen=True)
class StepResult:
    """The figures of one training step: `loss` is the mean over the global batch, the rest is of this rank."""

    loss: float
    num_samples: int
    num_references: int
    learning_rate: float


class Engine:
    """Model, tables, services, optimisers and exchange of one rank.

    Raises ConfigError where schema, configuration and stores do not fit. Every rank builds the same dense parameters
    from `seed`; that they are the same is checked here.
    """

    def __init__(
        self,
        comm: Comm,
        schema: Schema,
        partitions: Mapping[str, FeaturePartition],
        model: ModelConfig,
        optim: OptimConfig,
        *,
        seed: int,
        statistics: Mapping[str, FeatureStatistics] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        reading: bool = False,
        features_on_device: Literal["auto"] | bool = "auto",
    ) -> None:
        """`reading`: nothing is trained, so ID rows have no optimiser's state; a checkpoint's is left out. Where it has
        averages, these are the parameters then."""
        self.num_steps = self.first_step = 0  # first_step: where the run begins that continues another one's steps
        self.stages = Stages()
        if reading:
            optim = optim.model_copy(update={"average_share": 0.0})
        self._comm, self._optim, self._reading, self._base = comm, optim, reading, model.base
        self._device, self._dtype = torch.device(device), dtype
        model = with_compute_dtype(model, comm, self._device, None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = comm.on_all(lambda: build_model(schema, model))  # a host may lack a net of the user's own
            self.services = services_of(self.model.fields, partitions, model)
        self._modules = nn.ModuleDict({"model": self.model, "stores": nn.ModuleDict(self.services)})
        self._modules.to(device=self._device, dtype=dtype)
        for store, service in self.services.items():
            if statistics and store in statistics:
                service.fold_standardization_(statistics[store].mean_D, statistics[store].std_D)
        shapes = table_shapes(self.model.fields, model)
        self._rows = RowOptimizer(optim) if reading else row_optimizer(optim, dtype, self._device)
        check_memory(comm, shapes, self._rows.state, self._device, dtype)
        self.tables = comm.on_all(
            lambda: build_tables(
                shapes,
                comm.rank,
                comm.size,
                seed=seed,
                scale=model.id_init_std,
                optimizer=self._rows,
                device=device,
                dtype=dtype,
            )
        )
        needed_bytes = sum(held_bytes(service.partition) for service in self.services.values())
        if holds_features(comm, features_on_device, needed_bytes, self._device):
            for service in self.services.values():
                hold_rows(service)
        self.model.place.comm, self.model.place.seed = comm, seed
        self._dense = dense_optimizer(comm, dict(self._modules.named_parameters()), optim)
        image_rate = model.image_dropout if self.model.new_ads else 0.0
        self._id_dropout = IdDropout(schema, model.id_dropout, seed, image_rate=image_rate)
        self._exchange, self._comparison = self._exchange_of(model)
        check_same(comm, self.dense_state())

    @property
    def fields(self) -> tuple[Field, ...]:
        """Return the fields that the model uses; a batch may hold more."""
        return self.model.fields

    def prepared(self, batches: Iterator[Batch], kind: Kind = "step") -> Iterator[PreparedBatch]:
        """Exchange the keys of one batch after the other, and gather what their owners need.

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
            except Exception as failure:  # whatever it is, the other ranks wait for this one's keys
                self._exchange.refuse(failure, kind)
            request = self._exchange.request(batch.fields, kind)
            similarity = {} if self._comparison is None else self._comparison.similarities(batch, request)
            yield PreparedBatch(batch, request, similarity)

    def prepare(self, batch: Batch, kind: Kind = "step") -> PreparedBatch:
        """Prepare one batch as `prepared` does; all ranks call it."""
        return next(self.prepared(iter([batch]), kind))

    def train_step(self, prepared: PreparedBatch) -> StepResult:
        """Do one training step: forward, backward, one allreduce, both optimisers. All ranks call it.

        The host waits for the device once, for loss and failures, before anything is updated. Where a rank failed, it
        raises its error and the others RemoteRankError: no parameter and no row has moved then (the running values of
        batch norm may have).
        """
        batch, request = prepared.batch, prepared.request
        rates = rates_at(self._optim, self.num_steps - self.first_step)
        self._modules.train()
        self._dense.zero_grad()
        logit_B = self._outputs(prepared, self.model, {})
        label_B = self._on_device(batch.label_B, self._dtype)
        loss = functional.binary_cross_entropy_with_logits(logit_B, label_B, reduction="sum") / batch.global_samples
        self._dense.note(loss, request.failures)
        request.backward = self.stages.begin("worker backward")
        loss.backward()  # type: ignore[no-untyped-call]
        request.backward.switch(None)
        self._dense.start_reduction()
        with self.stages.timed("wait for the loss"):
            global_loss, num_failures = self._dense.outcome()
        if num_failures:
            self._dense.finish_reduction()  # so that nothing is under way when the error is raised
        self._exchange.check(request, num_failures)
        with self.stages.timed("update id rows"):
            self.move_rows(rates)
        with self.stages.timed("reduce gradients"):
            self._dense.finish_reduction()
        with self.stages.timed("update dense"):
            self._dense.step(rates, self.num_steps + 1)
        self._exchange.release(request)
        self.num_steps += 1
        return StepResult(
            loss=global_loss,
            num_samples=batch.num_samples,
            num_references=request.num_references,
            learning_rate=rates.lr,
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Compute with averages in the block, if the run keeps them; no training step is done in it."""
        with self._rows.averaged(), self._dense.averaged():
            yield

    def predict(self, prepared: PreparedBatch) -> NDArray[np.float64]:
        """Return logits (B,) in float64. All ranks call it equally often."""
        return self.compute(prepared, self.model)

    @torch.no_grad()
    def compute(
        self, prepared: PreparedBatch, network: NetworkPart, given: Mapping[str, FieldVectors] | None = None
    ) -> NDArray[np.float64]:
        """Return what `network`, as a part of the model, makes of a batch, in float64.

        `given`: vectors of fields in place of those that are looked up. All ranks call it equally often.
        """
        self._modules.eval()
        values = self._outputs(prepared, network, given or {}).double().cpu().numpy()
        failures = prepared.request.failures
        self._exchange.check(prepared.request, 0 if failures is None else int(failures))
        self._exchange.release(prepared.request)
        return values

    def dense_state(self) -> dict[str, Tensor]:
        """Return the state that is the same on every rank.

        It has the parameters, or their averages and them, standardisation, Adam's state, the number of steps, and what
        else the optimiser of ID rows knows.
        """
        state = self._dense.state()
        state.update(self._modules.named_buffers())
        state.update(self._rows.shared_state())
        state["num_steps"] = torch.tensor(self.num_steps)
        return state

    def load_dense_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo `dense_state`, on every rank; "no image" vectors that it lacks stay zeros. Raises CheckpointError."""
        left_out = (SHARED_STATE, TRAINED) if self._reading else (SHARED_STATE,)
        mine, theirs = (
            {name: value for name, value in each.items() if not name.startswith(left_out)}
            for each in (self.dense_state(), state)
        )
        mine = {name: value for name, value in mine.items() if name in theirs or NO_IMAGES not in name}
        check_names(mine, theirs)
        self._rows.load_shared_state(state)
        with torch.no_grad():
            for name, value in mine.items():
                value.copy_(theirs[name])
        self.num_steps = int(mine["num_steps"])

    def shard_names(self) -> list[str]:
        """Return the names that `load_shard_state` reads on this rank."""
        return [name for table in self.tables.values() for name in table.names()]

    def shard_state(self) -> dict[str, Tensor]:
        """Return this rank's ID rows and their optimiser's state, <table>/<shard>/<part>, to be written at once."""
        return {name: rows for table in self.tables.values() for name, rows in table.export_shards().items()}

    def load_shard_state(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's shards out of `state`, written by any number of ranks. Raises CheckpointError."""
        for table in self.tables.values():
            table.import_shards(state)

    def warm_names(self) -> list[str]:
        """Return the names that `begin_with` reads on this rank."""
        return [name for table in self.tables.values() for name in table.warm_names()]

    def begin_dense_with(self, values: Mapping[str, Tensor]) -> None:
        """Take parameters and buffers by their names in `dense_state`, of the same shapes, before the first step."""
        mine = {**self._dense.parameters, **dict(self._modules.named_buffers())}
        with torch.no_grad():
            for name, value in values.items():
                mine[name].copy_(value)
        self._dense.begin()

    def begin_with(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's id vectors out of another run's `shard_state`, before step 1. Raises CheckpointError."""
        for table in self.tables.values():
            table.begin_with(state)

    def begin_day(self, day: date | None) -> None:
        """Remove the ids that have not been used for too long on that day, the last one of the training samples.

        Called when all else is loaded, before the first step. Raises ConfigError where a table needs a day and there is
        none.
        """
        for table in self.tables.values():
            if isinstance(table, ExactTable):
                table.begin_day(day)

    def move_rows(self, rates: Rates) -> None:
        """Move the ID rows by the gradients of the last backward. All ranks call it once a step."""
        apply_gradients(self.tables.values(), self._rows, rates)

    def restart_rows(self, epoch: int) -> None:
        """Begin all ID rows anew for this epoch, and their optimiser with them. All ranks call it between two steps."""
        self._rows.restart()
        for table in self.tables.values():
            table.restart(epoch)

    def _outputs(self, prepared: PreparedBatch, network: NetworkPart, given: Mapping[str, FieldVectors]) -> Tensor:
        batch = prepared.batch
        dense = {
            field.name: self._on_device(batch.dense[field.name], self._dtype)
            for field in self.fields
            if field.kind == "dense"
        }
        group_of_sample_B = self._on_device(batch.group_of_sample_B)
        vectors = self._exchange.vectors(prepared.request)
        for field in self.fields:
            if field.gallery is not None:
                gallery = batch.galleries[field.name]
                sizes_K = self._on_device(gallery.values_N)
                lengths_M = self._on_device(gallery.lengths_M, torch.int64)
                vectors[field.name] = gallery_vectors(vectors[field.name], sizes_K, lengths_M, field.gallery)
        for name in batch.weights.keys() & vectors.keys():
            vectors[name].weights_N = self._on_device(batch.weights[name], self._dtype)
        for field in self.fields:
            if field.side == "user" and field.name in vectors:
                rows = batch.galleries if field.gallery is not None else batch.fields
                vectors[field.name].on_host = HostLengths(rows[field.name].lengths_M, batch.group_of_sample_B)
        for name, similar in prepared.similarity.items():
            dense[tiers_of(name)] = self._on_device(similar.tiers_BT, self._dtype)
            vectors[nearest_of(name)] = self._nearest(vectors[name], similar)
        with self.stages.timed("worker forward", prepared.request.kind):
            if self._modules.training:
                self.model.place.step, self.model.place.place_B = self.num_steps, batch.places
                vectors = self._id_dropout(vectors, batch, self.num_steps)
            outputs = network(self.model.with_pictures_of_ads({**vectors, **given}), dense, group_of_sample_B)
        if network is self.model:
            check_logits(self._base, outputs, batch.num_samples)
        return outputs

    def _nearest(self, field: FieldVectors, similar: Similarity) -> FieldVectors:
        """Return for each sample, instead of each group, the behaviours nearest to its ad."""
        nearest_N, lengths_B = self._on_device(similar.nearest_N), self._on_device(similar.lengths_B)
        nearest = chosen_values(field, nearest_N, lengths_B)
        nearest.on_host = HostLengths(similar.lengths_B, np.arange(len(similar.lengths_B)))
        return nearest

    def _on_device(self, values: NDArray[Any], dtype: torch.dtype | None = None) -> Tensor:
        return on_device(values, self._device).to(dtype=dtype)

    def _exchange_of(self, model: ModelConfig) -> tuple[Exchange, ImageComparison | None]:
        """Make the exchange, ID tables first among its sources, and what compares images by it."""
        sources: dict[str, ExchangeSource] = dict(self.tables)
        source_of_field = {field.name: field.table_name for field in self.fields if field.is_id}
        for field in self.fields:
            if field.kind == "content":
                network = model_name(field, model)
                name = source_of_field[field.name] = f"{field.store_name}:{network}"
                if name not in sources:
                    sources[name] = ContentSource(self.services[field.store_name], network, self._comm.size)
        exchange = Exchange(self._comm, sources, source_of_field, self._device, self._dtype, self.stages)
        numbers = {name: list(sources).index(source) for name, source in source_of_field.items()}
        return exchange, self._comparison_of(model, numbers)

    def _comparison_of(self, model: ModelConfig, source_of_field: Mapping[str, int]) -> ImageComparison | None:
        """Make what compares images with each other; None where the model does not look at that."""
        pairs = pairs_of_fields(self.fields, model)
        if not pairs:
            return None
        compared = {f.name: self.services[f.store_name] for f in self.fields if f.name in {*pairs, *pairs.values()}}
        made = {service: Signatures(service.partition, service.scaling) for service in compared.values()}
        numbers = {name: source_of_field[name] for name in compared}
        signatures = {numbers[name]: made[service] for name, service in compared.items()}
        return ImageComparison(self._comm, model, pairs, numbers, signatures, self.stages)


NO_IMAGES = ".no_image."
"""In the names of the trained vectors of images without a feature, which a run has by its data.missing."""


def model_name(field: Field, config: ModelConfig) -> str:
    """Name the E of its store that a content field uses."""
    return "shared" if config.shared_image_model else field.name


def table_shapes(fields: tuple[Field, ...], config: ModelConfig) -> list[TableShape]:
    """Return the shapes of the fields' ID tables. Raises ConfigError for one without a number of rows."""
    shapes: dict[str, TableShape] = {}
    for field in fields:
        name = field.table_name
        if not field.is_id or name in shapes:
            continue
        users = [each for each in fields if each.is_id and each.table_name == name]
        if any(each.is_bucketed for each in users):
            shapes[name] = _table_of_buckets(name, users, config)
            continue
        if name not in config.tables:
            raise ConfigError(
                f"field {field.name} needs table {name}, which has no number of rows; set model.tables.{name}"
            )
        shapes[name] = shape_of(name, width_of(field, config), config.tables[name], config.table_shards)
    return list(shapes.values())


def check_tables(schema: Schema, config: ModelConfig) -> None:
    """Raise ConfigError for rows of an ID table that no field of the schema has, and that the preset does not name."""
    of_fields = {field.table_name for field in schema.fields if field.is_id}
    unknown = config.tables.keys() - of_fields - ModelConfig().tables.keys()
    if unknown:
        name = min(unknown)
        raise ConfigError(
            f"model.tables.{name} is the table of no field; {near_match(name, sorted(of_fields), 'model.tables.')}"
        )


def _table_of_buckets(name: str, users: list[Field], config: ModelConfig) -> TableShape:
    """Return the shape of a table with a row for each bucket. Raises ConfigError where not all fields have buckets, or
    the settings give its rows."""
    if hashed := [field.name for field in users if not field.is_bucketed]:
        raise ConfigError(
            f"field {hashed[0]} shares table {name} with buckets of numbers, which have a row each; name another"
        )
    if name in config.tables:
        raise ConfigError(f"model.tables.{name}: the table has a row for each bucket of {users[0].name}; leave it out")
    rows = max(field.num_buckets for field in users)
    return TableShape(name, width_of(users[0], config), rows, config.table_shards, direct=True)


def shape_of(name: str, width: int, table: TableConfig, num_shards: int) -> TableShape:
    """Return the shape of an ID table with these settings."""
    if isinstance(table, ExactTableConfig):
        return ExactShape(name, width, table.max_rows, num_shards, rules=table)
    return TableShape(name, width, table, num_shards)


def networks_of(fields: tuple[Field, ...], config: ModelConfig) -> dict[str, dict[str, int]]:
    """Return the names of every store's E, and how wide its visual vectors are."""
    widths_of_store: dict[str, dict[str, int]] = {}
    for field in fields:
        if field.kind == "content":
            widths = widths_of_store.setdefault(field.store_name, {})
            widths[model_name(field, config)] = width_of(field, config)
    return widths_of_store


def image_model(dim: int, width: int, config: ModelConfig) -> EmbeddingModel:
    """Make an untrained E for features of `dim` numbers."""
    assert config.compute_dtype != "auto"  # settled when the engine began
    return EmbeddingModel(dim, config.embed_hidden, width, config.compute_dtype)


def services_of(
    fields: tuple[Field, ...],
    partitions: Mapping[str, FeaturePartition],
    config: ModelConfig,
) -> dict[str, EmbeddingService]:
    """Make the services of this rank: for each store its rows and its networks. Raises ConfigError."""
    services: dict[str, EmbeddingService] = {}
    for store, widths in networks_of(fields, config).items():
        if store not in partitions:
            raise ConfigError(
                f"the schema's content fields need store {store}; open are {sorted(partitions) or 'none'}"
            )
        models = {name: image_model(partitions[store].dim, width, config) for name, width in widths.items()}
        services[store] = EmbeddingService(partitions[store], models)
    return services
