"""A person's own tables as logs: a YAML file says where they are, how their columns are called, which more to keep."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from featurestore.storage.local import read_text
from featurestore.text import CsvStyle, mistakes, parse_yaml
from pipeline.errors import SampleOptionError

TimeUnit = Literal["s", "ms", "us"]
ExtraKind = Literal["id", "dense"]

REQUIRED = {
    "impressions": ("timestamp", "user", "item", "image", "label"),
    "behaviors": ("timestamp", "user", "item", "image"),
}
OPTIONAL = {"impressions": ("session", "scene", "category"), "behaviors": ("category", "dwell_s")}
# What a table without such a column has: one session a day, one scene, one category, visits that are long enough.
DEFAULTS = {"session": 0, "scene": 0, "category": 0, "dwell_s": 1e9}
KINDS = {"timestamp": "any_time", "image": "image", "label": "any_label", "dwell_s": "any_seconds"}
EXTRA_KINDS = {"id": "extra_id", "dense": "dense"}
TAKEN = ("day", "label", *REQUIRED["impressions"], *OPTIONAL["impressions"])


@dataclass(frozen=True)
class TableLayout:
    """The files of one log: how they name and type what is needed; pickles to workers."""

    files: str  # below the logs' folder: a file, or a folder of them
    names: dict[str, str]  # the files' name of each of our columns
    kinds: dict[str, str]  # see pipeline.samples.logs
    constants: dict[str, float]  # columns that the files do not have
    user_columns: tuple[str, ...]
    ad_columns: tuple[str, ...]
    csv: "CsvSettings"
    time_unit: TimeUnit | None
    """Of whole numbers; None: found in the first file."""
    time_format: str | None
    found_style: CsvStyle | None = None

    @property
    def unit(self) -> TimeUnit:
        """The unit of whole numbers, once it was found."""
        return self.time_unit or "s"

    @property
    def style(self) -> CsvStyle:
        """How CSV files are written, once that was found."""
        return self.found_style or CsvStyle()


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ExtraColumn(_Section):
    """A further column. id: whole numbers or text; dense: a real number."""

    kind: ExtraKind
    column: str | None = None
    """In the files; default: the name it gets."""


def _short_form(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Extras = dict[str, Annotated[ExtraColumn, BeforeValidator(_short_form)]]


class MappedTable(_Section):
    """The mapping of one of the two tables."""

    files: Annotated[str, Field(min_length=1)] | None = None
    columns: dict[str, str] = {}
    """The files' name of each of our columns; a required one that is left out has our name."""
    user: Extras = {}
    ad: Extras = {}


def _delimiter(value: str) -> str:
    if len(value) != 1 or not value.isascii() or not (value.isprintable() or value == "\t") or value == '"':
        raise ValueError(f'{value!r} is not one ASCII character, other than " and line breaks')
    return value


class CsvSettings(_Section):
    """How CSV files are written; the first line names the columns. What is not given is found in the first file."""

    delimiter: Annotated[str, AfterValidator(_delimiter)] | None = None
    encoding: str | None = None
    """As utf-8, latin-1 or cp1252."""
    decimal: Literal[".", ","] | None = None
    """Between a whole number and its fraction."""


def _time_format(value: str) -> str:
    try:
        moment = datetime.strptime(datetime(2026, 2, 5, 13, 45, 30, tzinfo=UTC).strftime(value), value)
    except ValueError as failure:
        raise ValueError(f"{value!r} is not a format of Python's strptime: {failure}") from failure
    if (moment.year, moment.month, moment.day) != (2026, 2, 5):
        raise ValueError(f"{value!r} does not have year, month and day, as %d/%m/%Y %H:%M has them")
    return value


class LogMapping(_Section):
    """The whole mapping file."""

    impressions: MappedTable
    behaviors: MappedTable
    csv: CsvSettings = CsvSettings()
    time_unit: TimeUnit | None = None
    """Of times that are plain whole numbers; by default their size tells it."""
    time_format: Annotated[str, AfterValidator(_time_format)] | None = None
    """Of times that are not in ISO 8601, as Python's strptime takes it: "%d/%m/%Y %H:%M"."""

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        for log, table in (("impressions", self.impressions), ("behaviors", self.behaviors)):
            known = (*REQUIRED[log], *OPTIONAL[log])
            if unknown := [name for name in table.columns if name not in known]:
                raise ValueError(f"{log}.columns.{unknown[0]} is unknown; known: {', '.join(known)}")
        if self.behaviors.user or self.behaviors.ad:
            raise ValueError("behaviors has no user or ad columns; further ones belong below impressions")
        for name in (*self.impressions.user, *self.impressions.ad):
            if name in TAKEN or name.startswith(("behavior_", "ad_")):
                raise ValueError(
                    f"a further column cannot be called {name}: the samples have that; rename it by column:"
                )
        if both := self.impressions.user.keys() & self.impressions.ad.keys():
            raise ValueError(f"{min(both)} is below user and below ad; give one of them another name by column:")
        return self

    def layout(self, log: str) -> TableLayout:
        """Describe how to read the files of `impressions` or `behaviors`."""
        table: MappedTable = getattr(self, log)
        extras = table.user | table.ad
        names = {name: table.columns.get(name, name) for name in REQUIRED[log]}
        names |= {name: table.columns[name] for name in OPTIONAL[log] if name in table.columns}
        kinds = {name: KINDS.get(name, "any_id") for name in names}
        names |= {name: extra.column or name for name, extra in extras.items()}
        kinds |= {name: EXTRA_KINDS[extra.kind] for name, extra in extras.items()}
        constants = {name: DEFAULTS[name] for name in OPTIONAL[log] if name not in names}
        return TableLayout(
            table.files or log, names, kinds, constants, tuple(table.user), tuple(table.ad), self.csv, self.time_unit,
            self.time_format,
        )  # fmt: skip


def load_mapping(path: Path) -> LogMapping:
    """Load the mapping in a YAML file. Raises SampleOptionError naming the file and what is wrong."""
    try:
        return LogMapping.model_validate(parse_yaml(read_text(path)))
    except ValidationError as error:
        raise SampleOptionError("\n".join(f"{path}: {line}" for line in mistakes(error, "mapping"))) from error
    except (OSError, ValueError) as error:
        raise SampleOptionError(f"--mapping {path} cannot be read as YAML: {error}") from error


def names_in(text: str) -> tuple[str, ...]:
    """Split an option of names with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
