"""One line of XDL's text samples: `skey|gkey|user part|ad part|label|ts`, taken apart and put together.

A part is `name@value,value;name@value`; a value is `id:weight`, or a plain number: an id of weight 1, or a dense value,
which only the field's kind shows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


def format_ids(ids: Sequence[int], weights: Sequence[float] | None = None) -> Tokens:
    """Write the values of a sparse field; without weights they are 1."""
    if weights is None:
        return [f"{number}{WEIGHT}1" for number in ids]
    return [f"{number}{WEIGHT}{format_number(weight)}" for number, weight in zip(ids, weights, strict=True)]


def format_number(value: float) -> str:
    """Write the shortest text that is the same float32."""
    return str(np.float32(value)).removesuffix(".0")


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
