"""The mapping of log columns to fields, and texts that become IDs.

Rows that are torn or have swallowed others, and values that cannot be read, are faults of their rows.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from featurestore.errors import StorageError
from featurestore.keys import NO_IMAGE, AnyArray, BoolArray, id_of_text
from featurestore.parsing import mistakes, parse_yaml
from featurestore.storage.local import read_text
from featurestore.storage.storage import Storage
from featurestore.text import (
    STYLE_BYTES,
    CsvStyle,
    CsvTextError,
    find_style,
    first_rows,
    long_rows,
    parse_decimal_comma,
)
from pipeline.errors import SampleError, SampleOptionError
from pipeline.problems import Problem
from trainer.schema.suggest import NEEDED, OF_LOG

TimeUnit = Literal["s", "ms", "us", "ns"]
ExtraKind = Literal["id", "multi_id", "dense"]

IMAGE = "image"  # required unless the mapping says null: a name that was forgotten is not a log without images
REQUIRED = {log: tuple(name for name in names if name in NEEDED) for log, names in OF_LOG.items()}
OPTIONAL = {log: tuple(name for name in names if name not in NEEDED) for log, names in OF_LOG.items()}
EVENT = "where"  # the column that says which rows of a table of events are those of a log
KEY = "join"  # the column of ids of a joined table
CLICKED_AT = "clicked_at"  # of impressions whose label is a later row: the time of that
# What a table without such a column has: one session a day, one scene, one category, visits that are long enough.
DEFAULTS = {"session": 0, "scene": 0, "category": 0, "dwell_s": 1e9, IMAGE: NO_IMAGE}
KINDS = {"timestamp": "time", "image": "image", "label": "label", "dwell_s": "seconds", EVENT: "event"}  # else id
EXTRA_KINDS = {"id": "profile", "multi_id": "profiles", "dense": "dense"}
TAKEN = ("day", "label", *REQUIRED["impressions"], *OPTIONAL["impressions"], "dwell_s", EVENT, KEY, CLICKED_AT)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _delimiter(value: str) -> str:
    if len(value) != 1 or not value.isascii() or not (value.isprintable() or value == "\t") or value == '"':
        raise ValueError(Problem.NOT_A_DELIMITER.of(value))
    return value


class CsvSettings(_Section):
    """Format of CSV files, whose first line names the columns. Settings left out are found in the first file."""

    delimiter: Annotated[str, AfterValidator(_delimiter)] | None = None
    encoding: str | None = None
    """Encoding, such as utf-8, latin-1 or cp1252."""
    decimal: Literal[".", ","] | None = None
    """Between a whole number and its fraction."""


@dataclass(frozen=True)
class TableLayout:
    """The files of one log: how they name and type what is needed; pickles to workers."""

    files: str  # below the logs' folder: a file, or a folder of them
    names: dict[str, str]  # the files' name of each of our columns
    kinds: dict[str, str]  # see pipeline.samples.logs
    constants: Mapping[str, float] = field(default_factory=dict)  # columns that the files do not have
    user_columns: tuple[str, ...] = ()
    ad_columns: tuple[str, ...] = ()
    csv: CsvSettings = field(default_factory=CsvSettings)
    time_unit: TimeUnit | None = None
    """Unit of times that are whole numbers; None: found in the first file."""
    time_format: str | None = None
    found_style: CsvStyle | None = None
    takes_text: bool = True
    """Whether values of all kinds may be text as well."""
    separators: Mapping[str, str] = field(default_factory=dict)
    """Separator of the ids of a text, by our column."""
    only_clicks: bool = False
    """Whether only rows whose label is 1 are read, for behaviours."""
    where: "EventRows | None" = None
    """Rows to read, of a table that has others too."""
    joins: "tuple[Join, ...]" = ()
    """Tables that have columns which the files of the log lack."""
    is_told: bool = True
    """Whether what is found in the first file is printed."""

    def silent(self) -> "TableLayout":
        """Print nothing of what is found, in joined tables neither."""
        joins = tuple(replace(join, layout=join.layout.silent()) for join in self.joins)
        return replace(self, is_told=False, joins=joins)

    @property
    def unit(self) -> TimeUnit:
        """The unit of numbers, once it was found."""
        return self.time_unit or "s"

    @property
    def style(self) -> CsvStyle:
        """Return the format of the CSV files, once it was found."""
        return self.found_style or CsvStyle()

    def with_columns_of(self, join: "Join", own: Collection[str], there: Collection[str]) -> "TableLayout":
        """Take from a table with the columns `there` those that the files, with their `own`, lack."""
        taken = [
            name
            for name in (*self.user_columns, *self.ad_columns, IMAGE, "category")
            if name in self.kinds and self.names[name] in there and self.names[name] not in own
        ]
        if not taken:
            return self
        layout = replace(
            join.layout,
            names=join.layout.names | {name: self.names[name] for name in taken},
            kinds=join.layout.kinds
            | {name: "profile" if kind == "id" else kind for name, kind in self.kinds.items() if name in taken},
            separators=self.separators,
        )
        return replace(
            self,
            names={name: column for name, column in self.names.items() if name not in taken},
            kinds={name: kind for name, kind in self.kinds.items() if name not in taken},
            joins=(*self.joins, replace(join, layout=layout)),
        )

    def of_all_rows(self) -> "TableLayout":
        """Read every row, with label 0 where that is a later row."""
        is_labelled = self.where is not None and bool(self.where.clicked)
        kinds = {name: kind for name, kind in self.kinds.items() if name != EVENT}
        constants = {**self.constants, **({"label": 0} if is_labelled else {})}
        return replace(self, kinds=kinds, constants=constants, where=None)

    @property
    def read_kinds(self) -> dict[str, str]:
        """The kind of each column of the rows that are read, those of joined tables and the label of events too."""
        kinds = {name: kind for name, kind in self.kinds.items() if name != EVENT}
        if self.only_clicks:
            del kinds["label"]
        for join in self.joins:
            kinds |= {name: kind for name, kind in join.layout.kinds.items() if name != KEY}
        return kinds | ({"label": "label"} if self.where and self.where.clicked else {})


@dataclass(frozen=True)
class Join:
    """A table with a row for each item or user, whose columns count as columns of a log."""

    by: str  # our column of the log that it is joined by: item or user
    layout: TableLayout
    """Its files, KEY, and the columns that are taken for the log: none until the log's first file was looked at."""
    url: str | None = None  # of the folder that has the files; None: that of the logs
    path: str | None = None  # of a file with its rows for the workers; see pipeline.samples.logs


class ExtraColumn(_Section):
    """A further column. id: a whole number or text; multi_id: a list of them; dense: a real number."""

    kind: ExtraKind
    column: str | None = None
    """Name in the files; default: the same as ours."""
    split: Annotated[str, Field(min_length=1)] | None = None
    """Kind multi_id: what stands between the ids, where the column has them in one text."""

    @model_validator(mode="after")
    def _splits_lists(self) -> Self:
        if self.split is not None and self.kind != "multi_id":
            raise ValueError(Problem.SPLIT_OF_NO_LIST.of(self.kind))
        return self


def _short_form(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Extras = dict[str, Annotated[ExtraColumn, BeforeValidator(_short_form)]]


def _as_texts(value: Any) -> Any:
    values = value if isinstance(value, list | tuple) else [value]
    return [str(each).lower() if isinstance(each, bool) else str(each) for each in values if each is not None]


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_texts)]


class EventRows(_Section):
    """The rows of a table of events that belong to a log: those with one of some values in a column."""

    column: Annotated[str, Field(min_length=1)]
    value: Annotated[Texts, Field(min_length=1)]
    """One, or a list of them."""
    clicked: Texts = ()
    """Values of rows that are clicks, for impressions. A click labels the newest impressions before it of its user and
    item."""
    within_s: Annotated[float, Field(gt=0, le=86_400)] = 1_800
    """The longest time from an impression to its click."""

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if both := set(self.value) & set(self.clicked):
            raise ValueError(Problem.VALUE_OF_BOTH.of(min(both)))
        return self


class JoinedTable(_Section):
    """A table with one row for each item or user, whose columns count as columns of both logs."""

    files: Annotated[str, Field(min_length=1)]
    column: str | None = None
    """Column of the ids in its files; default: item or user."""


class MappedTable(_Section):
    """The mapping of one of the two tables."""

    files: Annotated[str, Field(min_length=1)] | None = None
    columns: dict[str, str | None] = {}
    """The files' name of each of our columns; a required one that is left out has our name. `image: null`: none."""
    user: Extras = {}
    ad: Extras = {}
    where: EventRows | None = None
    """Rows to read, of a table that has others too."""


def _time_format(value: str) -> str:
    try:
        moment = datetime.strptime(datetime(2026, 2, 5, 13, 45, 30, tzinfo=UTC).strftime(value), value)
    except ValueError as failure:
        raise ValueError(Problem.NOT_A_TIME_FORMAT.of(value, failure)) from failure
    if (moment.year, moment.month, moment.day) != (2026, 2, 5):
        raise ValueError(Problem.NO_DAY_IN_FORMAT.of(value))
    return value


class LogMapping(_Section):
    """The whole mapping file."""

    impressions: MappedTable
    behaviors: MappedTable | Literal["clicks"]
    """clicks: the behaviours are the impressions whose label is 1, or the events that label impressions."""
    join: dict[Literal["item", "user"], JoinedTable] = {}
    """Tables that have columns of items and of users which a log lacks."""
    csv: CsvSettings = CsvSettings()
    time_unit: TimeUnit | None = None
    """Unit of times that are plain numbers; by default their size tells it."""
    time_format: Annotated[str, AfterValidator(_time_format)] | None = None
    """Format of times that are not in ISO 8601, for Python's strptime: "%d/%m/%Y %H:%M"."""

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        behaviors = MappedTable() if self.behaviors == "clicks" else self.behaviors
        for log, table in (("impressions", self.impressions), ("behaviors", behaviors)):
            known = (*REQUIRED[log], *OPTIONAL[log])
            if unknown := [name for name in table.columns if name not in known]:
                raise ValueError(Problem.UNKNOWN_COLUMN.of(log, unknown[0], ", ".join(known)))
            if nothing := [name for name, column in table.columns.items() if column is None and name != IMAGE]:
                raise ValueError(Problem.NULL_COLUMN.of(log, nothing[0]))
        if self.impressions.where and self.impressions.where.clicked and "label" in self.impressions.columns:
            raise ValueError(Problem.LABEL_AND_CLICKED.of())
        if behaviors.where and behaviors.where.clicked:
            raise ValueError(Problem.CLICKED_BEHAVIORS.of())
        if behaviors.user:
            raise ValueError(Problem.USER_OF_BEHAVIORS.of())
        if lists := [name for name, extra in behaviors.ad.items() if extra.kind == "multi_id"]:
            raise ValueError(Problem.LIST_OF_BEHAVIORS.of(lists[0]))
        for name in (*self.impressions.user, *self.impressions.ad, *behaviors.ad):
            if name in TAKEN or name.startswith(("behavior_", "ad_")) or (name == "age" and name in behaviors.ad):
                raise ValueError(Problem.TAKEN_NAME.of(name))
        if both := self.impressions.user.keys() & self.impressions.ad.keys():
            raise ValueError(Problem.NAME_OF_BOTH.of(min(both)))
        return self

    def layout(self, log: str) -> TableLayout:
        """Describe how to read the files of `impressions` or `behaviors`."""
        of_clicks = log == "behaviors" and self.behaviors == "clicks"
        table: MappedTable = self._clicks() if of_clicks else getattr(self, log)
        extras = table.user | table.ad
        named = {name: name for name in REQUIRED[log]} | table.columns
        if table.where is not None:
            named[EVENT] = table.where.column
            if table.where.clicked:
                del named["label"]
        names = {name: column for name, column in named.items() if column is not None}
        kinds = {name: KINDS.get(name, "id") for name in names}
        names |= {name: extra.column or name for name, extra in extras.items()}
        kinds |= {name: EXTRA_KINDS[extra.kind] for name, extra in extras.items()}
        constants = {name: DEFAULTS[name] for name in (*OPTIONAL[log], IMAGE) if name not in names}
        joins = tuple(
            Join(by, TableLayout(each.files, {KEY: each.column or by}, {KEY: "id"}, csv=self.csv, time_unit="s"))
            for by, each in self.join.items()
        )  # no column is taken from them yet
        return TableLayout(
            table.files or log, names, kinds, constants, tuple(table.user), tuple(table.ad), self.csv, self.time_unit,
            self.time_format, separators={name: extra.split for name, extra in extras.items() if extra.split},
            only_clicks=of_clicks and "label" in kinds, where=table.where, joins=joins,
        )  # fmt: skip

    def _clicks(self) -> MappedTable:
        """Describe the behaviours where they are impressions, or events: with the ad's columns of one id each."""
        shown, where = self.impressions, self.impressions.where
        columns: dict[str, str | None] = {"label": "label"}
        if where is not None and where.clicked:
            columns, where = {}, EventRows(column=where.column, value=where.clicked)
        columns |= {name: column for name, column in shown.columns.items() if name not in ("session", "scene")}
        ad = {name: extra for name, extra in shown.ad.items() if extra.kind == "id"}
        return MappedTable(files=shown.files or "impressions", columns=columns, ad=ad, where=where)


def load_mapping(path: Path) -> LogMapping:
    """Load the mapping in a YAML file. Raises SampleOptionError naming the file and what is wrong."""
    try:
        return LogMapping.model_validate(parse_yaml(read_text(path)))
    except ValidationError as error:
        raise SampleOptionError("\n".join(f"{path}: {line}" for line in mistakes(error, "mapping"))) from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise SampleOptionError(Problem.NO_MAPPING_FILE, path) from error
    except (OSError, ValueError) as error:
        raise SampleOptionError(Problem.UNREADABLE_AS, path, "YAML", error) from error


SWALLOWED = "a quoted value has other rows in it; is a quote not closed?"
_FIRST_ROWS = 1000
_NUMBER = re.compile(r"(0|-?[1-9]\d{0,18})(\.\d{1,9})?")
_LABELS = {"0": 0.0, "1": 1.0, "true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}

Parsed = tuple[AnyArray, BoolArray]  # values, and which could not be read; nulls are 0 and fine


def parse_ids(column: Any, texts: dict[int, str] | None = None) -> Parsed:
    """Parse int64: a whole number is itself, other text its hash; so 7 is the same user in every file.

    `texts` gets the text of each id that is a hash. Raises SampleError for two texts of one id.
    """

    def parse(text: str) -> int:
        number = id_of_text(text)
        if texts is not None and str(number) != text and texts.setdefault(number, text) != text:
            raise SampleError(Problem.ID_OF_TWO_TEXTS, number, texts[number], text)
        return number

    return _each(column, parse, np.int64)


def parse_id_lists(column: Any, texts: dict[int, str] | None = None) -> AnyArray:
    """Parse a column of lists of whole numbers or texts: the ids of each row as the bytes of int64 numbers.

    In these, rows are selected and sorted like any others. Null and a list without ids are empty; nulls and empty texts
    in a list do not count. `texts` as in `parse_ids`.
    """
    flat: Any = pc.list_flatten(column)
    row_V = np.repeat(np.arange(len(column)), pc.list_value_length(column).fill_null(0).to_numpy())
    is_id_V = flat.is_valid().to_numpy()
    if pa.types.is_integer(flat.type):
        id_V = flat.cast(pa.int64()).fill_null(0).to_numpy()
    else:
        id_V = parse_ids(flat, texts)[0]
        is_id_V &= pc.utf8_length(pc.utf8_trim_whitespace(flat)).fill_null(0).to_numpy() > 0
    data = id_V[is_id_V].tobytes()
    ends_N = 8 * np.cumsum(np.bincount(row_V[is_id_V], minlength=len(column)))
    id_lists_N = np.empty(len(column), np.object_)
    id_lists_N[:] = [data[start:end] for start, end in itertools.pairwise([0, *ends_N.tolist()])]
    return id_lists_N


def parse_times(column: Any, unit: TimeUnit, time_format: str | None = None) -> Parsed:
    """Parse microseconds since 1970, int64: of `time_format`, of ISO 8601, or of a number of `unit`.

    In UTC where they have no zone."""

    def parse(text: str) -> int:
        moment = None
        if time_format is not None:
            with contextlib.suppress(ValueError):
                moment = datetime.strptime(text, time_format)
        if moment is None and _NUMBER.fullmatch(text):
            return int(Decimal(text) * 1_000_000 / PER_SECOND[unit])
        moment = moment or datetime.fromisoformat(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return round(moment.timestamp() * 1_000_000)

    return _each(column, parse, np.int64)


def unit_of(times: Sequence[str]) -> TimeUnit:
    """Find the unit of times that are numbers: from 1973 to 2262, their size is that of one unit alone."""
    numbers = sorted(abs(int(Decimal(text))) for text in map(str.strip, times) if _NUMBER.fullmatch(text))
    middle = numbers[len(numbers) // 2] if numbers else 0
    return "ns" if middle >= 10**17 else "us" if middle >= 10**14 else "ms" if middle >= 10**11 else "s"


def parse_numbers(column: Any, decimal: str = ".") -> Parsed:
    """Parse numbers, as float64."""
    return _each(column, parse_decimal_comma if decimal == "," else float, np.float64)


def parse_labels(column: Any) -> Parsed:
    """Parse labels, as float64: 0 or 1 of true, false, yes and no too, else the number that is written."""
    return _each(column, lambda text: _LABELS[text.lower()] if text.lower() in _LABELS else float(text), np.float64)


def _each(column: Any, parse: Callable[[str], float], dtype: npt.DTypeLike) -> Parsed:
    """Parse each different text; a ValueError or a number beyond the dtype means that it cannot be read."""
    encoded = column.combine_chunks().dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    value_U, wrong_U = np.zeros(len(texts) + 1, dtype), np.zeros(len(texts) + 1, np.bool_)
    for place, text in enumerate(texts):
        try:
            value_U[place] = parse(text.strip())
        except (ValueError, OverflowError):
            wrong_U[place] = True
    place_N = encoded.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False)
    return value_U[place_N], wrong_U[place_N]


def csv_beginning(storage: Storage, path: str, given: CsvSettings) -> tuple[CsvStyle, list[list[str]]]:
    """Find how a file is written, and read its first rows, that of the names first. Raises SampleError."""
    try:
        with storage.open_input(path) as file:
            beginning = file.read(STYLE_BYTES)
        style = find_style(beginning, **given.model_dump())
        return style, first_rows(beginning, style, _FIRST_ROWS)
    except (OSError, StorageError, CsvTextError) as error:
        raise SampleError(Problem.UNREADABLE_AS, storage.full(path), "CSV", error) from error


def csv_names(storage: Storage, path: str, style: CsvStyle) -> list[str]:
    """Read the names in the file's first line. Raises SampleError."""
    rows = csv_beginning(storage, path, CsvSettings(**asdict(style)))[1]
    if not rows:
        raise SampleError(Problem.UNREADABLE_AS, storage.full(path), "CSV", "it is empty, without a line of names")
    return rows[0]


@dataclass(frozen=True)
class CsvRows:
    """Columns as text, empty ones null, and what is wrong with rows, by their numbers in the file (from 0)."""

    table: pa.Table
    torn: dict[int, str]  # too many or too few values; they are not in the table
    doubtful: dict[int, str]  # a quoted value that has the lines of other rows


def read_csv(storage: Storage, path: str, names: Sequence[str], style: CsvStyle) -> CsvRows:
    """Read the whole file, twice; its text is in memory meanwhile.

    Raises SampleError, also where a quote is not closed: then it is unknown which of the rows behind it are rows.
    """
    torn: dict[int, str] = {}
    convert = csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        include_columns=list(dict.fromkeys(names)),
        strings_can_be_null=True,
        null_values=[""],
    )
    try:
        with storage.open_input(path) as file:
            long = long_rows(file, style.delimiter)
        with storage.open_input(path) as file:
            table = csv.read_csv(
                file,
                read_options=csv.ReadOptions(use_threads=False, encoding=style.encoding),  # rows have numbers only then
                parse_options=_parse(style.delimiter, torn),
                convert_options=convert,
            )
    except (OSError, StorageError, CsvTextError) as error:
        raise SampleError(Problem.UNREADABLE_AS, storage.full(path), "CSV", error) from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise SampleError(Problem.WRONG_ENCODING, storage.full(path), error, style.encoding) from error
    return CsvRows(table, torn, {row: SWALLOWED for row, each in long.items() if each.swallowed and row not in torn})


def _parse(delimiter: str, torn: dict[int, str]) -> csv.ParseOptions:
    def keep(row: Any) -> Literal["skip"]:
        if row.number is not None:
            torn[row.number - 2] = f"{row.actual_columns} values instead of {row.expected_columns}"  # after the names
        return "skip"

    return csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=keep)
