"""The parts of an engine: how they are built and fit together, how they begin, and what a checkpoint has of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

import torch
from torch import Tensor, nn

from featurestore.format.codec import FeatureStatistics
from featurestore.keys import Int64Array, owner_of, shard_of
from featurestore.lookup.embedding import EmbeddingModel, EmbeddingService
from featurestore.lookup.ondevice import Gathered, held_bytes
from featurestore.lookup.partition import FeaturePartition
from featurestore.text import near_match
from trainer.comm import Comm
from trainer.config import Config, ExactTableConfig, ModelConfig, TableConfig
from trainer.engine.machine import check_memory, check_same, holds_features, with_compute_dtype
from trainer.errors import CheckpointError, ConfigError
from trainer.exchange.exchange import Exchange, VectorSource
from trainer.exchange.routing import unique
from trainer.ids.exact import ExactShape, ExactTable
from trainer.ids.optimizers import SHARED_STATE, RowOptimizer, row_optimizer
from trainer.ids.shards import IdRows, TableShape, check_names, owned_rows
from trainer.ids.tables import IdSource, IdTable
from trainer.models import layers, nets, newads
from trainer.optim import DenseOptimizer
from trainer.problems import Problem
from trainer.schema.fields import Field, Schema
from trainer.stages import Kind, Stages

NO_IMAGES = ".no_image"
"""Part of the names of the trained vectors for images without a feature, which a run has by its data.missing."""


@dataclass
class ContentRequest:
    """Gathered features of the unique keys whose vectors E makes."""

    gathered: Gathered
    inverse_R: Int64Array
    num_unique: int


class ContentSource:
    """A source of visual vectors: E of an embedding service."""

    def __init__(self, name: str, service: EmbeddingService, num_ranks: int) -> None:
        self._service, self._num_ranks = service, num_ranks
        self._num_shards = service.partition.info.num_shards
        self.width, self.key_sources = service.model.out, {name: self}

    def owner_of(self, keys_U: Int64Array) -> Int64Array:
        """Find the rank that has the shard of each key."""
        return owner_of(shard_of(keys_U, self._num_shards), self._num_ranks)

    def serve(self, keys_R: Int64Array, kind: Kind) -> ContentRequest:
        """Gather the features of the unique keys."""
        keys_Q, inverse_R = unique(keys_R)
        return ContentRequest(self._service.gather(keys_Q), inverse_R, len(keys_Q))

    def vectors(self, served: Sequence[ContentRequest]) -> list[Tensor]:
        """Return the visual vectors of the features."""
        return [self._service.embed(each.gathered) for each in served]

    def release(self, served: ContentRequest) -> None:
        """Give the features' memory back to the service."""
        self._service.release(served.gathered)


class EngineParts:
    """Model, tables, services, optimisers and exchange of one rank.

    Raises ConfigError where schema, configuration and stores do not fit. Every rank builds the same dense parameters
    from `train.seed`; that they are the same is checked here.
    """

    def __init__(
        self,
        comm: Comm,
        schema: Schema,
        partitions: Mapping[str, FeaturePartition],
        config: Config,
        *,
        statistics: Mapping[str, FeatureStatistics | None] | None = None,
        device: torch.device | str = "cpu",
        reading: bool = False,
    ) -> None:
        """`statistics` of features, by store; without them, a checkpoint that is loaded next has the standardisation.

        `reading`: nothing is trained, so ID rows have no optimiser's state; a checkpoint's is left out.
        """
        self.num_steps = self.first_step = 0  # first_step: where the run begins that continues another one's steps
        self.num_plateaus = 0  # see rates_at
        self.stages = Stages()
        self._comm, self._optim, self._device = comm, config.optim, torch.device(device)
        model, seed = with_compute_dtype(config.model, comm, self._device, None), config.train.seed
        self._dtype = dtype = torch.float64 if model.compute_dtype == "float64" else torch.float32
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = comm.on_all(lambda: nets.build_model(schema, model))  # a host may lack a net of the user's own
            self.services = {
                store: EmbeddingService(partitions[store], image_model(partitions[store].dim, width, model))
                for store, width in widths_of_stores(self.model.fields, model).items()
            }
        self._modules = nn.ModuleDict({"model": self.model, "stores": nn.ModuleDict(self.services)})
        self._modules.to(device=self._device, dtype=dtype)
        for store, service in self.services.items():
            if known := (statistics or {}).get(store):
                service.fold_standardization_(known.mean_D, known.std_D)
        shapes = table_shapes(self.model.fields, model)
        self._rows = (RowOptimizer if reading else row_optimizer)(config.optim, dtype, self._device)
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
        self.id_sources = list(dict.fromkeys(table.source for table in self.tables.values()))
        needed_bytes = sum(held_bytes(service.partition) for service in self.services.values())
        if holds_features(comm, config.run.features_on_device, needed_bytes, self._device):
            for service in self.services.values():
                service.hold_rows()
        self.model.place.seed = seed
        self._dense = DenseOptimizer(comm, dict(self._modules.named_parameters()), config.optim)
        self._exchange = self._exchange_of()
        image_rate = model.image_dropout if self.model.new_ads else 0.0
        self._dropout = newads.IdDropout(schema, model.id_dropout, seed, image_rate=image_rate)
        check_same(comm, self.dense_state())

    @property
    def fields(self) -> tuple[Field, ...]:
        """Return the fields that the model uses; a batch may hold more."""
        return self.model.fields

    def dense_state(self) -> dict[str, Tensor]:
        """Return the state that is the same on every rank.

        It has the parameters, standardisation, Adam's state, the number of steps, and other state of the optimiser of
        ID rows.
        """
        state = self._dense.state()
        state.update(self._modules.named_buffers())
        state.update(self._rows.shared_state())
        state["num_steps"] = torch.tensor(self.num_steps)
        return state

    def load_dense_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo `dense_state`, on every rank; "no image" vectors that it lacks stay zeros. Raises CheckpointError."""
        mine, theirs = (
            {name: value for name, value in each.items() if not name.startswith(SHARED_STATE)}
            for each in (self.dense_state(), state)
        )
        mine = {name: value for name, value in mine.items() if name in theirs or NO_IMAGES not in name}
        if any(NO_IMAGES in name for name in theirs.keys() - mine.keys()):
            raise CheckpointError(Problem.NO_IMAGE_VECTOR_TRAINED)
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

    def warm_start_dense(self, values: Mapping[str, Tensor]) -> None:
        """Take parameters and buffers by their names in `dense_state`, of the same shapes, before the first step."""
        mine = {**self._dense.parameters, **dict(self._modules.named_buffers())}
        with torch.no_grad():
            for name, value in values.items():
                mine[name].copy_(value)

    def expire_rows(self, day: date | None) -> None:
        """Remove the ids that have not been used for too long on that day, the last one of the training samples.

        Called when all else is loaded, before the first step. Raises ConfigError where a table needs a day and there is
        none.
        """
        for table in self.tables.values():
            if isinstance(table, ExactTable):
                table.expire_rows(day)

    def _exchange_of(self) -> Exchange:
        """Make the exchange, ID tables first among its sources."""
        source_of_field = {field.name: field.table_name for field in self.fields if field.is_id}
        source_of_field |= {f.name: f"store {f.store_name}" for f in self.fields if f.kind == "content"}
        content = [
            ContentSource(f"store {store}", service, self._comm.size) for store, service in self.services.items()
        ]
        sources: list[VectorSource] = [*self.id_sources, *content]
        return Exchange(self._comm, sources, source_of_field, self._device, self._dtype, self.stages)


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
            raise ConfigError(Problem.TABLE_ROWS_UNSET, field.name, name)
        shapes[name] = shape_of(name, layers.width_of(field, config), config.tables[name], config.table_shards)
    return list(shapes.values())


def check_tables(schema: Schema, config: ModelConfig) -> None:
    """Raise ConfigError for rows of an ID table that no field of the schema has, and that the defaults do not name."""
    of_fields = {field.table_name for field in schema.fields if field.is_id}
    unknown = config.tables.keys() - of_fields - ModelConfig().tables.keys()
    if unknown:
        name = min(unknown)
        raise ConfigError(Problem.TABLE_OF_NO_FIELD, name, near_match(name, sorted(of_fields), "model.tables."))


def _table_of_buckets(name: str, users: list[Field], config: ModelConfig) -> TableShape:
    """Return the shape of a table with a row for each bucket. Raises ConfigError where not all fields have buckets, or
    the settings give its rows."""
    if hashed := [field.name for field in users if not field.is_bucketed]:
        raise ConfigError(Problem.TABLE_OF_BUCKETS, hashed[0], name)
    if name in config.tables:
        raise ConfigError(Problem.TABLE_HAS_ITS_ROWS, name, users[0].name)
    rows = max(field.num_buckets for field in users)
    return TableShape(name, layers.width_of(users[0], config), rows, config.table_shards, direct=True)


def shape_of(name: str, width: int, table: TableConfig, num_shards: int) -> TableShape:
    """Return the shape of an ID table with these settings."""
    if isinstance(table, ExactTableConfig):
        return ExactShape(name, width, table.max_rows, num_shards, rules=table)
    return TableShape(name, width, table, num_shards)


def widths_of_stores(fields: tuple[Field, ...], config: ModelConfig) -> dict[str, int]:
    """Return how wide the visual vectors of each store's E are."""
    return {field.store_name: layers.width_of(field, config) for field in fields if field.kind == "content"}


def image_model(dim: int, width: int, config: ModelConfig) -> EmbeddingModel:
    """Make an untrained E for features of `dim` numbers."""
    assert config.compute_dtype != "auto"  # settled when the engine began
    return EmbeddingModel(dim, config.embed_hidden, width, config.compute_dtype)


def build_tables(
    shapes: Iterable[TableShape],
    rank: int,
    num_ranks: int,
    *,
    seed: int,
    scale: float,
    optimizer: RowOptimizer,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, IdTable]:
    """Make the tables by name; the rows of those of one width lie one after the other. `scale`: see `initial_rows`."""
    shapes = list(shapes)
    sources: dict[int, IdSource] = {}
    for width in dict.fromkeys(shape.width for shape in shapes):
        count = sum(owned_rows(shape, rank, num_ranks) for shape in shapes if shape.width == width)
        sources[width] = IdSource(IdRows.zeros(count, width, optimizer.state, device, dtype), optimizer)
    return {
        shape.name: (ExactTable if isinstance(shape, ExactShape) else IdTable)(
            shape,  # type: ignore[arg-type]  # an exact one for an exact table
            rank,
            num_ranks,
            seed=seed,
            scale=scale,
            source=sources[shape.width],
        )
        for shape in shapes
    }
