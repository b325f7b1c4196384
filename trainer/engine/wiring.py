"""The parts of an engine: the ID tables, the stores and the networks that the model's fields need."""

from collections.abc import Mapping

from featurestore.lookup.embedding import EmbeddingModel, EmbeddingService
from featurestore.lookup.partition import FeaturePartition
from trainer.config.options import ExactTableConfig, ModelConfig, TableConfig
from trainer.config.validate import near_match
from trainer.errors import ConfigError
from trainer.ids.exact import ExactShape
from trainer.ids.tables import TableShape
from trainer.models.fields import width_of
from trainer.schema import Field, Schema

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
