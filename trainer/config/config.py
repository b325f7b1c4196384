"""The configuration of a run: preset < file < `--set`, merged by OmegaConf, checked by pydantic before all else.

Every value has its default, and its explanation, in `presets/dicm.yaml`; here and in `options.py`
stand the types and the limits.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, Field, field_validator, model_validator
from yaml import YAMLError

from featurestore.console.files import replace_file
from featurestore.storage.regular import read_text
from featurestore.text.plain import one_line
from trainer.config import legacy
from trainer.config.options import Count, ExchangeConfig, ModelConfig, OptimConfig
from trainer.config.validate import Section, validated
from trainer.errors import ConfigError

PRESETS = Path(__file__).parents[1] / "presets"
DEFAULT_PRESET = PRESETS / "dicm.yaml"

Device = Literal["auto", "cpu", "cuda"]
WarmPart = Literal["images", "model", "ids"]
MissingPolicy = Literal["error", "zeros", "learned"]
WARM_PARTS: dict[Any, list[WarmPart]] = {
    "none": [],
    "partial": ["images", "model"],
    "full": ["images", "model", "ids"],
}
Version = Annotated[int, Field(ge=0, lt=2**63)]
Place = Annotated[str, Field(min_length=1)]


def _calendar_day(value: str) -> str:
    date.fromisoformat(value)
    return value


Day = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$"), AfterValidator(_calendar_day)]


class DataConfig(Section):
    """What is read, in which order, and how much of it makes one step."""

    samples: Place
    train_days: Annotated[list[Day], Field(min_length=1)] | None
    test_days: list[Day] | None
    store: Place
    store_version: Version | None
    stores: dict[str, Place]
    store_versions: dict[str, Version]
    cache_dir: Place | None
    schema_file: Place | None
    global_batch_size: Count
    shuffle: bool
    shuffle_window_groups: Count
    prefetch_batches: Annotated[int, Field(ge=0, le=16)]
    missing: MissingPolicy


class TrainConfig(Section):
    """Length of the run, and what happens every so many steps."""

    epochs: Count
    max_steps: Count | None
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    log_every: Count
    eval_every: Count | None
    eval_batch_size: Count
    early_stopping: Count | None
    checkpoint_every: Count | None
    keep_checkpoints: Count


class RunConfig(Section):
    """Where the run is written, and whether it goes on from, or begins with, an earlier one."""

    dir: Place
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None
    resume: Place | None
    warm_start: Place | None
    warm_parts: list[WarmPart]
    """What a warm start takes; a file or --set may also say none, partial (all but ids) or full."""
    overwrite: bool
    device: Device
    threads: Count | None
    deadline_s: Annotated[float, Field(gt=0)]
    profile: bool

    @field_validator("warm_parts", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in WARM_PARTS:
            raise ValueError("it should be none, partial, full, or a list of images, model, ids, as [images,model]")
        return WARM_PARTS[value] if isinstance(value, str) else value

    @field_validator("dir")
    @classmethod
    def _local(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("runs are written to a local or shared disk; give a folder, as data/runs")
        return value


class Config(Section):
    """A whole, checked configuration."""

    data: DataConfig
    model: ModelConfig
    exchange: ExchangeConfig
    optim: OptimConfig
    train: TrainConfig
    run: RunConfig

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.run.resume == "latest" and self.run.overwrite:
            raise ValueError(
                "run.resume=latest goes on from the newest checkpoint and run.overwrite=true removes it; set one of "
                "them, or resume from the path of an earlier one"
            )
        if self.run.resume == "latest" and self.run.name is None:
            raise ValueError("run.resume=latest needs the run's name; add run.name=NAME")
        if self.train.early_stopping and self.train.eval_every is None:
            raise ValueError("train.early_stopping counts evaluations; set train.eval_every=STEPS too")
        if self.train.early_stopping and self.data.test_days == []:
            raise ValueError("train.early_stopping needs test samples to evaluate on; data.test_days=[] names none")
        if both := set(self.data.train_days or []) & set(self.data.test_days or []):
            raise ValueError(f"data.train_days and data.test_days share {', '.join(sorted(both))}; a day is for one")
        return self


def load_config(file: Path | None = None, settings: Sequence[str] = ()) -> Config:
    """The preset, over it `file`, over that `settings` (each `section.field=value`). Raises ConfigError."""
    if file is not None and legacy.is_saved(file):
        return load_saved(file, settings)
    return _checked([] if file is None else [(_read(file), str(file))], settings)


def load_saved(file: Path, settings: Sequence[str] = ()) -> Config:
    """As `load_config`, of a `file` that an earlier version of the project may have saved. Raises ConfigError."""
    return _checked([(OmegaConf.create(legacy.up_to_date(_plain(_read(file)))), str(file))], settings)


def _checked(files: Sequence[tuple[DictConfig, str]], settings: Sequence[str]) -> Config:
    merged = _read(DEFAULT_PRESET)
    for above, source in [*files, *((_parse_setting(setting), f"--set {setting}") for setting in settings)]:
        if lines := [f"{source}: {old} is {new} now" for old, new in legacy.moved(_plain(above))]:
            raise ConfigError("\n".join(lines))
        merged = _merge(merged, above, source)
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as failure:
        raise ConfigError(f"an interpolation of the configuration leads nowhere: {one_line(failure)}") from failure
    assert isinstance(values, dict)
    return validated(Config, {str(name): value for name, value in values.items()}, "configuration", ConfigError)


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration as YAML, all of it or none; `load_config(path)` gives an equal one."""
    replace_file(path, OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def config_digest(values: dict[str, Any]) -> str:
    """sha256 of a configuration (or a section of it) in canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(io.StringIO(read_text(path)))
    except FileNotFoundError as failure:
        raise ConfigError(f"--config {path}: there is no such file") from failure
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException, RecursionError) as failure:
        raise ConfigError(f"{path} is not a readable YAML file: {one_line(failure)}") from failure
    if not isinstance(loaded, DictConfig):
        sections = ", ".join(Config.model_fields)
        raise ConfigError(f"{path} has to be a mapping of sections ({sections}), found a list")
    return loaded


def _plain(values: DictConfig) -> dict[str, Any]:
    """The values by section, interpolations as they were written."""
    plain = OmegaConf.to_container(values, resolve=False)
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def _parse_setting(setting: str) -> DictConfig:
    name, equals, _ = setting.partition("=")
    if not equals or "." not in name:
        raise ConfigError(f"--set {setting}: it has to be section.field=value, as train.epochs=1")
    try:
        return OmegaConf.from_dotlist([setting])
    except (YAMLError, OmegaConfBaseException, RecursionError) as failure:
        raise ConfigError(f"--set {setting}: the value is not readable as YAML: {one_line(failure)}") from failure


def _merge(below: DictConfig, above: DictConfig, source: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(below, above)
    except TypeError as failure:
        raise ConfigError(
            f"{source}: a list stands where a mapping of names to values belongs, or the other way round"
        ) from failure
    except OmegaConfBaseException as failure:
        raise ConfigError(f"{source}: {one_line(failure)}") from failure
    assert isinstance(merged, DictConfig)
    return merged
