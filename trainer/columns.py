"""From Arrow columns of sample groups to flat numpy arrays: types are checked before reading, values while reading.

Nothing here loops over rows in Python. A value that cannot be used is named with its file, its row (from 0) and column.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.errors import DataError, SchemaError
from trainer.schema import Field, Schema, Side

Values = NDArray[Any]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Rule:
    """What a column has to be: `depth` lists around integers, or around real numbers, `width` of them a row.

    `lengths_of`: columns whose lists are exactly as long as this one's, as the ids that these weights belong to.
    """

    side: Side
    depth: int
    number: Literal["integer", "real"]
    width: int | None = None
    lengths_of: tuple[str, ...] = dataclass_field(default=(), compare=False)

    def __str__(self) -> str:
        return "list<" * self.depth + self.number + ">" * self.depth


@dataclass(frozen=True)
class Rows:
    """A column of one side: row m is `values[offsets[m]:offsets[m + 1]]`, or `values[m]` where there are no offsets."""

    values: Values
    offsets: Index | None

    def take(self, index_M: Index) -> tuple[Values, NDArray[np.int32]]:
        """Values of these rows, one after the other, and the length of each."""
        if self.offsets is None:
            return self.values[index_M], np.ones(len(index_M), np.int32)
        starts_M = self.offsets[index_M]
        lengths_M = self.offsets[index_M + 1] - starts_M
        return self.values[ranges(starts_M, lengths_M)], lengths_M.astype(np.int32)


@dataclass(frozen=True)
class Groups:
    """Sample groups in memory: group g has samples `sample_offsets[g]` to `sample_offsets[g + 1]` of the ad side."""

    columns: Mapping[str, Rows]
    sample_offsets: Index

    @property
    def num_samples(self) -> int:
        return int(self.sample_offsets[-1])


def ranges(starts_M: Index, lengths_M: Index) -> Index:
    """start, start + 1, … start + length - 1 of each row, one after the other."""
    ends_M = np.cumsum(lengths_M)
    total = int(ends_M[-1]) if len(ends_M) else 0
    return np.repeat(starts_M - (ends_M - lengths_M), lengths_M) + np.arange(total, dtype=np.int64)


def rules_of(schema: Schema) -> dict[str, Rule]:
    """What every column has to be. Raises SchemaError where two fields want different things of one column."""
    rules = {schema.label: Rule("ad", 1, "integer"), schema.group: Rule("user", 0, "integer")}
    owners = {schema.label: "label", schema.group: "group"}
    wanted = [(field.column_name, _rule(field), f"field {field.name}") for field in schema.fields]
    for field in schema.fields:
        if field.weights is not None:
            rule = replace(_rule(field), number="real", lengths_of=(field.column_name,))
            wanted.append((field.weights, rule, f"weights of field {field.name}"))
    for column, rule, owner in wanted:
        found = rules.setdefault(column, rule)
        if found != rule:
            raise SchemaError(
                f"column {column}: {owner} reads it as {rule} of side {rule.side}, but {owners[column]} "
                f"as {found} of side {found.side}; change one of them in the schema"
            )
        owners.setdefault(column, owner)
        rules[column] = replace(found, lengths_of=tuple(dict.fromkeys((*found.lengths_of, *rule.lengths_of))))
    return rules


def aligned_columns(rules: Mapping[str, Rule]) -> list[list[str]]:
    """Lists of the user side whose values belong together by position: value k of each describes behaviour k.

    Those called BEHAVIOR_X where the ads have a column ad_X, BEHAVIOR being behavior or a longer name that begins so
    and is the same for all: behavior_item and behavior_image, behavior_buy_item and behavior_buy_image. Other lists
    (user_tags) have lengths of their own.
    """
    of_ad = sorted((name for name, rule in rules.items() if rule.side == "ad" and name.startswith("ad_")), key=len)
    found: dict[str, list[str]] = {}
    for name, rule in rules.items():
        if rule.side == "user" and rule.depth == 1 and rule.width is None and name.startswith("behavior_"):
            ends = [ad.removeprefix("ad") for ad in of_ad if name.endswith(ad.removeprefix("ad"))]
            if ends:
                found.setdefault(name.removesuffix(ends[-1]), []).append(name)
    return list(found.values())


def check_types(found: pa.Schema, rules: Mapping[str, Rule], file: str) -> None:
    """Raises SchemaError for the columns of `file` that are missing or of another type than the rules say."""
    problems = []
    for column, rule in rules.items():
        if not found.names.count(column):
            problems.append(
                f"{file}: column {column} is missing, expected {rule}; found columns: {', '.join(found.names)}"
            )
        elif found.names.count(column) > 1:
            problems.append(
                f"{file}: column {column} stands {found.names.count(column)} times in it, and nobody can tell which is "
                "meant; write the file with one"
            )
        elif not _fits(found.field(column).type, rule):
            problems.append(f"{file}: column {column} is {found.field(column).type}, expected {rule}")
    if problems:
        raise SchemaError("\n".join(problems))


def decode(table: pa.Table, rules: Mapping[str, Rule], label: str, file: str, first_row: int) -> Groups:
    """The sample groups of a row group, whose first row is number `first_row` of `file`. Raises DataError."""
    where = _Where(file, first_row)
    raw = {column: _flatten(table.column(column), column, rule, where) for column, rule in rules.items()}
    sample_offsets = raw[label][1][0]
    if (empty := np.flatnonzero(np.diff(sample_offsets) == 0)).size:
        raise DataError(
            f"{where.row(empty[0])}: column {label} is an empty list; a sample group has at least one impression"
        )
    columns = {}
    for column, rule in rules.items():
        values, offsets = raw[column]
        if rule.side == "ad":
            where.check_equal(offsets[0], sample_offsets, column, label)
            offsets = offsets[1:]
        columns[column] = Rows(values, offsets[0] if offsets else None)
        _check_width(columns[column], column, rule, where, sample_offsets)
        for other in rule.lengths_of:
            if other in raw and offsets:
                outer = (sample_offsets,) if rule.side == "ad" else ()
                where.check_equal(offsets[-1], raw[other][1][-1], column, other, "value", outer)
    for first, *others in aligned_columns(rules):
        for column in others:
            where.check_equal(raw[column][1][0], raw[first][1][0], column, first, "behaviour")
    labels = columns[label].values
    if (wrong := np.flatnonzero((labels != 0) & (labels != 1))).size:
        row = where.row_of_value(wrong[0], (sample_offsets,))
        raise DataError(f"{row}: column {label} has {labels[wrong[0]]}; a label is 0 or 1")
    return Groups(columns, sample_offsets)


def concatenate(parts: Sequence[Groups]) -> Groups:
    """The groups of all parts, in their order."""
    columns = {
        column: Rows(
            np.concatenate([part.columns[column].values for part in parts]),
            None if first.offsets is None else _joined([_present(part.columns[column].offsets) for part in parts]),
        )
        for column, first in parts[0].columns.items()
    }
    return Groups(columns, _joined([part.sample_offsets for part in parts]))


@dataclass(frozen=True)
class _Where:
    file: str
    first_row: int

    def row(self, group: int) -> str:
        return f"{self.file}, row {self.first_row + int(group)}"

    def row_of_value(self, value: int, offsets: Sequence[Index]) -> str:
        for level in reversed(offsets):
            value = int(np.searchsorted(level, value, side="right")) - 1
        return self.row(value)

    def check_equal(
        self,
        found_M1: Index,
        expected_M1: Index,
        column: str,
        other: str,
        each: str = "impression",
        outer: Sequence[Index] = (),
    ) -> None:
        """Raises DataError where two columns have lists of unequal lengths; `outer` are offsets of lists around."""
        differing = np.flatnonzero(np.diff(found_M1) != np.diff(expected_M1))
        if differing.size:
            first = int(differing[0])
            raise DataError(
                f"{self.row_of_value(first, outer)}: column {column} has {np.diff(found_M1)[first]} entries, "
                f"{other} has {np.diff(expected_M1)[first]}; each {each} needs one entry in both"
            )


def _rule(field: Field) -> Rule:
    ad = int(field.side == "ad")
    if field.kind == "dense":
        width = field.width or 1
        return Rule(field.side, ad + (width > 1), "real", width)
    if field.kind == "content":
        return Rule(field.side, 1, "integer")
    return Rule(field.side, ad + (field.kind == "multi_id"), "integer")


def _fits(found: pa.DataType, rule: Rule) -> bool:
    for _ in range(rule.depth):
        if not (pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)):
            return False
        found = found.value_type
    integer = pa.types.is_integer(found) and found != pa.uint64()
    return integer or (rule.number == "real" and pa.types.is_floating(found))


def _flatten(column: Any, name: str, rule: Rule, where: _Where) -> tuple[Values, tuple[Index, ...]]:
    """Flat values and the offsets of each level of lists, outermost first. Raises DataError at a null or infinity."""
    array: Any = column.combine_chunks()
    offsets: list[Index] = []
    for _ in range(rule.depth):
        _refuse_nulls(array, name, offsets, where)
        array, level = _unwrap(array)
        offsets.append(level)
    _refuse_nulls(array, name, offsets, where)
    values = array.to_numpy(zero_copy_only=False)
    if rule.number == "integer":
        return values.astype(np.int64, copy=False), tuple(offsets)
    values = values.astype(np.float32)
    if (wrong := np.flatnonzero(~np.isfinite(values))).size:
        row = where.row_of_value(wrong[0], offsets)
        raise DataError(f"{row}: column {name} has {values[wrong[0]]}; it has to be a finite float32 number")
    return values, tuple(offsets)


def _unwrap(array: Any) -> tuple[Any, Index]:
    """Elements of a list array without nulls, and its offsets from 0."""
    if pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size
        return array.flatten(), np.arange(len(array) + 1, dtype=np.int64) * size
    offsets = array.offsets.to_numpy().astype(np.int64)
    return array.values.slice(offsets[0], offsets[-1] - offsets[0]), offsets - offsets[0]


def _refuse_nulls(array: Any, name: str, offsets: Sequence[Index], where: _Where) -> None:
    if array.null_count:
        first = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        what = "is null" if not offsets else "has a null in its list"
        raise DataError(
            f"{where.row_of_value(first, offsets)}: column {name} {what}; write an empty list, or leave the row out"
        )


def _check_width(rows: Rows, column: str, rule: Rule, where: _Where, sample_offsets: Index) -> None:
    if rule.width is None or rows.offsets is None:
        return
    lengths_M = np.diff(rows.offsets)
    if (wrong := np.flatnonzero(lengths_M != rule.width)).size:
        row = where.row_of_value(wrong[0], (sample_offsets,) if rule.side == "ad" else ())
        raise DataError(f"{row}: column {column} has {lengths_M[wrong[0]]} numbers; the schema says width={rule.width}")


def _joined(offsets: Sequence[Index]) -> Index:
    """Offsets of the concatenation of jagged arrays with these offsets."""
    return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part) for part in offsets]))]).astype(np.int64)


def _present(offsets: Index | None) -> Index:
    assert offsets is not None
    return offsets
