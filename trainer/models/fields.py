"""Which fields of the schema a model looks at, and how wide the vectors of each are."""

from torch import nn

from trainer.config.options import ModelConfig
from trainer.errors import ConfigError
from trainer.schema import Field, Schema, Side

_SIDES: dict[str, frozenset[Side]] = {
    "none": frozenset(),
    "ad": frozenset({"ad"}),
    "behavior": frozenset({"user"}),
    "both": frozenset({"user", "ad"}),
}


def used_fields(schema: Schema, config: ModelConfig) -> tuple[Field, ...]:
    """Return the fields that the model looks at: all ID and dense ones, and content ones as `images` says.

    Logistic regression has one weight for each id: ID fields are one wide there, whatever the schema says.
    Raises ConfigError where `images` asks for a side on which the schema has no content field.
    """
    wanted = _SIDES[config.images]
    for side in sorted(wanted):
        if not any(field.kind == "content" and field.side == side for field in schema.fields):
            raise ConfigError(
                f"model.images={config.images} needs a field of kind content on side {side}, and the schema has none; "
                "add one to the schema, or set model.images to what it has"
            )
    fields = tuple(f for f in schema.fields if f.kind != "content" or f.side in wanted)
    if config.base == "lr":
        fields = tuple(f.model_copy(update={"width": 1}) if f.is_id else f for f in fields)
    _check_names(fields)
    if not any(field.is_id or field.kind == "content" for field in fields):
        raise ConfigError("the schema has no field of kind id, multi_id or content; the model needs one")
    return fields


def tiers_of(behaviors: str) -> str:
    """Name the dense input that says how similar a behaviour field's images are to the ad's, (B, T)."""
    return f"{behaviors}.tiers"


def nearest_of(behaviors: str) -> str:
    """Name the vectors of a behaviour field that are nearest to the ad, a list for each sample, not each group."""
    return f"{behaviors}.nearest"


def _check_names(fields: tuple[Field, ...]) -> None:
    """Refuse names of content fields and stores that cannot name modules: a few are taken, and dots divide."""
    taken = nn.ModuleDict()
    for field in fields:
        names = {"name": field.name, "store": field.store_name} if field.kind == "content" else {}
        for what, name in names.items():
            if "." in name or hasattr(taken, name):
                raise ConfigError(
                    f"field {field.name}: {what}={name} cannot name a part of the model; "
                    f"choose another, as my_{name.replace('.', '_')}"
                )


def width_of(field: Field, config: ModelConfig) -> int:
    """Return the width of a field's vectors: the schema's, else the model's for its kind; dense: numbers a row."""
    if field.width is not None:
        return field.width
    if field.kind == "dense":
        return 1
    return config.visual_width if field.kind == "content" else config.id_width
