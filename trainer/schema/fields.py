"""The schema: fields of samples, and how their numbers are transformed."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, model_validator

from featurestore.keys import UInt64Array, power_of_two, splitmix64
from featurestore.text import near_match
from trainer.config import read_mapping, validated
from trainer.errors import SchemaError
from trainer.problems import Problem

Transform = Literal["standardize", "log1p", "log_standardize"]
STANDARDIZED: frozenset[Transform | None] = frozenset({"standardize", "log_standardize"})
LOGARITHMIC: frozenset[Transform | None] = frozenset({"log1p", "log_standardize"})
LOG2 = "log2"
LOG2_BOUNDARIES = tuple(float(1 << power) for power in range(31))
"""1, 2, 4, .. 2**30: in seconds the last one is 34 years."""


def _ascending(values: object) -> object:
    if isinstance(values, list | tuple):
        numbers = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
        if len(numbers) < len(values) or sorted(set(numbers)) != numbers:
            raise ValueError(Problem.NOT_ASCENDING.of())
    return values


Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Numbers = tuple[Finite, ...]
Positive = tuple[Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)], ...]
Boundaries = Annotated[tuple[float, ...], BeforeValidator(_ascending)]
Buckets = Annotated[int, pydantic.Field(ge=2, le=65_536)] | Literal["log2"]
Fill = Literal["mean", "bucket"] | Finite


DEFAULT_SCHEMA = Path(__file__).parents[1] / "presets" / "schema.yaml"

DEFAULT_STORE = "images"

CROSS = " x "
"""Between the names of crossed columns."""

Side = Literal["user", "ad"]
Kind = Literal["id", "multi_id", "dense", "content"]
_IDS: tuple[Kind, ...] = ("id", "multi_id")
_KINDS_OF: Mapping[str, tuple[Kind, ...]] = {
    **dict.fromkeys(("table", "weights", "columns", "buckets", "boundaries"), _IDS),
    "store": ("content",),
    **dict.fromkeys(("transform", "mean", "std"), ("dense",)),
}
"""The kinds of fields that a setting is for; others are for all, or say themselves what they are for."""


class Field(BaseModel):
    """One field of a sample.

    kind id: one value a row, an integer or a string; multi_id: a list of them, their vectors are pooled; dense: `width`
    real numbers; content: keys of a feature store, or uris, a list a row on the user side and one a row on the ad side.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    side: Side
    kind: Kind
    table: str | None = None
    """ID kinds: the table that holds the vectors; fields may share one. Default: the field's name."""
    store: str | None = None
    """Content: the name of the feature store. Default: "images"."""
    width: PositiveInt | None = None
    """ID kinds: width of the vector, default the model's `id_width`. Content: of the visual vector, default the
    model's `visual_width`. Dense: numbers a row, default 1."""
    column: str | None = None
    """Column of the sample files. Default: the field's name."""
    weights: str | None = None
    """ID kinds: a column with a real number for each id, by which the id's vector is multiplied; default: all are 1.
    A mean divides by the sum of their absolute values."""
    columns: tuple[str, ...] | None = None
    """ID kinds: columns of the field's side whose values are crossed into one ID; lists are crossed value by value."""
    transform: Transform | None = None
    """Kind dense: standardize: minus the mean, over the standard deviation; log1p: sign(x) log(1 + |x|);
    log_standardize: the one after the other."""
    buckets: Buckets | None = None
    """ID kinds: the column has real numbers, and a number's bucket is its ID. A number of buckets, equally full in the
    training samples; or log2: below 1, to 2, to 4, to 8, and so on."""
    boundaries: Boundaries | None = None
    """Beginnings of the buckets after the first; default: as `buckets` says, found in the training samples."""
    mean: Numbers | None = None
    std: Positive | None = None
    """Kind dense: of each number of a row, after the logarithm; default: those of the training samples."""
    fill: Fill | None = None
    """Replacement of a missing number (null, NaN): a number, mean, or bucket (one of its own). Default: nothing, a
    missing number is an error."""
    beside: str | None = None
    """Kind multi_id of side user: the multi_id field whose value k this one's value k belongs to, as the age of each
    behaviour to the behaviour's item. Their lists are equally long, and DIN takes both for one behaviour."""
    context: bool = False
    """Side ad, kinds id, multi_id, dense: a value of the impression and not of the ad, as the scene. Two towers keep
    it out of the ad's vector; the other models make no difference."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        for setting, kinds in _KINDS_OF.items():
            if (value := getattr(self, setting)) is not None and self.kind not in kinds:
                known = f"kind{'s' * (len(kinds) > 1)} {' and '.join(kinds)}"
                raise ValueError(Problem.SETTING_OF_OTHER_KIND.of(self.name, setting, value, known, self.kind))
        columns = list(self.columns or ())
        if columns and self.column is not None:
            raise ValueError(Problem.TWO_OF_A_FIELD.of(self.name, f"column={self.column}", f"columns={columns}"))
        if self.columns is not None and len(set(columns)) < max(len(columns), 2):
            raise ValueError(Problem.TOO_FEW_COLUMNS.of(self.name, columns))
        self._check_numbers()
        if self.context and (self.side == "user" or self.kind == "content"):
            raise ValueError(Problem.CONTEXT_OF_NO_AD.of(self.name, self.kind, self.side))
        return self

    def _check_numbers(self) -> None:
        width = self.width or 1
        if self.is_bucketed and (self.weights is not None or self.columns is not None):
            other = f"columns={list(self.columns)}" if self.columns is not None else f"weights={self.weights}"
            raise ValueError(Problem.TWO_OF_A_FIELD.of(self.name, "buckets", other))
        is_scaled = self.transform in STANDARDIZED
        for setting, values, is_used in (
            ("mean", self.mean, is_scaled or self.fill == "mean"),
            ("std", self.std, is_scaled),
        ):
            if values is not None and not is_used:
                raise ValueError(Problem.UNUSED_STATISTIC.of(self.name, setting))
            if values is not None and len(values) != width:
                raise ValueError(Problem.STATISTIC_WIDTH.of(self.name, setting, width))
        if self.fill is None:
            return
        if not (self.kind == "dense" or self.is_bucketed):
            raise ValueError(Problem.FILL_WITHOUT_NUMBERS.of(self.name, self.fill))
        other_fill = "bucket" if self.kind == "dense" else "mean"
        if self.fill == other_fill:
            raise ValueError(Problem.FILL_OF_OTHER_KIND.of(self.name))

    @property
    def is_id(self) -> bool:
        """Whether the field's values are looked up in an ID table."""
        return self.kind in _IDS

    @property
    def is_bucketed(self) -> bool:
        """Whether the field's IDs are buckets of real numbers."""
        return self.buckets is not None or self.boundaries is not None

    @property
    def bucket_starts(self) -> tuple[float, ...] | None:
        """Lower bounds of all buckets but the first, ascending; None if they are taken from the samples."""
        return LOG2_BOUNDARIES if self.boundaries is None and self.buckets == LOG2 else self.boundaries

    @property
    def num_buckets(self) -> int:
        """Buckets of numbers, and one for missing ones."""
        found = len(self.bucket_starts or ()) + 1
        return (max(found, self.buckets) if isinstance(self.buckets, int) else found) + 1

    @property
    def lacks_statistics(self) -> bool:
        """Whether the training samples have to tell something that the schema does not."""
        lacks_mean = self.mean is None and (self.transform in STANDARDIZED or self.fill == "mean")
        lacks_std = self.std is None and self.transform in STANDARDIZED
        return lacks_mean or lacks_std or (self.is_bucketed and self.bucket_starts is None)

    @property
    def table_name(self) -> str:
        """The table that holds the vectors of an ID field."""
        return self.table or self.name

    @property
    def store_name(self) -> str:
        """The feature store that a content field's keys belong to."""
        return self.store or DEFAULT_STORE

    @property
    def column_name(self) -> str:
        """The column of the sample files that holds the field; of crossed columns a name for all of them together."""
        return CROSS.join(self.columns) if self.columns else self.column or self.name


class Schema(BaseModel):
    """The fields of a sample and the roles of a few columns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fields: tuple[Field, ...]
    label: str = "label"
    group: str = "user"
    """Column whose value groups samples for GAUC."""
    time: str = "timestamp"
    """Column with a group's time, in seconds since 1970 or as a timestamp; files of scores have it, if it is there."""
    new_ad_field: str = "ad_item"
    """Ad-side field: an impression is of a new ad when its value was never in training."""

    @model_validator(mode="after")
    def _names_and_widths_agree(self) -> Self:
        seen: set[str] = set()
        first_of: dict[str, Field] = {}
        lists = [each.name for each in self.of_kind("multi_id", side="user") if each.beside is None]
        for field in self.fields:
            if field.name in seen:
                raise ValueError(Problem.FIELD_TWICE.of(field.name))
            seen.add(field.name)
            is_list = (field.kind, field.side) == ("multi_id", "user")
            if field.beside is not None and not (is_list and field.beside in lists):
                raise ValueError(Problem.WRONG_BESIDE.of(field.name, field.beside, ", ".join(lists) or "none"))
            if field.kind == "dense":
                continue
            shared = f"table {field.table_name}" if field.is_id else f"store {field.store_name}"
            first = first_of.setdefault(shared, field)
            if first.width != field.width:
                raise ValueError(Problem.TWO_WIDTHS.of(first.name, field.name, shared, first.width, field.width))
        return self

    @property
    def new_ad_column(self) -> str:
        """The column that tells ads apart: that of `new_ad_field`."""
        return next(field.column_name for field in self.fields if field.name == self.new_ad_field)

    def of_kind(self, *kinds: Kind, side: Side | None = None) -> Iterator[Field]:
        """List fields of these kinds, on one side or both, in the schema's order."""
        return (f for f in self.fields if f.kind in kinds and side in (None, f.side))


def load_schema(path: Path | str | None = None) -> Schema:
    """Read the schema in a YAML file, by default the packaged one. Raises SchemaError naming the file and the field."""
    path = path or DEFAULT_SCHEMA
    values = read_mapping(path, "data.schema_file=", SchemaError, "a mapping with the name fields")
    schema = validated(Schema, values, str(path), SchemaError)
    ad_ids = [field.name for field in schema.of_kind("id", side="ad") if not field.is_bucketed]
    if schema.new_ad_field not in ad_ids:
        near = near_match(schema.new_ad_field, ad_ids) if ad_ids else "the schema has none"
        raise SchemaError(Problem.WRONG_NEW_AD, path, schema.new_ad_field, near)
    return schema


SCHEMA_FILE, SETTINGS_FILE = "schema.yaml", "settings.yaml"
"""Written next to samples, for trainer.main --config SAMPLES/settings.yaml."""
IMAGES_FILE = "images.parquet"
"""Next to samples: key and uri of each image that the logs name, in 256 row groups by the top bits of the key."""
IDS_FILE = "ids.parquet"
"""Next to samples, and in a run's folder: id and text of each ID that is a hash, in 256 row groups by its top bits."""

_DAY_FILE = re.compile(r"day=(\d{4}-\d{2}-\d{2})(?!\d)")
_MONTH_FILE = re.compile(r"days=(\d{4}-\d{2})-([0-9a-f]{8})\.parquet")


def file_of_month(days: Sequence[str]) -> str:
    """Name the file that days of one month share, as days=2026-01-00000005.parquet the first and the third of January.

    The digits have a bit for each day; in the file each of them has a row group, in their order.
    """
    return f"days={days[0][:7]}-{sum(1 << (int(day[8:]) - 1) for day in days):08x}.parquet"


def days_of_file(name: str) -> list[str]:
    """List the days of which a file of samples is, ascending, by its name: day=2026-01-31..., or `file_of_month`."""
    if match := _DAY_FILE.match(name):
        return [match[1]]
    if match := _MONTH_FILE.fullmatch(name):
        return [f"{match[1]}-{bit + 1:02d}" for bit in range(31) if int(match[2], 16) >> bit & 1]
    return []


SMALLEST_TABLE, LARGEST_TABLE = 4_096, 1 << 24
"""Limits of `table_rows`: in 4,096 rows no shard of 64 is full while the others are empty; 16.8 million rows of 12
numbers, with Adam's state and the map from id to row, take 3 GB."""
ROWS_PER_ID = 2
"""Least rows for each id: as many ids again may come on later days before the longest unused ones make room."""
_ENDLESS = 1 << 30  # a field stays on its line


def table_rows(num_distinct: int) -> int:
    """Choose the most rows of an exact ID table for `num_distinct` ids: a power of two, `ROWS_PER_ID` for each or more.

    Rows take memory as they come, so many of them cost nothing; `LARGEST_TABLE` is a bound for very many ids.
    """
    return min(max(SMALLEST_TABLE, power_of_two(ROWS_PER_ID * max(1, num_distinct))), LARGEST_TABLE)


_KEPT = 4096


@dataclass(frozen=True)
class DistinctCount:
    """The smallest 4,096 hashes of all values: exact up to that number, then with an error of about 1.6 %.

    Source: Bar-Yossef et al., "Counting distinct elements in a data stream", 2002: the k-th smallest of n hashes that
    are spread evenly over [0, 1) is about k / n. The standard error is 1 / sqrt(k - 2).
    """

    hashes_K: UInt64Array = dataclass_field(default_factory=lambda: np.empty(0, np.uint64))  # ascending

    def with_values(self, values_N: npt.ArrayLike) -> "DistinctCount":
        """Add these int64 values."""
        return self._kept(splitmix64(values_N) if np.size(values_N) else np.empty(0, np.uint64))

    def merged(self, other: "DistinctCount") -> "DistinctCount":
        """Merge the findings of both."""
        return self._kept(other.hashes_K)

    @property
    def is_exact(self) -> bool:
        """Whether `estimate` is exact."""
        return len(self.hashes_K) < _KEPT

    @property
    def estimate(self) -> int:
        """The estimated number of different values seen."""
        if self.is_exact:
            return len(self.hashes_K)
        return round((_KEPT - 1) * 2.0**64 / (float(self.hashes_K[-1]) + 1))

    def _kept(self, more_N: UInt64Array) -> "DistinctCount":
        if not self.is_exact:
            more_N = more_N[more_N < self.hashes_K[-1]]  # the others are not among the smallest
        if len(self.hashes_K):  # most of a stream was seen before
            place_N = np.searchsorted(self.hashes_K, more_N).clip(max=len(self.hashes_K) - 1)
            more_N = more_N[self.hashes_K[place_N] != more_N]
        if not len(more_N):
            return self
        every_N = np.concatenate([self.hashes_K, more_N])
        every_N.sort(kind="stable")  # quicker than others, as most are in order
        is_first_N = np.ones(len(every_N), np.bool_)
        np.not_equal(every_N[1:], every_N[:-1], out=is_first_N[1:])
        return DistinctCount(every_N[is_first_N][:_KEPT])


def schema_text(schema: Schema, header: Iterable[str] = (), comments: Mapping[str, str] | None = None) -> str:
    """Write the schema as YAML, one field a line; `load_schema` reads an equal one.

    `header` is lines of comment at the top, `comments` one for each field by its name.
    """
    notes = comments or {}
    roles = {"label": schema.label, "group": schema.group, "new_ad_field": schema.new_ad_field}
    lines = [f"# {line}".rstrip() for line in header]
    lines += ["", *(yaml_line(role, column) for role, column in roles.items()), "", "fields:"]
    for field in schema.fields:
        written = _flow(field.model_dump(exclude_defaults=True))
        lines.append(f"  - {written}" + (f"  # {notes[field.name]}" if field.name in notes else ""))
    return "\n".join(lines).lstrip("\n") + "\n"


_IMAGES_OF_SIDES = {(): "none", ("ad",): "ad", ("user",): "behavior"}
IDS_LR_ALONE = 0.02
"""`optim.ids_lr` of samples without images. With images the preset's: rows that move faster take what images would
say (docs/CHOICES.md)."""


def settings_text(samples: str, schema_file: str, schema: Schema, tables: Mapping[str, int]) -> str:
    """Write settings for `crossmedia train --config`: where samples and schema are, images, ID tables and their rate.

    On a disk they name their own folder, so that they hold wherever that is. `tables`: by name the most rows of each.
    They are exact: in hashed ones ids that share a row cost GAUC.
    """
    settings_file = f"{schema_file.removesuffix(SCHEMA_FILE)}{SETTINGS_FILE}"
    images = _IMAGES_OF_SIDES.get(tuple(sorted({field.side for field in schema.of_kind("content")})))
    lines = [f"# Over the defaults: crossmedia train --config {settings_file}", "", "data:"]
    is_far = "://" in samples
    lines += [
        f"  {yaml_line('samples', samples if is_far else './')}" + ("" if is_far else "  # the folder of this file"),
        f"  {yaml_line('schema_file', schema_file if is_far else f'./{SCHEMA_FILE}')}",
    ]
    lines += ["", "model:"]
    lines += [f"  {yaml_line('images', images)}  # the samples have no others"] if images else []
    lines += [
        "  tables:  # a row for each id, as it comes; max_rows: twice the ids of these samples or more",
        *(f"    {line}" for line in table_lines(tables)),
    ]
    if images == "none":
        why = "without images ID rows may move faster; 0.012 for model.base=din"
        lines += ["", "optim:", f"  {yaml_line('ids_lr', IDS_LR_ALONE)}  # {why}"]
    return "\n".join(lines) + "\n"


def table_lines(tables: Mapping[str, int]) -> list[str]:
    """Write a line of YAML for each exact table by its most rows, for model.tables."""
    return [yaml_line(name, {"kind": "exact", "max_rows": rows}) for name, rows in tables.items()]


def yaml_line(name: str, value: Any) -> str:
    """Write a name and its value as a line of YAML."""
    if isinstance(value, dict):
        return _flow({name: value})[1:-1]
    return yaml.safe_dump({name: value}, width=_ENDLESS, allow_unicode=True).strip()


def _flow(values: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(values), default_flow_style=True, sort_keys=False, width=_ENDLESS, allow_unicode=True)
    return text.strip()
