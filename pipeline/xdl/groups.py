"""Lines of XDL's text samples become sample groups: values read by their fields' kinds, neighbours of one group joined.

The columns are those of DESIGN's sample groups: user fields once, ad fields a list with one entry for each line.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from featurestore.keys import key_of_uri
from pipeline.options import XdlWeights
from pipeline.xdl.fields import WEIGHT_SUFFIX, XdlField
from pipeline.xdl.line import BadLineError, Part, Tokens, XdlLine, read_ids, read_int, read_number, read_numbers


@dataclass(frozen=True)
class ReadRules:
    """The rules by which lines are read.

    `weights`: of sparse ids, other than 1: keep them in columns of their own, drop them, or refuse such lines.
    """

    fields: tuple[XdlField, ...]
    weights: XdlWeights = "keep"
    label_threshold: float | None = None  # None: labels are 0 or 1
    label_index: int | None = None  # None: a line has one label
    fill_dense: float | None = None  # for dense fields that a line lacks; None: such a line is bad

    @cached_property
    def known(self) -> frozenset[tuple[str, str]]:
        """Part and name of every field."""
        return frozenset((each.part, each.name) for each in self.fields)

    @property
    def weighted(self) -> tuple[XdlField, ...]:
        """Fields whose weights get a column."""
        return tuple(each for each in self.fields if each.is_weighted) if self.weights == "keep" else ()


@dataclass(frozen=True)
class XdlSample:
    """One line, read: values by column."""

    skey: str
    gkey: str
    label: int
    ts: int
    user: dict[str, Any]
    ad: dict[str, Any]


@dataclass
class XdlGroup:
    """Neighbouring lines with one group key and equal user fields."""

    gkey: str
    user: dict[str, Any]
    samples: list[XdlSample] = dataclasses.field(default_factory=list)


def read_sample(line: XdlLine, rules: ReadRules) -> XdlSample:
    """Read the line's values as the columns want them. Raises BadLineError."""
    user: dict[str, Any] = {}
    ad: dict[str, Any] = {}
    if unknown := [name for part in ("user", "ad") for name in _part(line, part) if (part, name) not in rules.known]:
        raise BadLineError(f"{unknown[0]} was not there when the files were looked through")
    for each in rules.fields:
        _read_field(each, _part(line, each.part).get(each.name), rules, user if each.part == "user" else ad)
    return XdlSample(line.skey, line.gkey, _label(line.label, rules), read_int("ts", line.ts), user, ad)


def group_samples(samples: Iterable[XdlSample]) -> Iterator[XdlGroup]:
    """Group samples in the order of the lines; a group ends where the key or a value of the user part changes."""
    group: XdlGroup | None = None
    for sample in samples:
        if group is None or group.gkey != sample.gkey or group.user != sample.user:
            if group is not None:
                yield group
            group = XdlGroup(sample.gkey, sample.user)
        group.samples.append(sample)
    if group is not None:
        yield group


def schema_of(rules: ReadRules) -> pa.Schema:
    """List the columns of the samples."""
    types: dict[str, pa.DataType] = {"user": pa.int64(), "gkey": pa.string(), "timestamp": pa.int64()}
    types |= {each.column: _type(each) for each in rules.fields}
    types |= {each.column + WEIGHT_SUFFIX: _weight_type(each) for each in rules.weighted}
    types |= {"skey": pa.list_(pa.string()), "ad_timestamp": pa.list_(pa.int64()), "label": pa.list_(pa.int8())}
    return pa.schema(types)


def table_of(groups: Sequence[XdlGroup], rules: ReadRules) -> pa.Table:
    """Make one row for each group; `user` is the hash of its key, `timestamp` that of the first line."""
    values: dict[str, list[Any]] = {
        "user": [key_of_uri(group.gkey) for group in groups],
        "gkey": [group.gkey for group in groups],
        "timestamp": [group.samples[0].ts for group in groups],
        "skey": [[sample.skey for sample in group.samples] for group in groups],
        "ad_timestamp": [[sample.ts for sample in group.samples] for group in groups],
        "label": [[sample.label for sample in group.samples] for group in groups],
    }
    columns = [(each.part, each.column) for each in rules.fields]
    columns += [(each.part, each.column + WEIGHT_SUFFIX) for each in rules.weighted]
    for part, column in columns:
        if part == "user":
            values[column] = [group.user[column] for group in groups]
        else:
            values[column] = [[sample.ad[column] for sample in group.samples] for group in groups]
    return pa.table(values, schema=schema_of(rules))


def _part(line: XdlLine, part: str) -> Part:
    return line.user if part == "user" else line.ad


def _read_field(each: XdlField, tokens: Tokens | None, rules: ReadRules, into: dict[str, Any]) -> None:
    if each.is_dense:
        into[each.column] = _dense(each, tokens, rules)
        return
    ids, weights = read_ids(each.name, tokens or [])
    if rules.weights == "refuse" and any(weight != 1 for weight in weights):
        raise BadLineError(f"{each.name} has weights other than 1; give --weights keep or drop")
    one = _is_one(each)
    if one and len(ids) != 1:
        raise BadLineError(f"{each.name} has not one id")
    into[each.column] = ids[0] if one else ids
    if rules.weights == "keep" and each.is_weighted:
        into[each.column + WEIGHT_SUFFIX] = weights[0] if one else weights


def _dense(each: XdlField, tokens: Tokens | None, rules: ReadRules) -> float | list[float]:
    if tokens is None:
        if rules.fill_dense is None:
            raise BadLineError(f"{each.name} is missing; --fill-dense 0 does as XDL does")
        numbers = [rules.fill_dense] * each.width
    else:
        numbers = read_numbers(each.name, tokens)
    if len(numbers) != each.width:
        raise BadLineError(f"{each.name} has not {each.width} numbers")
    return numbers[0] if each.width == 1 else numbers


def _label(tokens: Tokens, rules: ReadRules) -> int:
    if rules.label_index is None and len(tokens) != 1:
        raise BadLineError("several labels; --label-index says which")
    index = rules.label_index or 0
    if index >= len(tokens):
        raise BadLineError(f"no label {index}")
    value = read_number("label", tokens[index])
    if rules.label_threshold is not None:
        return int(value >= rules.label_threshold)
    if value not in (0, 1):
        raise BadLineError("label is not 0 or 1; --label-threshold makes it so")
    return int(value)


def _is_one(each: XdlField) -> bool:
    return each.kind == "id" or (each.kind == "content" and each.part == "ad")


def _type(each: XdlField) -> pa.DataType:
    number = pa.float32() if each.is_dense else pa.int64()
    one = each.width == 1 if each.is_dense else _is_one(each)
    return _listed(number, int(not one) + (each.part == "ad"))


def _weight_type(each: XdlField) -> pa.DataType:
    return _listed(pa.float32(), int(not _is_one(each)) + (each.part == "ad"))


def _listed(kind: pa.DataType, depth: int) -> pa.DataType:
    for _ in range(depth):
        kind = pa.list_(kind)
    return kind
