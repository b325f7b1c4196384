"""The configuration of a run: its settings, how they are given, checked and saved, and how two records differ.

A setting is a field of a class: its type, limits, default, the kind of what it decides, and below it its text.
`load_config` lays a file and `--set` over the defaults and checks the result (pydantic).
`differences` compares two records of settings; resuming, warm starts, evaluation, `trainer.daily` and `trainer.compat`
say which kinds of differences they accept. docs/SETTINGS.md is written from the classes by `python -m tools.settings`.
Quick to import: without torch.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from featurestore.errors import ChannelError, StorageError
from featurestore.lookup import ComputeDType
from featurestore.parsing import format_yaml, parse_yaml
from featurestore.published.paths import RunPath, read_text, run_path, write_file
from featurestore.published.versions import check_channel_name
from featurestore.spec import MissingPolicy, differing
from featurestore.text import near_match, without_passwords
from trainer.errors import ConfigError, TrainerError
from trainer.problems import Problem

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
"""The kind of a setting, which is part of its type; `trainer.config.differences` compares runs by it."""


Positions = Annotated[Value, "positions"]
Parameters = Annotated[Value, "parameters"]
Rows = Annotated[Value, "rows"]
Training = Annotated[Value, "training"]
Nothing = Annotated[Value, "nothing"]


class Section(BaseModel):
    """A part of a configuration: immutable, no unknown names, no silent conversion of a string to a number."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def decision_of(field: FieldInfo) -> Decision:
    """Return the kind of the setting of this field. Raises StopIteration if its type has none."""
    return next(kind for kind in DECISIONS if kind in field.metadata)


def validated(model: type[Model], values: Mapping[str, Any], source: str, error: type[TrainerError]) -> Model:
    """Check `values` and return them as `model`.

    Raises `error`, one line per mistake: the field, the value, the limit, the way out.
    """
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as failure:
        lines = [_explain(model, details) for details in failure.errors(include_url=False)]
        raise error("\n".join(f"{source}: {line}" for line in lines)) from failure


def _explain(model: type[BaseModel], details: ErrorDetails) -> str:
    path = [str(part) for part in details["loc"] if not str(part).startswith(KIND)]
    name = ".".join(path)
    match details["type"]:
        case "extra_forbidden":
            prefix = ".".join([*path[:-1], ""]).lstrip(".")
            return Problem.SETTING_UNKNOWN.of(name, near_match(path[-1], _names_at(model, path[:-1]), prefix))
        case "missing":
            return Problem.MISSING.of(name)
        case "model_type" | "model_attributes_type":
            return Problem.SETTING_NOT_A_MAPPING.of(name or "the file", details["input"])
        case _:
            message = details["msg"].removeprefix("Value error, ").replace("Input should", "it should")
            if not name or (details["type"] == "value_error" and isinstance(details["input"], Mapping)):
                return message  # concerns several fields, which its message names
            return without_passwords(Problem.SETTING_WRONG.of(name, details["input"], message))


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
    Annotated[TableRows, pydantic.Tag(f"{KIND}rows")] | Annotated[ExactTableConfig, pydantic.Tag(f"{KIND}exact")],
    pydantic.Discriminator(
        _kind_of_table,
        custom_error_type="kind_of_table",
        custom_error_message=Problem.NOT_TABLE_ROWS.of(),
    ),
]


class ModelConfig(Section):
    """The DICM: base net, which images, how they are pooled, the widths, the rows of each ID table."""

    base: Parameters[BaseNet | str] = "mlp"
    """The net above the inputs: lr, mlp (Embedding&MLP), din, dcn (DCN-v2), finalmlp, two_tower (for pre-ranking), or
    the dotted path of a class of your own, as mypackage.MyNet (docs/CODE.md)."""
    images: Parameters[SeenImages] = "both"
    """Which images the model sees; image ids are ID fields in all four."""
    pooling: Parameters[Pooling] = "attentive"
    """Pooling of behaviour images' vectors: attentive queries with the ad image, multi_query also with the ad's
    ids; two towers sum."""
    pooling_length: Parameters[Annotated[int, Field(ge=1, le=1_000)]] = 32
    """Pooling concat: behaviours taken, the newest; fewer are filled up with zeros."""
    image_products: Parameters[bool] = True
    """Give the base net the mean of the behaviour images times a projection of the ad's vectors, too; not lr and
    two_tower."""
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
    """Base dcn: cross layers, next to the MLP."""
    multi_hot: Parameters[Literal["mean", "sum"]] = "mean"
    """How the ID vectors of a field with several values a row become one."""
    activation: Parameters[Activation] = "relu"
    """Activation of hidden layers, except E's; the paper has prelu."""
    dropout: Training[Annotated[float, Field(ge=0, le=0.95)]] = 0.0
    """Share of the units of an MLP's hidden layers that a training sample goes without."""
    id_dropout: Training[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    """Share of training samples whose ad is treated as new: the vectors of its own IDs are zero."""
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

    @pydantic.field_validator("base", mode="before")
    @classmethod
    def _names_a_net(cls, value: Any) -> Any:
        ours = get_args(BaseNet)
        if value in ours or (isinstance(value, str) and _DOTTED.fullmatch(value)):
            return value
        raise ValueError(Problem.NOT_A_NET.of(", ".join(map(repr, ours))))

    @pydantic.field_validator("pooling")
    @classmethod
    def _queries_there(cls, value: str, info: pydantic.ValidationInfo) -> str:
        if value == "multi_query" and info.data.get("images") == "behavior":
            raise ValueError(Problem.POOLING_WITHOUT_AD_IMAGE.of())
        return value

    @pydantic.model_validator(mode="after")
    def _new_ads_are_distinct(self) -> "ModelConfig":
        if self.image_dropout and self.id_init_std > LARGEST_UNTRAINED:
            values = self.image_dropout, self.id_init_std, LARGEST_UNTRAINED
            raise ValueError(Problem.IMAGE_DROPOUT_NEEDS_SMALL_START.of(*values))
        return self

    @pydantic.field_validator("table_shards")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(Problem.NOT_A_POWER_OF_TWO.of())
        return value


class OptimConfig(Section):
    """Adam for dense parameters, `ids` for the rows of ID tables; every `lr_every` steps rates shrink by `lr_gamma`."""

    lr: Training[LearningRate] = 0.001
    """Learning rate."""
    ids: Rows[IdOptimizer] = "adam"
    """Optimiser of ID rows: adam as on the whole table, at the cost of the touched rows; rowwise_adagrad with one sum
    of squares a row, for a third of the memory."""
    ids_lr: Training[LearningRate | None] = 0.012
    """Learning rate of ID rows; null: lr."""
    warmup_steps: Training[Annotated[int, Field(ge=0, lt=2**63)]] = 0
    """Steps in which both rates grow evenly, from 1 / warmup_steps of their values to all of them."""
    lr_gamma: Training[RateDecay] = 0.9
    """Both rates times this after every lr_every steps."""
    lr_every: Training[Count] = 24_000
    """Steps between two times that the rates shrink."""
    plateau_gamma: Training[RateDecay] = 0.1
    """Both rates times this after each evaluation on data.validation_days whose AUC is no better than all before."""
    eps: Rows[Annotated[float, Field(gt=0)]] = 1e-8
    """Added to the root of the mean of squared gradients (Adam, with betas of .9 and .999), or of their sum."""

    @property
    def alpha(self) -> float:
        """The learning rate of ID rows before warm-up and decay."""
        return self.lr if self.ids_lr is None else self.ids_lr


Device = Literal["auto", "cpu", "cuda"]
Tracking = Literal["mlflow", "wandb"]
WarmParts = Literal["partial", "all"]


def _version(value: Any) -> int | str:
    if isinstance(value, str) and not value.isdigit():
        try:
            return check_channel_name(value)
        except ChannelError as failure:
            raise ValueError(str(failure)) from failure
    if isinstance(value, bool) or not isinstance(value, int | str) or not 0 <= int(value) < 2**63:
        raise ValueError(Problem.NOT_A_SNAPSHOT.of(value))
    return int(value)


Version = Annotated[int | str, pydantic.BeforeValidator(_version)]


def _without_password(value: str) -> str:
    if without_passwords(value) != value:
        raise ValueError(Problem.PASSWORD_IN_SETTING.of())
    return value


Place = Annotated[str, Field(min_length=1), pydantic.AfterValidator(_without_password)]


def _one_day(value: object) -> object:
    return [value] if isinstance(value, str) else value


Day = Annotated[str, pydantic.AfterValidator(lambda value: date.fromisoformat(value).isoformat())]


class DataConfig(Section):
    """What is read, in which order, and how much of it makes one step."""

    samples: Nothing[Place] = "data/samples"
    """Folder or s3:// url with train/*.parquet and test/*.parquet, from crossmedia samples."""
    train_days: Positions[Annotated[list[Day], Field(min_length=1)] | None] = None
    """Train on the files day=DAY*.parquet of these days, as [2026-01-01], in train/ or test/; null: all of train/."""
    test_days: Training[list[Day] | None] = None
    """Evaluate on these days; []: no evaluation; null: all of test/."""
    validation_days: Positions[
        Annotated[Annotated[int, Field(ge=0)] | list[Day] | None, pydantic.BeforeValidator(_one_day)]
    ] = None
    """Do not train on this number of the last training days, or on these days: evaluate on them after each epoch, and
    end with the best one, by GAUC. null: a tenth of the days, one at least, where train.epochs is 3 or more and there
    are four days or more, or with train.early_stopping; else 0, also with train.max_steps or train.eval_every. On
    resume, null means the days that the checkpoint has recorded."""
    store: Nothing[Place] = "data/features"
    """Feature store, from crossmedia extract."""
    store_version: Nothing[Version | None] = None
    """A snapshot's number, or a channel of the store, as stable, looked up when the run begins; null: the newest.
    On resume, null and a channel mean the snapshot that the checkpoint has recorded."""
    stores: Nothing[dict[str, Place]] = Field(default={})
    """Further stores of content fields by name, as {titles: data/titles}; data.store is the one named images."""
    store_versions: Nothing[dict[str, Version]] = Field(default={})
    """store_version of the stores above."""
    cache_dir: Nothing[Place | None] = None
    """Folder of the memory-mapped rows of this machine's shards; null: the store's default place."""
    schema_file: Nothing[Place | None] = None
    """Schema of the samples; null: trainer/presets/schema.yaml."""
    global_batch_size: Positions[Count] = 512
    """Samples of one step, over all ranks; raise it with the data (the paper: 60,000)."""
    shuffle: Positions[bool] = True
    """Read every epoch in another order, drawn from train.seed."""
    shuffle_window: Positions[Count] = 500_000
    """Samples that all ranks together mix, and hold; fewer save memory. Each stream holds a row group of the files (of
    2,048 sample groups) at least."""
    shuffle_streams: Positions[Count | None] = None
    """Streams that every batch takes its samples from. Each rank reads some of them: choose a multiple of the ranks.
    null: one for each 64 samples of a batch, and as many as the window has row groups for."""
    missing: Training[MissingPolicy] = "learned"
    """What an image without a feature does: end the run, be zeros, or have a trained "no image" vector."""


class TrainConfig(Section):
    """Length of the run, and how often it logs, evaluates and writes a checkpoint."""

    epochs: Training[Count] = 2
    """Passes over the training samples; 2 as in the paper. 3 or more hold days out to choose the best one: see
    data.validation_days."""
    max_steps: Training[Count | None] = None
    """Stop after this many steps in all; null: after all epochs."""
    seed: Positions[Annotated[int, Field(ge=0, lt=2**63)]] = 0
    """Seed of the initial parameters and of the samples' order."""
    log_every: Nothing[Count] = 10
    """Steps between two entries of TensorBoard and of the log."""
    eval_every: Training[Count | None] = None
    """Steps between two evaluations, on the test samples unless there are validation days; null: after each epoch.
    There is one at the end in any case."""
    eval_batch_size: Training[Count] = 8192
    """Samples of one step of an evaluation, over all ranks."""
    early_stopping: Training[Count | None] = None
    """Stop after this many evaluations in a row without a better GAUC, and end with the best; null: never."""
    checkpoint_every: Nothing[Count | None] = 1000
    """Steps between two checkpoints; null: by the clock and at the end only."""
    checkpoint_every_s: Nothing[Annotated[float, Field(gt=0)] | None] = 60
    """Seconds between two checkpoints: what a kill loses; null: by steps only."""
    checkpoint_beside: Nothing[bool] = True
    """Write checkpoints during the training, from a copy of its state; false: the training waits for each."""
    keep_checkpoints: Nothing[Count] = 3
    """Checkpoints that are kept; older ones are removed."""


class RunConfig(Section):
    """Where the run is written, and whether it continues, or begins with, an earlier one."""

    dir: Nothing[Place] = "data/runs"
    """Folder of runs, on a disk that all ranks share, or an address as s3://bucket/runs; every rank writes its part of
    a checkpoint there."""
    name: Nothing[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None] = None
    """Folder below run.dir; null: made from the time."""
    resume: Nothing[Place | None] = None
    """Continue from a checkpoint: latest, a step, or a path; auto: from the latest where there is one, else begin.
    Where the newest is damaged, latest and auto continue from the one before it."""
    warm_start: Training[Place | None] = None
    """Begin with parameters of this run (its folder, or a checkpoint); the schedule starts afresh."""
    warm_parts: Training[WarmParts] = "partial"
    """What a warm start takes: partial (all but the ID vectors), or all, with the optimisers' state."""
    overwrite: Nothing[bool] = False
    """Replace a run of the same name; with a step or path in resume, what came after that checkpoint."""
    tracking: Nothing[Tracking | None] = None
    """Also tell MLflow, or Weights & Biases, the settings, figures and addresses of the run; its package is an extra
    (docs/TRAIN.md). null: TensorBoard alone."""
    device: Training[Device] = "auto"
    """Device to compute on; auto: cuda if every rank has a GPU and the collectives go by NCCL."""
    features_on_device: Nothing[Literal["auto"] | bool] = "auto"
    """Whether a rank holds its features in the memory of its device; auto: on a GPU, where they take at most half of
    what is free."""
    threads: Nothing[Count | None] = None
    """Threads of torch, for each rank; null: processor cores / ranks on this machine."""
    deadline_s: Nothing[Annotated[float, Field(gt=0)]] = 600
    """Seconds; a collective that takes longer ends the run and names the rank that did not come."""

    @pydantic.field_validator("resume", mode="before")
    @classmethod
    def _step(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value


class Config(Section):
    """A whole, checked configuration."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()

    def changed(self, **sections: dict[str, Any]) -> "Config":
        """Copy the configuration with these values, by section; they are not checked."""
        updated = {name: getattr(self, name).model_copy(update=values) for name, values in sections.items()}
        return self.model_copy(update=updated)

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Config":
        resume = self.run.resume or ""
        if resume in ("latest", "auto") and self.run.overwrite:
            raise ValueError(Problem.RESUME_AND_OVERWRITE.of(resume))
        if self.run.name is None and (resume in ("latest", "auto") or resume.isdecimal()):
            raise ValueError(Problem.RESUME_WITHOUT_NAME.of(resume))
        stops, every, held = self.train.early_stopping, self.train.eval_every, self.data.validation_days
        if stops and every is None and held in (0, []):
            raise ValueError(Problem.EARLY_STOPPING_WITHOUT_EVALUATIONS.of())
        if stops and every and not held and self.data.test_days == []:
            raise ValueError(Problem.EARLY_STOPPING_WITHOUT_SAMPLES.of())
        if both := set(self.data.train_days or []) & set(self.data.test_days or []):
            raise ValueError(Problem.DAY_FOR_BOTH.of(", ".join(sorted(both))))
        return self


_WANTED = "a mapping of sections, as data and model"


def read_mapping(
    path: RunPath | str, setting: str, error: type[TrainerError], wanted: str = "a mapping", *, aliases: bool = True
) -> dict[str, Any]:
    """Read a YAML file; `setting` is the option with its = or space, for messages. Raises `error`.

    The file may be at an address, as s3://shop/samples/schema.yaml. `aliases`: see `parse_yaml`.
    """
    try:
        values = parse_yaml(read_text(run_path(path)), aliases)
    except FileNotFoundError as failure:
        below = "" if "://" in str(path) or Path(str(path)).is_absolute() else f" below {Path.cwd()}"
        raise error(Problem.NO_FILE_OF_SETTINGS, f"{setting}{path}", below) from failure
    except IsADirectoryError as failure:
        raise error(Problem.SETTINGS_IN_A_FOLDER, f"{setting}{path}") from failure
    except (OSError, ValueError, StorageError) as failure:
        raise error(Problem.SETTINGS_NOT_YAML, path, failure) from failure
    if not isinstance(values, Mapping):
        raise error(Problem.SETTINGS_NOT_A_MAPPING, path, wanted, type(values).__name__)
    return dict(values)


def load_config(file: RunPath | None = None, settings: Sequence[str] = ()) -> Config:
    """Merge the defaults, over them `file`, over that `settings` (each `section.field=value`). Raises ConfigError.

    Samples and a schema that the file names by ./ lie below its own folder, wherever the program runs.
    """
    given = [] if file is None else [_placed(read_mapping(file, "--config ", ConfigError, _WANTED), file)]
    return _checked([*given, *map(_parse_setting, settings)])


def _placed(values: dict[Any, Any], file: RunPath) -> dict[Any, Any]:
    """Resolve the places of data that a file names by ./ or as its own folder."""
    data = values.get("data")
    if not isinstance(data, dict):
        return values
    own = {
        name: place
        for name in ("samples", "schema_file")
        if isinstance(place := data.get(name), str) and (place == "." or place.startswith("./"))
    }
    folder = run_path(file).parent
    folder = folder.absolute() if str(folder) == "." else folder  # not ./ again, which a run's config.yaml would keep
    places = {name: str(folder / rest if (rest := place[2:]) else folder) for name, place in own.items()}
    return values | {"data": data | places}


def load_saved(file: RunPath) -> Config:
    """Read the configuration in a run's folder, which may be somebody else's. Raises ConfigError."""
    return _checked([read_mapping(file, "", ConfigError, _WANTED, aliases=False)], str(file))


def _checked(layers: Iterable[dict[Any, Any]], where: str = "configuration") -> Config:
    """Merge layers over the defaults, and check the result; `where`: what errors name."""
    values = Config().model_dump(mode="json")
    for layer in layers:
        _lay_over(values, layer)
    return validated(Config, {str(name): value for name, value in values.items()}, where, ConfigError)


def _lay_over(below: dict[Any, Any], above: dict[Any, Any]) -> None:
    """Update the mapping `below` with the values `above`, merging nested mappings."""
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(name), dict):
            _lay_over(below[name], value)
        else:
            below[name] = value


def save_config(config: Config, path: RunPath) -> None:
    """Write the resolved configuration atomically as YAML; `load_config(path)` returns an equal one."""
    write_file(path, format_yaml(config.model_dump(mode="json")))


def _parse_setting(setting: str) -> dict[Any, Any]:
    name, equals, text = setting.partition("=")
    if not equals or "." not in name:
        raise ConfigError(Problem.NOT_A_SETTING, setting)
    try:
        value: Any = parse_yaml(text)
    except ValueError as failure:
        raise ConfigError(Problem.SETTING_NOT_YAML, setting, failure) from failure
    section, *inner = name.split(".")
    for part in reversed(inner):
        value = {part: value}
    return {section: value}


SAMPLES_DIGEST = "data.samples_digest"
_DECISIONS: dict[str, Decision] = {
    **{
        f"{section}.{name}": decision_of(field)
        for section, model in Config.model_fields.items()
        for name, field in model.annotation.model_fields.items()  # type: ignore[union-attr]
    },
    SAMPLES_DIGEST: "positions",
}


@dataclass(frozen=True)
class Difference:
    """A value that differs between two records: `here` in the first, `there` in the second; None if missing."""

    name: str
    """Section, setting and further names inside its value, joined by dots."""
    here: Any
    there: Any
    decides: Decision

    @property
    def setting(self) -> str:
        """The setting with its section."""
        return ".".join(self.name.split(".")[:2])

    def text(self, there: str) -> str:
        """Format both values; `there` names the second record."""
        return Problem.SETTING_DIFFERS.of(self.name, self.here, self.there, there)


def differences(
    here: Mapping[str, Any], there: Mapping[str, Any], accepted: Collection[Decision] = ()
) -> list[Difference]:
    """List the differences between two records, except those of the kinds `accepted`.

    A record is a mapping of sections (data, model, optim, ...) to values by name. That of a checkpoint's origin has not
    only settings, but also the digest of the samples, the fields of the schema, and the kind of the stores' features.
    Values that are not settings are of kind `parameters`, except the samples.
    """
    found = [Difference(*each, decides_of(each[0])) for each in differing(here, there)]
    return [each for each in found if each.decides not in accepted]


def refuse_given(config: Config, settings: Collection[str], why: str) -> None:
    """Raise ConfigError, which says `why`, where one of these settings is not its default."""
    for each in differences(config.model_dump(), Config().model_dump()):
        if each.setting in settings:
            raise ConfigError(Problem.SETTING_NOT_FREE, each.name, each.here, why)


def decides_of(name: str) -> Decision:
    """Return the kind of a setting, or of another value of an origin, by its name."""
    return _DECISIONS.get(".".join(name.split(".")[:2]), "parameters")


def settings_that_decide(*kinds: Decision) -> dict[str, set[str]]:
    """List the settings of these kinds by section."""
    found: dict[str, set[str]] = {}
    for name, kind in _DECISIONS.items():
        if kind in kinds and name != SAMPLES_DIGEST:
            section, _, setting = name.partition(".")
            found.setdefault(section, set()).add(setting)
    return found
