"""Columns of sample files, and of other programs' tables: their arrays, texts that become IDs, numbers transformed.

Letters of shapes as in trainer/samples/reader.py; W numbers a row. What becomes of a value depends on it and on what
the schema says of it alone, so training, evaluation and exports agree.

Nothing here loops over rows in Python. A value that cannot be used is named with its file, its row (from 0) and column.
"""

import contextlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa

from featurestore.format.datafile import is_text
from featurestore.keys import AnyArray, Float32Array, Float64Array, Int64Array, ids_of_texts, keys_of_uris
from featurestore.storage.storage import Storage
from trainer.errors import DataError, DataNotFoundError, OverflowingValueError, SchemaError
from trainer.problems import Problem
from trainer.schema.fields import LOGARITHMIC, STANDARDIZED, Field, Schema, Side, days_of_file
from trainer.schema.profile import inner_type, is_list

TextKind = Literal["id", "uri"]
"""id: a whole number as it is written is itself, other text its hash, as in build_samples. uri: always the hash, which
is an image's key."""


@dataclass(frozen=True)
class Encoded:
    """Value n has the ID `ids_U[index_N[n]]` and was written `texts_U[index_N[n]]`."""

    ids_U: Int64Array
    texts_U: Sequence[str]
    index_N: Int64Array

    @property
    def ids(self) -> Int64Array:
        """The ID of each value, (N,)."""
        ids_N: Int64Array = self.ids_U[self.index_N]
        return ids_N


def encode_texts(array: Any, kind: TextKind) -> Encoded:
    """Hash a string array without nulls to IDs. Raises UnicodeDecodeError."""
    encoded = array.dictionary_encode()
    index_N = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    texts_U = encoded.dictionary.to_pylist()
    if kind == "uri":
        return Encoded(keys_of_uris(texts_U), texts_U, index_N)
    texts_U = [text.strip() for text in texts_U]
    return Encoded(ids_of_texts(texts_U), texts_U, index_N)


def encode_numbers(values_N: Int64Array) -> Encoded:
    """Encode integers, each written as it is."""
    ids_U, index_N = np.unique(values_N, return_inverse=True)
    return Encoded(ids_U, [str(number) for number in ids_U.tolist()], index_N)


def cross(parts: Sequence[Encoded]) -> Encoded:
    """Make one ID of the values of several columns together: the hash of them as a JSON list, ["shoes",3].

    No two tuples of values have one list, whatever their texts hold.
    """
    code_N = parts[0].index_N
    for part in parts[1:]:  # made dense each time, as a product of many sizes is too large
        _, code_N = np.unique(code_N * len(part.texts_U) + part.index_N, return_inverse=True)
    _, place_U, index_N = np.unique(code_N, return_index=True, return_inverse=True)
    values = [_as_json(part, place_U) for part in parts]
    texts_U = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in zip(*values, strict=True)]
    return Encoded(keys_of_uris(texts_U), texts_U, index_N)


def _as_json(part: Encoded, place_U: Int64Array) -> list[int | str]:
    """The part's values at these places; a whole number is one, also where it was a text."""
    chosen_U = part.index_N[place_U]
    ids = part.ids_U[chosen_U].tolist()
    texts = [part.texts_U[place] for place in chosen_U]
    return [number if str(number) == text else text for number, text in zip(ids, texts, strict=True)]


def dense_values(field: Field, values_N: AnyArray) -> Float32Array:
    """Compute the values of a dense field, a whole number of rows, as float32 (M, W), by way of float64.

    Raises OverflowingValueError for a value that the transform makes infinite.
    """
    width = field.width or 1
    if field.transform is None and field.fill is None:
        return values_N.astype(np.float32, copy=False).reshape(-1, width)
    assert not field.lacks_statistics, field.name
    values_MW = before_scaling(field, values_N.reshape(-1, width))
    if field.fill == "mean":
        values_MW = np.where(np.isnan(values_MW), np.array(field.mean), values_MW)
    if field.transform in STANDARDIZED:
        values_MW = (values_MW - np.array(field.mean)) / np.array(field.std)
    with np.errstate(over="ignore"):
        found_MW = values_MW.astype(np.float32)
    if not np.isfinite(found_MW).all():
        place = int((~np.isfinite(found_MW)).argmax())
        error = OverflowingValueError(Problem.TOO_BIG, f"column {field.column_name}", float(values_N[place]))
        error.column, error.row = field.column_name, place // width
        raise error
    return found_MW


def before_scaling(field: Field, values: AnyArray) -> Float64Array:
    """Compute the values whose mean and deviation are taken: filled by a number, and their logarithm if asked for.

    sign(x) log(1 + |x|) has a value for negative numbers too, and is log(1 + x) for the others.
    """
    numbers = filled(field, values)
    if field.transform in LOGARITHMIC:
        numbers = np.copysign(np.log1p(np.abs(numbers)), numbers)
    return numbers


def filled(field: Field, values: AnyArray) -> Float64Array:
    """Return the values in float64, missing ones replaced where `fill` is a number."""
    numbers = values.astype(np.float64)
    return np.where(np.isnan(numbers), field.fill, numbers) if isinstance(field.fill, float) else numbers


def bucket_ids(field: Field, values_N: AnyArray) -> Int64Array:
    """Find the bucket of each number (N,): how many buckets begin at it or before it. A missing number's is the last.

    Compared in float32, as columns are read: 0.7 lies in the bucket that begins at 0.7, whatever either is rounded to.
    """
    starts = field.bucket_starts
    assert starts is not None, field.name
    numbers_N = filled(field, values_N)
    ids_N = np.searchsorted(np.array(starts, np.float32), numbers_N.astype(np.float32), side="right").astype(np.int64)
    ids_N[np.isnan(numbers_N)] = len(starts) + 1
    return ids_N


Values = AnyArray


@dataclass(frozen=True)
class Rule:
    """The type of a column: `depth` lists around integers, or around real numbers, `width` of them a row.

    `may_miss`: real numbers may be null or NaN, and are NaN then. `lengths_of`: columns whose lists are exactly as long
    as this one's, as the ids that these weights belong to.
    `text`: integers may be written as strings, and this is how they become integers. `crossed`: there is no such
    column; its values are those of these columns, crossed.
    """

    side: Side
    depth: int
    number: Literal["integer", "real"]
    width: int | None = None
    may_miss: bool = False
    lengths_of: tuple[str, ...] = dataclass_field(default=(), compare=False)
    text: TextKind | None = None
    crossed: tuple[str, ...] = ()

    @property
    def is_real(self) -> bool:
        return self.number == "real"

    def __str__(self) -> str:
        return "list<" * self.depth + self.number + (" or null" if self.may_miss else "") + ">" * self.depth


@dataclass(frozen=True)
class ColumnRows:
    """A column of one side: row m is `values[offsets[m]:offsets[m + 1]]`, or `values[m]` without offsets."""

    values: Values
    offsets: Int64Array | None

    def take(self, index_M: Int64Array) -> tuple[Values, Int64Array]:
        """Take the values of these rows, one after the other, and the length of each."""
        if self.offsets is None:
            return self.values[index_M], np.ones(len(index_M), np.int64)
        starts_M = self.offsets[index_M]
        lengths_M = self.offsets[index_M + 1] - starts_M
        return self.values[ranges(starts_M, lengths_M)], lengths_M

    def between(self, begin: int, end: int) -> tuple[Values, Int64Array]:
        """View the values of rows `begin` to before `end`; also return the length of each row."""
        if self.offsets is None:
            return self.values[begin:end], np.ones(end - begin, np.int64)
        return self.values[self.offsets[begin] : self.offsets[end]], np.diff(self.offsets[begin : end + 1])

    def rows(self, index_M: Int64Array) -> "ColumnRows":
        """Copy these rows."""
        values, lengths_M = self.take(index_M)
        return ColumnRows(values, None if self.offsets is None else _offsets(lengths_M))


@dataclass(frozen=True)
class DecodedGroups:
    """Sample groups in memory: group g has samples `sample_offsets[g]` to `sample_offsets[g + 1]` of the ad side."""

    columns: Mapping[str, ColumnRows]
    sample_offsets: Int64Array

    @property
    def num_samples(self) -> int:
        return int(self.sample_offsets[-1])


def no_groups(rules: Mapping[str, Rule]) -> DecodedGroups:
    """Return the decoded form of a table without rows."""
    types = {name: np.float32 if rule.is_real else np.int64 for name, rule in rules.items()}
    columns = {name: ColumnRows(np.empty(0, dtype), offsets=None) for name, dtype in types.items()}
    return DecodedGroups(columns, np.zeros(1, np.int64))


def _offsets(lengths_M: Int64Array) -> Int64Array:
    """Return where each row begins, and the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths_M)]).astype(np.int64)


def ranges(starts_M: Int64Array, lengths_M: Int64Array) -> Int64Array:
    """List start, start + 1, … start + length - 1 of each row, one after the other."""
    ends_M = np.cumsum(lengths_M)
    total = int(ends_M[-1]) if len(ends_M) else 0
    return np.repeat(starts_M - (ends_M - lengths_M), lengths_M) + np.arange(total, dtype=np.int64)


def rules_of(schema: Schema) -> dict[str, Rule]:
    """Return the rule of every column. Raises SchemaError if two fields need different rules for one column."""
    uris = {field.column_name for field in schema.of_kind("content")}  # an image's ID is its key
    group = Rule("user", 0, "integer", text="uri" if schema.group in uris else "id")
    rules = {schema.label: Rule("ad", 1, "integer"), schema.group: group}
    owners = {schema.label: "label", schema.group: "group"}
    columns = {field.name: field.column_name for field in schema.fields}
    wanted = []
    for field in schema.fields:
        others = () if field.beside is None else (columns[field.beside],)
        wanted.append((field.column_name, replace(_rule(field, uris), lengths_of=others), f"field {field.name}"))
    for field in schema.fields:
        if field.weights is not None:
            rule = replace(_rule(field, uris), number="real", lengths_of=(field.column_name,), text=None, crossed=())
            wanted.append((field.weights, rule, f"weights of field {field.name}"))
    for column, rule, owner in wanted:
        found = rules.setdefault(column, rule)
        if found != rule:
            only_fill = found == replace(rule, may_miss=found.may_miss)
            way_out = "give both fields a fill, or neither (weights have none)" if only_fill else "change one of them"
            both = owner, rule, rule.side, owners[column], found, found.side
            raise SchemaError(Problem.COLUMN_OF_TWO_RULES, column, *both, way_out)
        owners.setdefault(column, owner)
        lengths_of = tuple(dict.fromkeys((*found.lengths_of, *rule.lengths_of)))
        rules[column] = replace(found, lengths_of=lengths_of)
    return rules


def source_columns(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """List the columns of the files that the rules read, with the rule of each; a crossed column is several."""
    found: dict[str, Rule] = {}
    for column, rule in rules.items():
        each = replace(rule, crossed=())
        found |= {source: rules.get(source, each) for source in rule.crossed or (column,)}
    return found


def text_columns(found: pa.Schema, rules: Mapping[str, Rule]) -> set[str]:
    """List the rules whose IDs are hashes in files of this schema: of strings, or of crossed values."""
    return {
        column
        for column, rule in rules.items()
        if rule.crossed or (rule.text and is_text(inner_type(found.field(column).type)[0]))
    }


def aligned_columns(rules: Mapping[str, Rule]) -> list[list[str]]:
    """Find lists of the user side whose values belong together by position: value k of each describes behaviour k.

    Those called BEHAVIOR_X where the ads have a column ad_X, BEHAVIOR being behavior or a longer name that begins so
    and is the same for all: behavior_item and behavior_image, behavior_buy_item and behavior_buy_image. Other lists
    (user_tags) have lengths of their own.
    """
    plain = {name: rule for name, rule in rules.items() if not rule.crossed}
    of_ad = sorted((name for name, rule in plain.items() if rule.side == "ad" and name.startswith("ad_")), key=len)
    found: dict[str, list[str]] = {}
    for name, rule in plain.items():
        is_list = rule.depth == 1 and rule.width is None
        if rule.side == "user" and is_list and name.startswith("behavior_"):
            ends = [ad.removeprefix("ad") for ad in of_ad if name.endswith(ad.removeprefix("ad"))]
            if ends:
                found.setdefault(name.removesuffix(ends[-1]), []).append(name)
    return list(found.values())


def check_types(found: pa.Schema, rules: Mapping[str, Rule], file: str) -> None:
    """Raise SchemaError for the columns of `file` that are missing or of another type than the rules say."""
    problems, missing = [], []
    for column, rule in source_columns(rules).items():
        wanted = str(rule) + (f" (or {str(rule).replace('integer', 'string')})" if rule.text else "")
        if not (count := found.names.count(column)):
            missing.append(Problem.COLUMN_MISSING.of(column, wanted))
        elif count > 1:
            problems.append(Problem.COLUMN_REPEATED.of(file, column, count))
        elif not _fits(found.field(column).type, rule):
            problems.append(Problem.COLUMN_OF_OTHER_TYPE.of(file, column, found.field(column).type, wanted))
    if missing:
        problems.insert(0, f"{file}: {'; '.join(missing)}; found columns: {', '.join(found.names)}")
    if problems:
        raise SchemaError("\n".join(problems))


def decode(table: pa.Table, rules: Mapping[str, Rule], label: str, file: str, first_row: int) -> DecodedGroups:
    """Decode the sample groups of a row group, whose first row is number `first_row` of `file`. Raises DataError."""
    where = _Where(file, first_row)
    groups = _decoded(table, rules, label, where)
    labels = groups.columns[label].values
    if (wrong := np.flatnonzero((labels != 0) & (labels != 1))).size:
        row = where.row_of_value(wrong[0], (groups.sample_offsets,))
        raise DataError(Problem.NOT_A_LABEL, row, label, labels[wrong[0]])
    return groups


def decode_unlabelled(table: pa.Table, rules: Mapping[str, Rule], file: str, first_row: int = 0) -> DecodedGroups:
    """Decode groups of ads without labels, which may be empty; without columns of ads, a row is one sample.

    Raises DataError.
    """
    first = next((column for column, rule in rules.items() if rule.side == "ad"), None)
    return _decoded(table, rules, first, _Where(file, first_row), may_be_empty=True)


def _decoded(
    table: pa.Table, rules: Mapping[str, Rule], counted: str | None, where: "_Where", may_be_empty: bool = False
) -> DecodedGroups:
    """Decode all columns; each of the ads' side, where there is one, is as long as the one called `counted`."""
    raw = {column: _flatten(table, column, rule, where) for column, rule in rules.items()}
    sample_offsets = np.arange(len(table) + 1) if counted is None else raw[counted][1][0]
    if not may_be_empty and (empty := np.flatnonzero(np.diff(sample_offsets) == 0)).size:
        raise DataError(Problem.EMPTY_GROUP, where.row(empty[0]), counted)
    columns = {}
    for column, rule in rules.items():
        values, offsets = raw[column]
        if rule.side == "ad":
            where.check_equal(offsets[0], sample_offsets, column, counted or column)
            offsets = offsets[1:]
        columns[column] = ColumnRows(values, offsets[0] if offsets else None)
        _check_width(columns[column], column, rule, where, sample_offsets)
        for other in rule.lengths_of:
            if other in raw and offsets:
                outer = (sample_offsets,) if rule.side == "ad" else ()
                where.check_equal(offsets[-1], raw[other][1][-1], column, other, "value", outer)
    for first, *others in aligned_columns(rules):
        for column in others:
            where.check_equal(raw[column][1][0], raw[first][1][0], column, first, "behaviour")
    return DecodedGroups(columns, sample_offsets)


def values_of(table: pa.Table, column: str, rule: Rule, file: str, first_row: int) -> Values:
    """Decode all values of one column, one after the other; see `decode`."""
    return _flatten(table, column, rule, _Where(file, first_row))[0]


def texts_of(table: pa.Table, column: str, rule: Rule, file: str, first_row: int) -> Encoded:
    """Decode the values of one of the `text_columns` of a table, with their texts. Raises DataError."""
    encoded, _ = _encoded(table, column, rule, _Where(file, first_row))
    return encoded


def in_order(groups: DecodedGroups, rules: Mapping[str, Rule], order_G: Int64Array) -> DecodedGroups:
    """Copy the groups in this order, with all their samples."""
    counts_G = np.diff(groups.sample_offsets)[order_G]
    rows = {"user": order_G, "ad": ranges(groups.sample_offsets[order_G], counts_G)}
    columns = {name: column.rows(rows[rules[name].side]) for name, column in groups.columns.items()}
    return DecodedGroups(columns, _offsets(counts_G))


def concatenate(parts: Sequence[DecodedGroups]) -> DecodedGroups:
    """Join the groups of all parts, in their order."""
    columns = {}
    for column in parts[0].columns:
        rows = [part.columns[column] for part in parts]
        offsets = [each.offsets for each in rows if each.offsets is not None]
        columns[column] = ColumnRows(
            np.concatenate([each.values for each in rows]), _joined(offsets) if offsets else None
        )
    return DecodedGroups(columns, _joined([part.sample_offsets for part in parts]))


@dataclass(frozen=True)
class _Where:
    file: str
    first_row: int

    def row(self, group: int) -> str:
        return f"{self.file}, row {self.first_row + int(group)}"

    def row_of_value(self, value: int, offsets: Sequence[Int64Array]) -> str:
        for level in reversed(offsets):
            value = int(np.searchsorted(level, value, side="right")) - 1
        return self.row(value)

    def check_equal(
        self,
        found_M1: Int64Array,
        expected_M1: Int64Array,
        column: str,
        other: str,
        each: str = "impression",
        outer: Sequence[Int64Array] = (),
    ) -> None:
        """Raises DataError where two columns have lists of unequal lengths; `outer` are offsets of lists around."""
        differing = np.flatnonzero(np.diff(found_M1) != np.diff(expected_M1))
        if differing.size:
            first = int(differing[0])
            lengths = np.diff(found_M1)[first], other, np.diff(expected_M1)[first]
            raise DataError(Problem.UNPAIRED, self.row_of_value(first, outer), column, *lengths, each)


def _rule(field: Field, uris: Collection[str]) -> Rule:
    ad = int(field.side == "ad")
    if field.kind == "dense":
        width = field.width if field.width != 1 else None
        return Rule(field.side, ad + (width is not None), "real", width, field.fill is not None)
    text: TextKind = "uri" if field.column_name in uris else "id"
    if field.kind == "content":
        return Rule(field.side, 1, "integer", text=text)
    depth = ad + (field.kind == "multi_id")
    if field.is_bucketed:
        return Rule(field.side, depth, "real", may_miss=field.fill is not None)
    return Rule(field.side, depth, "integer", text=text, crossed=field.columns or ())


def _fits(found: pa.DataType, rule: Rule) -> bool:
    kind, depth = inner_type(found)
    integer = pa.types.is_integer(kind) and kind != pa.uint64()
    fits = integer or (rule.is_real and pa.types.is_floating(kind)) or (rule.text is not None and is_text(kind))
    return fits and depth == rule.depth


def _flatten(table: pa.Table, name: str, rule: Rule, where: _Where) -> tuple[Values, tuple[Int64Array, ...]]:
    """Flat values and the offsets of each level of lists, outermost first. Raises DataError at a null or infinity."""
    if rule.crossed or is_text(inner_type(table.schema.field(name).type)[0]):
        encoded, offsets = _encoded(table, name, rule, where)
        return encoded.ids, offsets
    array, offsets = _innermost(table, name, rule, where)
    values = array.to_numpy(zero_copy_only=False)
    if rule.number == "integer":
        return values.astype(np.int64, copy=False), offsets
    values = values.astype(np.float32)
    if (wrong := np.flatnonzero(np.isinf(values) if rule.may_miss else ~np.isfinite(values))).size:
        row = where.row_of_value(wrong[0], offsets)
        way_out = "; fill in the schema replaces missing ones" if np.isnan(values[wrong[0]]) else ""
        raise DataError(Problem.NOT_FLOAT32, row, name, values[wrong[0]], way_out)
    return values, offsets


def _encoded(table: pa.Table, name: str, rule: Rule, where: _Where) -> tuple[Encoded, tuple[Int64Array, ...]]:
    """Flatten a column of texts or of crossed values, with each distinct value once."""
    if rule.crossed:
        first, *others = (_encoded(table, each, replace(rule, crossed=()), where) for each in rule.crossed)
        for (_, offsets), column in zip(others, rule.crossed[1:], strict=True):
            for level, (found, expected) in enumerate(zip(offsets, first[1], strict=True)):
                where.check_equal(found, expected, column, rule.crossed[0], "crossed value", offsets[:level])
        return cross([encoded for encoded, _ in (first, *others)]), first[1]
    array, offsets = _innermost(table, name, rule, where)
    if not is_text(array.type):
        return encode_numbers(array.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)), offsets
    assert rule.text is not None
    try:
        return encode_texts(array, rule.text), offsets
    except UnicodeDecodeError:
        raise DataError(Problem.NOT_UTF8, f"{where.file}: column {name}") from None


def _innermost(table: pa.Table, name: str, rule: Rule, where: _Where) -> tuple[Any, tuple[Int64Array, ...]]:
    """The values as an Arrow array without nulls, and the offsets of each level of lists."""
    array: Any = table.column(name).combine_chunks()
    offsets: list[Int64Array] = []
    for _ in range(rule.depth):
        _refuse_nulls(array, name, offsets, where)
        array, level = unwrapped(array)
        offsets.append(level)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not rule.may_miss:
        _refuse_nulls(array, name, offsets, where, "give its field fill, or leave the row out" if rule.is_real else "")
    return array, tuple(offsets)


def unwrapped(array: Any) -> tuple[Any, Int64Array]:
    """Return the elements of a list array without nulls, and its offsets from 0."""
    if pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size
        return array.flatten(), np.arange(len(array) + 1, dtype=np.int64) * size
    offsets = array.offsets.to_numpy().astype(np.int64)
    return array.values.slice(offsets[0], offsets[-1] - offsets[0]), offsets - offsets[0]


def _refuse_nulls(array: Any, name: str, offsets: Sequence[Int64Array], where: _Where, way_out: str = "") -> None:
    if array.null_count:
        first = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        problem = Problem.NULL_IN_LIST if offsets else Problem.NULL_IN_COLUMN
        way_out = way_out or ("write an empty list, or leave the row out" if offsets else "leave the row out")
        raise DataError(problem, where.row_of_value(first, offsets), name, way_out)


def _check_width(rows: ColumnRows, column: str, rule: Rule, where: _Where, sample_offsets: Int64Array) -> None:
    if rule.width is None or rows.offsets is None:
        return
    lengths_M = np.diff(rows.offsets)
    if (wrong := np.flatnonzero(lengths_M != rule.width)).size:
        row = where.row_of_value(wrong[0], (sample_offsets,) if rule.side == "ad" else ())
        raise DataError(Problem.ROW_OF_OTHER_WIDTH, row, column, lengths_M[wrong[0]], rule.width)


def _joined(offsets: Sequence[Int64Array]) -> Int64Array:
    """Offsets of the concatenation of jagged arrays with these offsets."""
    return _offsets(np.concatenate([np.diff(part) for part in offsets]))


SPLITS = ("train", "test")
ResultT = TypeVar("ResultT")


def sample_files(storage: Storage, split: str) -> list[str]:
    """List the Parquet files of a split, in the order of their names."""
    return sorted(f"{split}/{name}" for name in storage.list(split) if name.endswith(".parquet"))


def files_by_day(storage: Storage) -> dict[str, list[str]]:
    """List the files of each day, written 2026-01-31, by their names; days ascending. Days of a month may share one."""
    found: dict[str, list[str]] = {}
    for file in [each for split in SPLITS for each in sample_files(storage, split)]:
        for day in days_of_file(name_of(file)):
            found.setdefault(day, []).append(file)
    return dict(sorted(found.items()))


def files_of(storage: Storage, days: Sequence[str]) -> list[str]:
    """List the files of these days. Raises DataError where one has none."""
    by_day = files_by_day(storage) if days else {}
    if lacking := sorted(set(days) - by_day.keys()):
        known = f"from {min(by_day)} to {max(by_day)}" if by_day else "not named by day, as day=2026-01-31.parquet"
        raise DataNotFoundError(Problem.NO_SAMPLES_OF_DAYS, storage.url, ", ".join(lacking), known)
    return list(dict.fromkeys(file for day in sorted(set(days)) for file in by_day[day]))


def name_of(file: str) -> str:
    """Drop the split from a file's name: files move from test/ to train/ as days go by, and stay the same."""
    return file.partition("/")[2]


def in_either_split(read: Callable[[str], ResultT], file: str) -> ResultT:
    """Call `read` with a file's path, or, if it has moved, with its path in the other split.

    A day that is added to a folder while a run reads it moves an earlier one from test/ to train/, bytes and all.
    Raises the errors of `read`.
    """
    try:
        return read(file)
    except FileNotFoundError:
        for split in SPLITS:
            with contextlib.suppress(FileNotFoundError):
                return read(f"{split}/{name_of(file)}")
        raise


def groups_of_rows(table: pa.Table, depths: Mapping[str, int]) -> pa.Table:
    """Make groups of rows: the columns of `depths`, with so many lists around their values; others are left out.

    Of a table with an impression in each row, the columns of its ad lack the list of ads: they get lists of one. Raises
    DataError where more than half of the columns are missing, as those of a raw log are.
    """
    missing = [name for name in depths if name not in table.column_names]
    if 2 * len(missing) > len(depths):
        raise DataError(Problem.ROWS_LACK_COLUMNS, len(missing), len(depths), ", ".join(missing))
    table = table.select([name for name in table.column_names if name in depths])
    # Values of a column without any, such as empty lists alone, have the type of IDs.
    table = _recast(table, lambda kind: pa.int64() if pa.types.is_null(kind) else kind)
    offsets = pa.array(np.arange(table.num_rows + 1), pa.int32())
    for place, field in enumerate(table.schema):
        if inner_type(field.type)[1] == depths[field.name] - 1:
            column = table.column(place).combine_chunks()
            table = table.set_column(place, field.name, pa.ListArray.from_arrays(offsets, column))
    return table


def sample_groups(table: pa.Table, schema: Schema) -> pa.Table:
    """Make sample groups of rows, see `groups_of_rows`; their labels are zeros. Raises DataError without an ad."""
    rules = {name: rule for name, rule in source_columns(rules_of(schema)).items() if name != schema.label}
    groups = groups_of_rows(table, {name: rule.depth for name, rule in rules.items()})
    of_ads = next((name for name in groups.column_names if rules[name].side == "ad"), None)
    if of_ads is None:
        raise DataError(Problem.ROWS_WITHOUT_ADS, schema.new_ad_column)
    lengths_G = groups.column(of_ads).combine_chunks().value_lengths().to_numpy(zero_copy_only=False)  # type: ignore[attr-defined]
    offsets = np.concatenate([[0], np.cumsum(lengths_G)])
    labels = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.zeros(offsets[-1], np.int8)))
    return groups.append_column(schema.label, labels)


def plain(table: pa.Table) -> pa.Table:
    """Decode dictionary-encoded columns, so that Python's values fit the table's types."""
    return _recast(table, lambda kind: kind.value_type if pa.types.is_dictionary(kind) else kind)


def _recast(table: pa.Table, change: Callable[[Any], pa.DataType]) -> pa.Table:
    """Cast a table to other types of the values within its lists."""

    def recast(kind: Any) -> pa.DataType:
        return pa.list_(recast(kind.value_type)) if is_list(kind) else change(kind)

    return table.cast(pa.schema([pa.field(each.name, recast(each.type)) for each in table.schema]))
