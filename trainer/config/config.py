"""The configuration of a run: its settings, how they are given, checked and saved, and how two records differ.

The way of a setting: its class, here or in `options.py`, has its type, limits, default, text, and the kind of what it
decides. `load_config` lays a file and `--set` over the defaults and checks the result (pydantic).
`differences` compares two records of settings; resuming, warm starts, evaluation, `crossmedia daily` and `compat` say
which kinds of differences they accept. `presets/dicm.yaml` and docs/SETTINGS.md are written from the classes by
`python -m tools.settings`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from featurestore.parsing import format_yaml, parse_yaml
from featurestore.published.channels import CHANNEL_RULE, is_channel_name
from featurestore.published.paths import RunPath, write_file
from featurestore.spec import MissingPolicy, differing
from featurestore.text import without_passwords
from trainer.config.options import (
    Count,
    Decision,
    ModelConfig,
    Nothing,
    OptimConfig,
    Positions,
    Section,
    Training,
    decision_of,
    validated,
)
from trainer.errors import ConfigError
from trainer.files import read_mapping

Device = Literal["auto", "cpu", "cuda"]
WarmPart = Literal["images", "model", "ids", "optimizers"]
WARM_PARTS: dict[Any, list[WarmPart]] = {
    "none": [],
    "partial": ["images", "model"],
    "full": ["images", "model", "ids"],
    "all": ["images", "model", "ids", "optimizers"],
}


def _version(value: Any) -> int | str:
    if isinstance(value, str) and not value.isdigit():
        if not is_channel_name(value):
            raise ValueError(CHANNEL_RULE.format(name=value))
        return value
    if isinstance(value, bool) or not isinstance(value, int | str) or not 0 <= int(value) < 2**63:
        raise ValueError(f"{value!r} is neither the number of a snapshot, from 0 on, nor the name of a channel")
    return int(value)


Version = Annotated[int | str, BeforeValidator(_version)]


def _without_password(value: str) -> str:
    if without_passwords(value) != value:
        raise ValueError("an address with a password would be shown by reports and logs; give it without")
    return value


Place = Annotated[str, Field(min_length=1), AfterValidator(_without_password)]


def _calendar_day(value: str) -> str:
    date.fromisoformat(value)
    return value


def _one_day(value: object) -> object:
    return [value] if isinstance(value, str) else value


Day = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$"), AfterValidator(_calendar_day)]


class DataConfig(Section):
    """What is read, in which order, and how much of it makes one step."""

    samples: Nothing[Place] = "data/samples"
    """Folder or s3:// url with train/*.parquet and test/*.parquet, from crossmedia samples."""
    train_days: Positions[Annotated[list[Day], Field(min_length=1)] | None] = None
    """Train on the files day=DAY*.parquet of these days, as [2026-01-01], in train/ or test/; null: all of train/."""
    test_days: Training[list[Day] | None] = None
    """Evaluate on these days; []: no evaluation; null: all of test/."""
    validation_days: Positions[Annotated[Annotated[int, Field(ge=0)] | list[Day], BeforeValidator(_one_day)]] = 0
    """Do not train on this number of the last training days, or on these days: evaluate on them after each epoch, and
    end with the best one, by GAUC."""
    store: Nothing[Place] = "data/features"
    """Feature store, from crossmedia extract."""
    store_version: Nothing[Version | None] = None
    """A snapshot's number, or a channel of the store, as stable, looked up when the run begins; null: the newest.
    On resume, null and a channel mean the snapshot that the checkpoint has recorded."""
    stores: Nothing[dict[str, Place]] = Field(default={})
    """Further stores of content fields by name, as {titles: data/titles}; data.store is the one named images."""
    store_versions: Nothing[dict[str, Version]] = Field(default={})
    """As store_version, of the stores above."""
    cache_dir: Nothing[Place | None] = None
    """Folder of the memory-mapped rows of this machine's shards; null: the store's default place."""
    schema_file: Nothing[Place | None] = None
    """Which columns are what; null: trainer/presets/schema.yaml."""
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
    """Passes over the training samples; 2 as in the paper. On the demo a third one overfits with images; with IDs
    alone the best epoch is mostly 3 or 4."""
    max_steps: Training[Count | None] = None
    """Stop after this many steps in all; null: after all epochs."""
    seed: Positions[Annotated[int, Field(ge=0, lt=2**63)]] = 0
    """Of the initial parameters and of the order of the samples."""
    log_every: Nothing[Count] = 10
    """Steps between two entries of TensorBoard and of the log."""
    eval_every: Training[Count | None] = None
    """Steps between two evaluations, on the test samples unless there are validation days; null: at the end only."""
    eval_batch_size: Training[Count] = 8192
    """Samples of one step of an evaluation, over all ranks."""
    early_stopping: Training[Count | None] = None
    """Stop after this many evaluations in a row without a better GAUC, and end with the best; null: never."""
    checkpoint_every: Nothing[Count | None] = 1000
    """Steps between two checkpoints; null: by the clock and at the end only."""
    checkpoint_every_s: Nothing[Annotated[float, Field(gt=0)] | None] = 60
    """Seconds between two checkpoints: what a kill loses; more where they would take over 5 % of the time; null: by
    steps only."""
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
    warm_parts: Training[list[WarmPart]] = Field(default="partial", validate_default=True)
    """What a warm start takes: none, partial (all but the ID vectors), full, all (full and the optimisers' state), or a
    list of images (E), model, ids; optimizers only with all three."""
    overwrite: Nothing[bool] = False
    """Replace a run of the same name; with a step or path in resume, what came after that checkpoint."""
    device: Training[Device] = "auto"
    """What to compute on; auto: cuda if every rank has a GPU and the collectives go by NCCL."""
    features_on_device: Nothing[Literal["auto"] | bool] = "auto"
    """Whether a rank holds its features in the memory of its device; auto: on a GPU, where they take at most half of
    what is free."""
    threads: Nothing[Count | None] = None
    """Threads of torch, for each rank; null: processor cores / ranks on this machine."""
    deadline_s: Nothing[Annotated[float, Field(gt=0)]] = 600
    """Seconds; a collective that takes longer ends the run and names the rank that did not come."""

    @field_validator("warm_parts", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in WARM_PARTS:
            raise ValueError(
                "it should be none, partial, full, all, or a list of images, model, ids, as [images,model]"
            )
        return WARM_PARTS[value] if isinstance(value, str) else value

    @field_validator("warm_parts")
    @classmethod
    def _whole(cls, value: list[WarmPart]) -> list[WarmPart]:
        if "optimizers" in value and not {*WARM_PARTS["full"]} <= {*value}:
            raise ValueError("the optimizers' state is that of all parameters; write all, or leave optimizers out")
        return value

    @field_validator("resume", mode="before")
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

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        resume = self.run.resume or ""
        if resume in ("latest", "auto") and self.run.overwrite:
            raise ValueError(
                f"run.resume={resume} continues from the newest checkpoint, but run.overwrite=true removes it; set one "
                "of them, or resume from the path of an earlier one"
            )
        if self.run.name is None and (resume in ("latest", "auto") or resume.isdecimal()):
            raise ValueError(f"run.resume={resume} needs the run's name; add run.name=NAME")
        if self.train.early_stopping and not self.data.validation_days:
            if self.train.eval_every is None:
                raise ValueError(
                    "train.early_stopping counts evaluations; set data.validation_days=1 or train.eval_every=STEPS too"
                )
            if self.data.test_days == []:
                raise ValueError("train.early_stopping needs samples to evaluate on; data.test_days=[] names none")
        if both := set(self.data.train_days or []) & set(self.data.test_days or []):
            raise ValueError(f"data.train_days and data.test_days share {', '.join(sorted(both))}; a day is for one")
        return self


_WANTED = "a mapping of sections, as data and model"


def load_config(file: RunPath | None = None, settings: Sequence[str] = ()) -> Config:
    """Merge the defaults, over them `file`, over that `settings` (each `section.field=value`). Raises ConfigError."""
    given = [] if file is None else [read_mapping(file, "--config ", ConfigError, _WANTED)]
    return _checked([*given, *map(_parse_setting, settings)])


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
        raise ConfigError(f"--set {setting}: write it as section.field=value, e.g. train.epochs=1")
    try:
        value: Any = parse_yaml(text)
    except ValueError as failure:
        raise ConfigError(f"--set {setting}: the value is not readable as YAML: {failure}") from failure
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
OF_IMAGES = (
    *("pooling", "pooling_length", "image_products", "shared_image_model", "visual_width", "embed_hidden"),
    *("id_proxy", "image_dropout"),
)
"""Settings of the model that one without images does not use."""


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
        return f"{self.name} is {self.here!r} here, {self.there!r} {there}"


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
