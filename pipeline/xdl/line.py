"""XDL's text samples: a line, its fields, schema and images.

A part is `name@value,value;name@value`; a value is `id:weight`, or a plain number: an id of weight 1, or a dense value,
which only the field's kind shows.

Letters of shapes: K rows of a block, D feature width.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from featurestore.keys import Int64Array
from pipeline.errors import SampleError
from pipeline.samples.build import write_schema
from pipeline.vectors.formats import NUM_FILES, record_dtype
from trainer.schema import Field, Kind, Schema
from trainer.schema.profile import DistinctCount, schema_text, table_rows

SEGMENT, FIELD, NAME, VALUE, WEIGHT = "|", ";", "@", ",", ":"
NUM_SEGMENTS = 6
_MAX_ID, _MIN_ID = (1 << 63) - 1, -(1 << 63)

Tokens = list[str]
Part = dict[str, Tokens]


class BadLineError(Exception):
    """A line that cannot be used; its text is the reason that goes into quarantine."""


@dataclass(frozen=True)
class XdlLine:
    """One sample as text. Values are taken as they are; `read_ids` and `read_numbers` read them."""

    skey: str
    gkey: str
    user: Part
    ad: Part
    label: Tokens
    ts: str


def parse_line(data: bytes) -> XdlLine:
    """Take a line apart. Raises BadLineError."""
    try:
        text = data.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadLineError("no UTF-8") from error
    if not text.strip():
        raise BadLineError("empty line")
    segments = text.split(SEGMENT)
    if len(segments) != NUM_SEGMENTS:
        raise BadLineError(f"{len(segments)} segments instead of {NUM_SEGMENTS}")
    skey, gkey, user, ad, label, ts = segments
    if not gkey:
        raise BadLineError("no group key")
    return XdlLine(skey, gkey, _part("user", user), _part("ad", ad), label.split(VALUE), ts.strip())


def format_line(line: XdlLine) -> str:
    """Write the line as text, without its end."""
    parts = [FIELD.join(f"{name}{NAME}{VALUE.join(part[name])}" for name in part) for part in (line.user, line.ad)]
    return SEGMENT.join([line.skey, line.gkey, *parts, VALUE.join(line.label), line.ts])


def read_ids(name: str, tokens: Sequence[str]) -> tuple[list[int], list[float]]:
    """Read the ids of a sparse field and their weights. Raises BadLineError."""
    ids, weights = [], []
    for token in tokens:
        number, separator, weight = token.partition(WEIGHT)
        ids.append(read_int(name, number))
        weights.append(read_number(f"a weight of {name}", weight) if separator else 1.0)
    return ids, weights


def read_int(name: str, text: str) -> int:
    """Read a whole number of 64 bits. Raises BadLineError."""
    try:
        value = int(text)
    except ValueError as error:
        raise BadLineError(f"{name} is no whole number") from error
    if not _MIN_ID <= value <= _MAX_ID:
        raise BadLineError(f"{name} does not fit into 64 bits")
    return value


def read_numbers(name: str, tokens: Sequence[str]) -> list[float]:
    """Read the numbers of a dense field. Raises BadLineError."""
    return [read_number(name, token) for token in tokens]


def read_number(name: str, text: str) -> float:
    """Read a number that is finite as float32, which is what XDL makes of it. Raises BadLineError."""
    try:
        with np.errstate(over="ignore"):
            value = float(np.float32(text))
    except ValueError as error:
        raise BadLineError(f"{name} is no number") from error
    if not math.isfinite(value):
        raise BadLineError(f"{name} is not finite")
    return value


def _part(side: str, text: str) -> Part:
    part: Part = {}
    for field in text.split(FIELD) if text else []:
        name, separator, values = field.partition(NAME)
        if not separator or not name:
            raise BadLineError(f"{side} part: a field without a name")
        if name in part:
            raise BadLineError(f"{side} part: {name} is there twice")
        part[name] = values.split(VALUE) if values else []
    return part


PartName = Literal["user", "ad"]
RESERVED = ("user", "label", "skey", "gkey", "timestamp", "ad_timestamp")
WEIGHT_SUFFIX = "_weight"
_ID = re.compile(r"-?\d+")
_BUFFER = 100_000  # ids before they are counted


@dataclass(frozen=True)
class XdlField:
    """A field, and the column of the samples that it becomes."""

    part: PartName
    name: str
    kind: Kind
    width: int  # numbers a line, of dense
    column: str
    num_ids: int  # different ones, roughly
    max_ids: int  # of one line
    is_weighted: bool = False  # some id has another weight than 1

    @property
    def is_dense(self) -> bool:
        return self.kind == "dense"


@dataclass
class SeenField:
    """The values of one field in all lines, counted."""

    sparse: int = 0  # lines with id:weight
    whole: int = 0  # lines of plain whole numbers
    other: int = 0  # lines of other plain numbers, or of what is none
    weighted: int = 0  # lines with another weight than 1
    lengths: Counter[int] = dataclasses.field(default_factory=Counter)
    distinct: DistinctCount = dataclasses.field(default_factory=DistinctCount)
    _ids: list[int] = dataclasses.field(default_factory=list)

    @property
    def num_lines(self) -> int:
        return self.lengths.total()

    def add(self, tokens: Tokens) -> None:
        """Add one line's values."""
        self.lengths[len(tokens)] += 1
        if any(WEIGHT in token for token in tokens):
            self.sparse += 1
        elif all(map(_ID.fullmatch, tokens)):
            self.whole += 1
        else:
            self.other += 1
            return
        try:
            ids, weights = read_ids("", tokens)
        except BadLineError:
            return  # the line is reported when it is read again
        self.weighted += any(weight != 1 for weight in weights)
        self._ids += ids
        if len(self._ids) >= _BUFFER:
            self.settle()

    def settle(self) -> None:
        """Count the ids that wait."""
        self.distinct = self.distinct.with_values(self._ids)
        self._ids = []

    def merge(self, other: "SeenField") -> None:
        """Add what another file has."""
        self.sparse += other.sparse
        self.whole += other.whole
        self.other += other.other
        self.weighted += other.weighted
        self.lengths += other.lengths
        self.distinct = self.distinct.merged(other.distinct)


SeenFields = dict[tuple[PartName, str], SeenField]


def scan(lines: Iterable[XdlLine]) -> tuple[int, SeenFields]:
    """Count lines, and what they have of every field, in the order of first sight."""
    seen: SeenFields = {}
    count = 0
    for line in lines:
        count += 1
        for name, tokens in line.user.items():
            seen.setdefault(("user", name), SeenField()).add(tokens)
        for name, tokens in line.ad.items():
            seen.setdefault(("ad", name), SeenField()).add(tokens)
    for each in seen.values():
        each.settle()
    return count, seen


def merged(parts: Iterable[SeenFields]) -> SeenFields:
    """Merge the fields of all files."""
    total: SeenFields = {}
    for part in parts:
        for key, seen in part.items():
            total.setdefault(key, SeenField()).merge(seen)
    return total


def decide(
    seen: SeenFields, num_lines: int, images: Sequence[str], sparse: Sequence[str] = (), dense: Sequence[str] = ()
) -> list[XdlField]:
    """Decide the kind of every field; for `images`, `sparse` and `dense`, names, a person has decided.

    A field is sparse where most of its lines have weights; plain whole numbers are ids in the user part, which XDL
    takes for sparse, and dense values in the ad part. Raises SampleError for names that no line has, and for samples
    without an id of the ad.
    """
    names = {name for _, name in seen}
    if unknown := [name for name in (*images, *sparse, *dense) if name not in names]:
        raise SampleError(f"no line has a field {', '.join(unknown)}; there are {', '.join(sorted(names))}")
    if both := set(dense) & {*images, *sparse}:
        raise SampleError(f"{', '.join(sorted(both))} cannot be dense and sparse (or an image) at once")
    columns = _columns(list(seen))
    fields = []
    for (part, name), each in seen.items():
        is_sparse = name in (*images, *sparse) or (name not in dense and _looks_sparse(part, each))
        kind: Kind = "dense"
        if name in images:
            kind = "content"
        elif is_sparse:
            kind = "id" if set(each.lengths) == {1} and each.num_lines == num_lines else "multi_id"
        width = max(each.lengths, key=lambda length: (length > 0, each.lengths[length]))
        column, is_weighted = columns[part, name], kind != "dense" and each.weighted > 0
        fields.append(XdlField(part, name, kind, width, column, each.distinct.estimate, max(each.lengths), is_weighted))
    if not any(each.part == "ad" and each.kind in ("id", "content") for each in fields):
        raise SampleError(
            "no field of the ad part has one id in each line; the trainer knows new ads by such a field: name the ad's "
            "image with --images, or add one"
        )
    return fields


def _looks_sparse(part: PartName, seen: SeenField) -> bool:
    if not max(seen.lengths):
        return True  # without any value it is an empty list
    if part == "user":
        return seen.sparse + seen.whole >= seen.other
    return seen.sparse > seen.whole + seen.other


def _columns(keys: Sequence[tuple[PartName, str]]) -> dict[tuple[PartName, str], str]:
    """Name a column for each field: its own name, with the part before it where that is taken."""
    count = Counter(name for _, name in keys)
    taken = {*RESERVED, *(f"{name}{WEIGHT_SUFFIX}" for _, name in keys)}
    columns = {(part, name): f"{part}_{name}" if count[name] > 1 or name in taken else name for part, name in keys}
    if len(set(columns.values())) < len(columns):
        raise SampleError(f"fields {', '.join(sorted(name for _, name in keys))} do not make different column names")
    return columns


HEADER = ("Fields of XDL's text samples, as they were found.", "kind: id | multi_id | dense | content (image keys).")


def write_field_schema(folder: Path, samples: str, fields: Sequence[XdlField], keep_weights: bool) -> None:
    """Write schema and settings for imported fields; an image field gives its content, and its ids as an ID field."""
    made: list[Field] = []
    tables: dict[str, int] = {}
    notes: dict[str, str] = {}
    for each in fields:
        side: dict[str, Any] = {"side": each.part, "column": None}
        weights = f"{each.column}{WEIGHT_SUFFIX}" if each.is_weighted and keep_weights else None
        if each.kind == "dense":
            made.append(Field(name=each.column, kind="dense", width=each.width if each.width > 1 else None, **side))
            continue
        if each.kind == "content":
            made.append(Field(name=each.column, kind="content", store="images", **side))
            kind: Literal["id", "multi_id"] = "id" if each.part == "ad" else "multi_id"
            ids = {"name": f"{each.column}_id", "table": "image", "column": each.column}
            id_field = Field(**side | ids, kind=kind, weights=weights)
            tables["image"] = max(tables.get("image", 0), table_rows(each.num_ids))
        else:
            id_field = Field(name=each.column, kind=each.kind, weights=weights, **side)
            tables[each.column] = table_rows(each.num_ids)
        made.append(id_field)
        notes[id_field.name] = f"about {each.num_ids:,} ids, {each.max_ids} a line at most"
    new_ad = next(field.name for field in made if field.side == "ad" and field.kind == "id")
    schema = Schema(fields=tuple(made), new_ad_field=new_ad)
    write_schema(folder, samples, schema_text(schema, HEADER, notes), tables)


def append_records(folder: Path, keys_K: Int64Array, features_KD: npt.NDArray[np.float32]) -> None:
    """Add records to the files of `folder`, each in the order given."""
    records_K = np.empty(len(keys_K), record_dtype(features_KD.shape[1]))
    records_K["key"], records_K["vector"] = keys_K, features_KD
    number_K = keys_K & (NUM_FILES - 1)
    for number in np.unique(number_K):
        with (folder / f"data.{number}").open("ab") as file:
            file.write(records_K[number_K == number].tobytes())
