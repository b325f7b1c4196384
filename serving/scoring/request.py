"""A request to the scorer with its columns, its size and cost, and its answer, independent of the protocol.

Letters of shapes: C candidates of a request, G requests of a body.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from serving.errors import RequestError
from serving.settings import Budget
from trainer.config import near_match
from trainer.samples.columns import (
    Index,
    Rule,
    aligned_columns,
    rules_of,
    source_columns,
)
from trainer.schema import Field, Schema

Places = NDArray[np.int64]
_LOWEST = -700.0  # its probability is 0 in float32, and exp does not overflow yet
CANDIDATE_COST, REQUEST_COST = 10, 1_000
"""Cost of a candidate and of a request, in pairs of a candidate and a behaviour."""
PIECE_REQUESTS, PIECE_CANDIDATES, PIECE_VALUES = 64, 2_048, 20_000
"""Most pairs of a piece, unless it is a single request."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One user and C candidates, with the columns of the samples and the raw values of logs.

    `user` has the columns of side user, lists for behaviours; `candidates` those of side ad, a list of C each;
    `context` columns of side ad that are the same for all candidates (the scene), one value each. Values are those of
    JSON: lists, whole and real numbers, texts, null.
    """

    user: Mapping[str, Any]
    candidates: Mapping[str, Sequence[Any]]
    context: Mapping[str, Any] = field(default_factory=dict)
    as_tensors: bool = False
    """Whether its columns were sent as tensors of the Open Inference Protocol, which have no parts."""

    def name_of(self, part: str, column: str) -> str:
        """Name a column in a message as the client sent it: `candidates.ad_item`, or `input ad_item` of a tensor."""
        return f"input {column}" if self.as_tensors else f"{part}.{column}"


Decoded = Sequence[Request] | pa.Table
"""A decoded body: requests, or a table with the columns of sample files, one request per row."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The answer to a request: a logit for each candidate, in order, and its unknown IDs and missing images.

    `unknown`: by field, the places (ad side: of candidates; user side: of values) whose ID no training sample had.
    `missing`: by content field, the places whose image has no vector; the run's policy replaced it.
    """

    logits_C: NDArray[np.float32]
    unknown: Mapping[str, Places]
    missing: Mapping[str, Places]

    def probabilities(self) -> NDArray[np.float32]:
        """Compute the probability of a click of each candidate, 1 / (1 + exp(-logit)), (C,)."""
        logits_C = np.maximum(self.logits_C.astype(np.float64), _LOWEST)
        return (1 / (1 + np.exp(-logits_C))).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large each request of a body is, (G,)."""

    candidates_G: Index
    behaviors_G: Index
    """Length of the user's longest list."""
    values_G: Index
    """Entries of all lists of the request."""

    def __len__(self) -> int:
        return len(self.candidates_G)

    @property
    def pairs(self) -> Index:
        """Candidates times behaviours of each request, (G,)."""
        return self.candidates_G * self.behaviors_G

    @property
    def cost(self) -> int:
        """The approximate cost of all requests together; a pair of a candidate and a behaviour costs 1."""
        per_request_G = CANDIDATE_COST * self.candidates_G + self.pairs + self.values_G
        return REQUEST_COST * max(1, len(self)) + int(per_request_G.sum())

    def pieces(self) -> Iterator[slice]:
        """Cut the requests into pieces that are scored at a time."""
        start = candidates = values = 0
        for place, (own_candidates, own_values) in enumerate(
            zip(self.candidates_G.tolist(), self.values_G.tolist(), strict=True)
        ):
            candidates, values = candidates + own_candidates, values + own_values
            is_full = candidates > PIECE_CANDIDATES or values > PIECE_VALUES or place - start >= PIECE_REQUESTS
            if is_full and place > start:
                yield slice(start, place)
                start, candidates, values = place, own_candidates, own_values
        if len(self):
            yield slice(start, len(self))


def check_sizes(budget: Budget, sizes: Sizes) -> None:
    """Raise RequestTooLargeError where a body is too large."""
    for limit, value in (
        ("requests", len(sizes)),
        ("candidates", int(sizes.candidates_G.sum())),
        ("behaviors", int(sizes.behaviors_G.max(initial=0))),
        ("pairs", int(sizes.pairs.sum())),
        ("values", int(sizes.values_G.sum())),
    ):
        budget.check(limit, value)


def check_table(budget: Budget, table: pa.Table) -> None:
    """Raise RequestTooLargeError for a table whose rows, lists or dictionaries are too long.

    Checks only lengths: a few bytes may claim any length of a list of empty lists, and a few rows any text.
    """
    budget.check("requests", table.num_rows)
    text_bytes = 0
    for column in table.columns:
        for chunk in column.chunks:
            inside: Any = (0, 0, chunk)
            while inside is not None:
                budget.check("values", inside[1])
                array = inside[2]
                inside = _inside(array)
            if pa.types.is_dictionary(array.type):
                text_bytes += array.dictionary.nbytes
    budget.check("text_bytes", text_bytes)


def joined(several: Sequence[Sizes]) -> Sizes:
    """Put the sizes of several bodies one after the other."""
    return Sizes(
        candidates_G=np.concatenate([each.candidates_G for each in several]),
        behaviors_G=np.concatenate([each.behaviors_G for each in several]),
        values_G=np.concatenate([each.values_G for each in several]),
    )


def sizes_of(value: Decoded, columns: Mapping[str, Rule]) -> Sizes:
    """Measure the requests of a body by the lengths of their lists. `columns`: those of the model."""
    if isinstance(value, pa.Table):
        return _sizes_of_table(value, columns)
    return Sizes(
        candidates_G=_counts(max(map(_length, each.candidates.values()), default=0) for each in value),
        behaviors_G=_counts(max(map(_length, each.user.values()), default=0) for each in value),
        values_G=_counts(
            sum(map(_entries, each.user.values())) + sum(map(_entries, each.candidates.values())) for each in value
        ),
    )


def _counts(values: Iterator[int]) -> Index:
    return np.array(list(values), np.int64)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _entries(value: Any) -> int:
    """Count the entries of a list, and of lists in it."""
    count = _length(value)
    return count + sum(map(_length, value)) if count and _length(value[0]) else count


def _sizes_of_table(table: pa.Table, columns: Mapping[str, Rule]) -> Sizes:
    zeros = np.zeros(table.num_rows, np.int64)
    found = Sizes(candidates_G=zeros.copy(), behaviors_G=zeros.copy(), values_G=zeros.copy())
    for name, column in zip(table.column_names, table.columns, strict=True):
        rule = columns.get(name)
        start = 0
        for chunk in column.chunks:
            here = slice(start, start := start + len(chunk))
            levels = _levels(chunk)
            for level in levels:
                found.values_G[here] += level
            if levels and rule is not None and (rule.side == "ad" or rule.width is None):
                longest_G = found.candidates_G if rule.side == "ad" else found.behaviors_G
                longest_G[here] = np.maximum(longest_G[here], levels[0])
    return found


def _levels(array: Any) -> list[Index]:
    """Count the entries of each row of a whole column at each level of lists."""
    ends = np.arange(len(array) + 1)
    levels: list[Index] = []
    while (inside := _inside(array)) is not None:
        first, _, values = inside
        if pa.types.is_fixed_size_list(array.type):
            ends = ends * array.type.list_size
        else:
            ends = array.offsets.to_numpy()[ends].astype(np.int64) - first
        levels.append(np.diff(ends))
        array = values
    return levels


def _inside(array: Any) -> tuple[int, int, Any] | None:
    """Return start, number and values of the entries of lists; None if the array has no lists.

    Copies nothing, whatever lengths the array claims.
    """
    if pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size
        first, count = array.offset * size, len(array) * size
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        offsets = array.offsets
        first, last = offsets[0].as_py(), offsets[-1].as_py()
        count = last - first
    else:
        return None
    return first, count, array.values.slice(first, count)


_SHOWN = 60  # characters


def short_repr(value: Any) -> str:
    """Show a value in a message: as JSON where it can be, and short."""
    text = ""
    try:
        for part in json.JSONEncoder().iterencode(value[: _SHOWN + 1] if isinstance(value, str) else value):
            text += part
            if len(text) > _SHOWN:  # the rest of a large value is not written
                break
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


_WAYS_OUT = {"user": "put it into user", "ad": "put it into candidates, or into context if all have the same"}


class RequestColumns:
    """The columns of a request to a model with these fields of a schema."""

    def __init__(self, schema: Schema, fields: Sequence[Field]) -> None:
        self.schema = schema.model_copy(update={"fields": tuple(fields)})
        """The schema, restricted to the fields that the model uses."""
        every = rules_of(schema)  # an image's text is a uri, whichever field reads its column
        used = {column for field in fields for column in (field.column_name, field.weights) if column}
        self.rules: Mapping[str, Rule] = {column: rule for column, rule in every.items() if column in used}
        """Rules of the decoded columns; a crossed column counts as one."""
        self.sources: Mapping[str, Rule] = source_columns(self.rules)
        """Rules of the columns in a request."""
        self.aligned = aligned_columns(self.rules)
        self.nullable = {field.column_name for field in fields if field.kind == "content"}
        """Columns of images, whose nulls are missing images."""
        self._of_side = {side: self._names(side) for side in ("user", "ad")}
        roles = {schema.label, schema.group, schema.time}
        self._ignored = (roles | set(source_columns(every))) - set(self.sources)

    def num_candidates(self, request: Request, where: str = "") -> int:
        """Check the names of a request's columns, and count its candidates; `where` is a prefix for messages.

        Raises RequestError: a column is missing, unknown, in the wrong part or in two, or lists of candidates are not
        equally long.
        """
        user, context, candidates = request.user, request.context, request.candidates
        self._check_known(user, "user", "user", where)
        self._check_known(context, "context", "ad", where)
        self._check_known(candidates, "candidates", "ad", where)
        if context and (twice := context.keys() & candidates.keys() - self._ignored):
            raise RequestError(f"{where}column {min(twice)} is in context and in candidates; leave one out")
        count = self._count(request, where)
        absent = self._of_side["user"].difference(user)
        if count:
            absent |= self._of_side["ad"].difference(candidates, context)
        if absent:
            raise RequestError(where + (self._missing_inputs if request.as_tensors else self._missing)(absent))
        return count

    def check_table(self, names: Collection[str]) -> None:
        """Raise RequestError if a table has an unknown column; `check_types` finds missing ones."""
        for name in names:
            if name not in self.sources and name not in self._ignored:
                raise RequestError(f"column {short_repr(name)} is not a column of the model; {self._near(name)}")

    def _names(self, side: str) -> frozenset[str]:
        return frozenset(column for column, rule in self.sources.items() if rule.side == side)

    def _check_known(self, columns: Mapping[str, object], part: str, side: str, where: str) -> None:
        if columns.keys() <= self._of_side[side]:
            return
        for name in columns.keys() - self._of_side[side] - self._ignored:
            if isinstance(name, str) and name in self.sources:
                of_side = self.sources[name].side
                raise RequestError(f"{where}{part}.{name} is a column of side {of_side}; {_WAYS_OUT[of_side]}")
            raise RequestError(f"{where}{part}.{short_repr(name)} is not a column of the model; {self._near(name)}")

    def _near(self, name: object) -> str:
        return near_match(str(name), list(self.sources))

    def _missing(self, absent: Collection[str]) -> str:
        if len(absent) == 1:
            (name,) = absent
            rule = self.sources[name]
            return f"column {name} is missing, expected {expected(rule)}; {_WAYS_OUT[rule.side]}"
        of_side = {side: ", ".join(sorted(names & set(absent))) for side, names in self._of_side.items()}
        ways_out = [f"{names}: {_WAYS_OUT[side].replace(' it ', ' each ')}" for side, names in of_side.items() if names]
        return f"{len(absent)} columns are missing. {'. '.join(ways_out)}"

    def _missing_inputs(self, absent: Collection[str]) -> str:
        if len(absent) == 1:
            (name,) = absent
            return f"input {name} is missing, expected {expected(self.sources[name])}; send a tensor of this name"
        return f"{len(absent)} inputs are missing: {', '.join(sorted(absent))}; send a tensor for each"

    def _count(self, request: Request, where: str) -> int:
        candidates = request.candidates
        if set(map(type, candidates.values())) <= {list}:
            lengths = set(map(len, candidates.values()))
            if len(lengths) < 2:
                return lengths.pop() if lengths else 0
        counts = {column: self._length(column, values, where) for column, values in candidates.items()}
        first, count = next(iter(counts.items()))
        for other, other_count in counts.items():
            if other_count != count:
                one, two = (request.name_of("candidates", column) for column in (first, other))
                raise RequestError(
                    f"{where}{one} has {count} entries and {two} has {other_count}; each candidate needs one entry in "
                    "every column"
                )
        return count

    def _length(self, column: str, values: object, where: str) -> int:
        if not isinstance(values, list):
            raise RequestError(
                f"{where}candidates.{column} is {short_repr(values)}, and has to be a list with an entry for each"
                " candidate; what is the same for all goes into context"
            )
        return len(values)


def expected(rule: Rule) -> str:
    """Describe the values that a column must have in a user's or an ad's row."""
    inner = rule.depth - (rule.side == "ad")
    one, several = ("number", "numbers") if rule.is_real else ("whole number", "whole numbers")
    if rule.text:
        one, several = f"{one} or text", f"{several} or texts"
    each = f"a {one}" if inner == 0 else "a list of " + "lists of " * (inner - 1) + several
    return f"{each} for each candidate" if rule.side == "ad" else each
