"""Settings: their classes, types, limits, defaults and checks.

The line below a setting is its text in `presets/dicm.yaml` and docs/SETTINGS.md (`python -m tools.settings` writes
both). Quick to import: without torch.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from featurestore.lookup import ComputeDType
from featurestore.text import without_passwords
from trainer.errors import TrainerError

KIND = "kind:"
"""The beginning of the tag of one kind of a value that may be of several; a message does not show it."""
Model = TypeVar("Model", bound=BaseModel)
Value = TypeVar("Value")
Decision = Literal["positions", "parameters", "rows", "training", "nothing"]
DECISIONS: Mapping[Decision, str] = {
    "positions": "which sample is in which batch",
    "parameters": "which parameters there are, their shapes, their start, and what they mean",
    "rows": "the rows of ID tables and the state of their optimiser",
    "training": "how the numbers move, and what is measured",
    "nothing": "speed, places and printing: what lies at a place is compared by itself",
}
"""The kind of a setting, which is part of its type; `trainer.config.config.differences` compares runs by it."""


class Decides(NamedTuple):
    """The kind of a setting, in its type."""

    what: Decision


Positions = Annotated[Value, Decides("positions")]
Parameters = Annotated[Value, Decides("parameters")]
Rows = Annotated[Value, Decides("rows")]
Training = Annotated[Value, Decides("training")]
Nothing = Annotated[Value, Decides("nothing")]


class Section(BaseModel):
    """A part of a configuration: immutable, no unknown names, no silent conversion of a string to a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


def decision_of(field: FieldInfo) -> Decision:
    """Return the kind of the setting of this field. Raises StopIteration if its type has none."""
    return next(each.what for each in field.metadata if isinstance(each, Decides))


LONGEST_NAME = 200
"""Longest name that is compared with the known ones, as a comparison costs the product of both lengths."""


def near_match(name: str, known: Sequence[str], prefix: str = "") -> str:
    """End a message about an unknown name: with the nearest known one, or with all of them when none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) if len(name) <= LONGEST_NAME else []
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"known: {', '.join(prefix + each for each in sorted(known))}"


def validated(model: type[Model], values: Mapping[str, Any], source: str, error: type[TrainerError]) -> Model:
    """Check `values` and return them as `model`.

    Raises `error`, one line per mistake: the field, the value, the limit, the way out.
    """
    try:
        return model.model_validate(values)
    except ValidationError as failure:
        lines = [_explain(model, details) for details in failure.errors(include_url=False)]
        raise error("\n".join(f"{source}: {line}" for line in lines)) from failure


def _explain(model: type[BaseModel], details: ErrorDetails) -> str:
    path = [str(part) for part in details["loc"] if not str(part).startswith(KIND)]
    name = ".".join(path)
    match details["type"]:
        case "extra_forbidden":
            known = _names_at(model, path[:-1])
            return f"{name} is unknown; {near_match(path[-1], known, '.'.join([*path[:-1], '']).lstrip('.'))}"
        case "missing":
            return f"{name} is missing"
        case "model_type" | "model_attributes_type":
            return f"{name or 'the file'}={details['input']!r} has to be a mapping of names to values"
        case _:
            message = details["msg"].removeprefix("Value error, ").replace("Input should", "it should")
            if not name or (details["type"] == "value_error" and isinstance(details["input"], Mapping)):
                return message  # concerns several fields, which its message names
            return without_passwords(f"{name}={details['input']!r}: {message}")


def _names_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields of the model at `path` inside `model`; list positions in the path are skipped."""
    for part in path:
        if part in model.model_fields:
            model = _model_inside(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_inside(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in {list, tuple, dict, Union, UnionType, Annotated}:
        return next((found for each in get_args(annotation) if (found := _model_inside(each))), None)
    return None


BaseNet = Literal["lr", "mlp", "din", "dcn", "finalmlp", "two_tower"]
OwnNet = str
"""A net of the user's own: the dotted path of its class, as mypackage.MyNet."""
Activation = Literal["relu", "prelu"]
SeenImages = Literal["none", "ad", "behavior", "both"]
Pooling = Literal["concat", "max", "sum", "mean", "attentive", "multi_query"]
IdOptimizer = Literal["adam", "rowwise_adagrad"]
Count = Annotated[int, Field(ge=1, lt=2**63)]
TableRows = Annotated[int, Field(ge=1, le=10**12)]
LearningRate = Annotated[float, Field(gt=0, le=10)]
RateDecay = Annotated[float, Field(gt=0, le=1)]
_DOTTED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+")
LARGEST_UNTRAINED = 0.001
"""Largest model.id_init_std: a first step of Adam moves a row this far."""
Width = Annotated[int, Field(ge=1, le=65_536)]


class ExactTableConfig(Section):
    """An ID table with a row for each id, as model.tables.NAME={kind: exact, max_rows: 1000000} (docs/CHOICES.md)."""

    kind: Rows[Literal["exact"]]
    """Says that the table has a row for each id."""
    max_rows: Rows[Annotated[int, Field(ge=1, lt=1 << 31)]]
    """Ids that have rows at a time, below 2^31; every shard takes its part, rounded up."""
    when_full: Rows[Literal["evict", "refuse"]] = "evict"
    """What happens to a new id in a full shard: evict removes the rows longest unused; refuse gives it the cold row."""
    admit_after: Rows[Annotated[int, Field(ge=1, le=255)]] = 1
    """Training steps in which an id has to occur before it has a row of its own; until then it has the cold row."""
    expire_days: Rows[Annotated[int, Field(ge=1, le=36_500)] | None] = None
    """Rows unused for more days are removed when a run of a later day begins; null: never."""


def _kind_of_table(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    if kind == "exact":
        return f"{KIND}exact"
    return None if isinstance(value, Mapping) else f"{KIND}rows"


TableConfig = Annotated[
    Annotated[TableRows, Tag(f"{KIND}rows")] | Annotated[ExactTableConfig, Tag(f"{KIND}exact")],
    Discriminator(
        _kind_of_table,
        custom_error_type="kind_of_table",
        custom_error_message="it should be a number of rows, or {kind: exact, max_rows: NUMBER}",
    ),
]


class ModelConfig(Section):
    """The DICM: base net, which images, how they are pooled, the widths, the rows of each ID table."""

    base: Parameters[BaseNet | OwnNet] = "mlp"
    """The net above the inputs: lr, mlp (Embedding&MLP), din, dcn (DCN-v2), finalmlp, two_tower (for pre-ranking), or
    the dotted path of a class of your own, as mypackage.MyNet (docs/CODE.md)."""
    images: Parameters[SeenImages] = "both"
    """Which images the model sees; image ids are ID fields in all four."""
    pooling: Parameters[Pooling] = "attentive"
    """How the vectors of the behaviour images become one: attentive asks with the ad image, multi_query also with the
    ad's ids; two towers sum."""
    pooling_length: Parameters[Annotated[int, Field(ge=1, le=1_000)]] = 32
    """Pooling concat: behaviours taken, the newest; fewer are filled up with zeros."""
    image_products: Parameters[bool] = True
    """Give the base net the mean of the behaviour images times a projection of the ad's vectors, too; not lr and
    two_tower."""
    shared_image_model: Parameters[bool] = True
    """One E for all content fields of a store, or one for each field."""
    id_width: Rows[Width] = 12
    """Width of an ID field's vector where the schema names none."""
    visual_width: Parameters[Width] = 12
    """Width of the vector that E makes where the schema names none; equal to id_width it saves a collective."""
    embed_hidden: Parameters[list[Width]] = Field(default=[256, 64])
    """E's hidden layers: E is 4096-256-64-12."""
    mlp: Parameters[list[Width]] = Field(default=[200, 80], min_length=1)
    """Hidden layers of the MLP."""
    attention_hidden: Parameters[Width] = 16
    """Hidden units that weigh a behaviour against the ad: its image in attentive pooling, its ids in DIN."""
    tower_width: Parameters[Width] = 32
    """Base two_tower: width of user and ad vectors."""
    cross_layers: Parameters[Annotated[int, Field(ge=1, le=16)]] = 3
    """Base dcn: cross layers."""
    cross_structure: Parameters[Literal["parallel", "stacked"]] = "parallel"
    """Base dcn: the MLP next to the cross layers, or on top of them."""
    multi_hot: Parameters[Literal["mean", "sum"]] = "mean"
    """How the ID vectors of a field with several values a row become one."""
    activation: Parameters[Activation] = "relu"
    """Of the networks' hidden layers, E aside; the paper has prelu."""
    init: Parameters[Literal["xavier", "torch"]] = "xavier"
    """Start of the networks' linear layers, E aside: normal weights and no bias, or torch's own; base lr
    has torch's."""
    batch_norm: Parameters[bool] = False
    """Standardise what goes into each activation of an MLP by mean and variance of the global batch."""
    dropout: Training[Annotated[float, Field(ge=0, le=0.95)]] = 0.0
    """Share of the units of an MLP's hidden layers that a training sample goes without."""
    id_dropout: Training[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    """Share of training samples whose ad is taken for a new one: the vectors of its own IDs are zero."""
    id_proxy: Parameters[bool] = False
    """Add to the vectors of the ad's own IDs what a small net makes of its visual vectors, so that a new ad has some
    (docs/CHOICES.md)."""
    image_dropout: Parameters[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    """Share of training samples whose ad has no picture: its visual vectors are zero. Evaluations then decide, on ads
    that training has not seen, whether pictures of new ads count, or are zero too (docs/CHOICES.md); needs id_init_std
    of 0.001 or less."""
    compute_dtype: Parameters[ComputeDType | Literal["auto"]] = "auto"
    """Type of E's matrix products; all else is float32, or float64 with them, which is slow and for checks. auto:
    bfloat16 where the hardware of all ranks is quick at it, else float32; a run keeps what it began with."""
    id_init_std: Rows[Annotated[float, Field(ge=0, le=1)]] = 0.0001
    """Standard deviation of an ID vector's first numbers, which are uniform around zero."""
    table_shards: Rows[Annotated[int, Field(ge=1, le=1 << 20)]] = 64
    """Shards of every ID table, a power of two; a checkpoint needs the same number, at any number of ranks."""
    tables: Rows[dict[str, TableConfig]] = Field(
        default={
            name: ExactTableConfig(kind="exact", max_rows=1 << 20)
            for name in ("user", "item", "image", "category", "scene")
        }
    )
    """Each ID table by name: a row for each id, as {kind: exact, max_rows: 2000000, admit_after: 3, expire_days: 30};
    or a number of rows into which ids are hashed, rounded up to fill every shard (docs/CHOICES.md)."""

    @field_validator("base", mode="before")
    @classmethod
    def _names_a_net(cls, value: Any) -> Any:
        ours = get_args(BaseNet)
        if value in ours or (isinstance(value, str) and _DOTTED.fullmatch(value)):
            return value
        raise ValueError(
            f"it should be {', '.join(map(repr, ours))}, or the dotted path of a class of your own, as mypackage.MyNet"
        )

    @field_validator("pooling")
    @classmethod
    def _queries_there(cls, value: str, info: ValidationInfo) -> str:
        if value == "multi_query" and info.data.get("images") == "behavior":
            raise ValueError(
                "it queries with the ad image and with the ad's IDs; set model.images=both, "
                "or model.pooling=attentive, which without an ad image queries with the ad's IDs"
            )
        return value

    @model_validator(mode="after")
    def _new_ads_are_distinct(self) -> "ModelConfig":
        if self.image_dropout and self.id_init_std > LARGEST_UNTRAINED:
            raise ValueError(
                f"model.image_dropout={self.image_dropout} takes an ad for new while its ID rows lie where rows start, "
                f"and with model.id_init_std={self.id_init_std} trained rows lie there too; set it to "
                f"{LARGEST_UNTRAINED} or less"
            )
        return self

    @field_validator("table_shards")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("it has to be a power of two, as 64")
        return value


class OptimConfig(Section):
    """Adam for dense parameters, `ids` for the rows of ID tables; every `lr_every` steps rates shrink by `lr_gamma`."""

    lr: Training[LearningRate] = 0.001
    """Learning rate."""
    ids: Rows[IdOptimizer] = "adam"
    """Optimiser of ID rows: adam as on the whole table, at the cost of the touched rows; rowwise_adagrad with one sum
    of squares a row, for a third of the memory."""
    ids_lr: Training[LearningRate | None] = 0.006
    """Learning rate of ID rows; null: lr."""
    warmup_steps: Training[Annotated[int, Field(ge=0, lt=2**63)]] = 0
    """Steps in which both rates grow evenly, from 1 / warmup_steps of their values to all of them."""
    weight_decay: Training[Annotated[float, Field(ge=0, le=10)]] = 0.0
    """Of dense matrices, decoupled as in AdamW: lr x this x the weight is taken off in each step."""
    lr_gamma: Training[RateDecay] = 0.9
    """Both rates times this after every lr_every steps."""
    lr_every: Training[Count] = 24_000
    """Steps between two times that the rates shrink."""
    beta1: Rows[Annotated[float, Field(ge=0, lt=1)]] = 0.9
    """Adam: weight of the past in the running mean of gradients."""
    beta2: Rows[Annotated[float, Field(ge=0, lt=1)]] = 0.999
    """Adam: the same of their squares."""
    eps: Rows[Annotated[float, Field(gt=0)]] = 1e-8
    """Adam: added to the root of the latter."""

    @property
    def alpha(self) -> float:
        """The learning rate of ID rows before warm-up and decay."""
        return self.lr if self.ids_lr is None else self.ids_lr
