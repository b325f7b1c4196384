"""Bodies as tables of columns, as they were sent: the one form that JSON, tensors and Arrow are brought into.

A column has flat values and the lengths of the lists around them. Nothing is converted yet: `Sizes` measures a table by
its lengths alone, so that the budget holds before a value is looked at; `serving/scoring/decode.py` converts it.

Letters of shapes: G requests of a body, N values of a column.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featurestore.format.datafile import is_text
from featurestore.keys import Int64Array
from serving.errors import RequestError
from serving.network import CHUNK, Steps
from serving.problems import Problem
from serving.scoring.request import Request, RequestColumns, expected, short_repr
from serving.settings import Budget
from trainer.errors import SchemaError
from trainer.samples.columns import Rule, check_types, unwrapped

Bool = NDArray[np.bool_]
Label = Callable[[str, int], str]
CANDIDATE_COST, REQUEST_COST = 10, 1_000
"""Cost of a candidate and of a request, in pairs of a candidate and a behaviour."""
PIECE_REQUESTS, PIECE_CANDIDATES, PIECE_VALUES = 64, 2_048, 20_000
"""Most pairs of a piece, unless it is a single request."""
_TABLE, ARROW = "the table", "application/vnd.apache.arrow.stream"


class SentColumn(NamedTuple):
    """The values of a column, and the lengths of the lists around them, outermost first.

    The outermost lists are those of requests. A column of the ads in context has one entry for a request, which counts
    for all of its candidates.
    """

    values: Any
    """N values: a list of Python's, an array of numbers, or an Arrow array of texts."""
    levels: tuple[Int64Array, ...]
    is_null_N: Bool | None = None
    """Which numbers or texts are null; None where none is. Python's values have None among them instead."""
    in_context_G: Bool | None = None
    """Which requests have the column in their context; None where none has."""

    def piece(self, of: slice) -> "SentColumn":
        """Return the column of some requests."""
        start, stop, levels = of.start, of.stop, list[Int64Array]()
        for lengths in self.levels:
            ends = np.append(0, np.cumsum(lengths))
            levels.append(lengths[start:stop])
            start, stop = int(ends[start]), int(ends[stop])
        is_null_N = None if self.is_null_N is None else self.is_null_N[start:stop]
        in_context_G = None if self.in_context_G is None else self.in_context_G[of]
        return SentColumn(self.values[start:stop], tuple(levels), is_null_N, in_context_G)


@dataclass(frozen=True)
class Sizes:
    """How large each request of a body is, (G,)."""

    candidates_G: Int64Array
    behaviors_G: Int64Array
    """Length of the user's longest list."""
    values_G: Int64Array
    """Entries of all lists of the request."""

    def __len__(self) -> int:
        return len(self.candidates_G)

    @property
    def pairs(self) -> Int64Array:
        """Candidates times behaviours of each request, (G,)."""
        return self.candidates_G * self.behaviors_G

    @property
    def cost(self) -> int:
        """The approximate cost of all requests together; a pair of a candidate and a behaviour costs 1."""
        per_request_G = CANDIDATE_COST * self.candidates_G + self.pairs + self.values_G
        return REQUEST_COST * max(1, len(self)) + int(per_request_G.sum())

    def check(self, budget: Budget) -> None:
        """Raise RequestTooLargeError where a body is too large."""
        for limit, value in (
            ("requests", len(self)),
            ("candidates", int(self.candidates_G.sum())),
            ("behaviors", int(self.behaviors_G.max(initial=0))),
            ("pairs", int(self.pairs.sum())),
            ("values", int(self.values_G.sum())),
        ):
            budget.check(limit, value)

    @classmethod
    def joined(cls, several: Sequence["Sizes"]) -> "Sizes":
        """Put the sizes of several bodies one after the other."""
        if len(several) == 1:
            return several[0]
        parts = [(each.candidates_G, each.behaviors_G, each.values_G) for each in several]
        return cls(*(np.concatenate(each) for each in zip(*parts, strict=True)))

    def pieces(self) -> Iterator[slice]:
        """Cut the requests into pieces that are converted and scored at a time: at least one, which may be empty."""
        start = candidates = values = 0
        sizes = zip(self.candidates_G.tolist(), self.values_G.tolist(), strict=True)
        for place, (own_candidates, own_values) in enumerate(sizes):
            candidates, values = candidates + own_candidates, values + own_values
            is_full = candidates > PIECE_CANDIDATES or values > PIECE_VALUES or place - start >= PIECE_REQUESTS
            if is_full and place > start:
                yield slice(start, place)
                start, candidates, values = place, own_candidates, own_values
        yield slice(start, len(self))


@dataclass(frozen=True)
class Names:
    """How messages name the values of a body, as its client sent them."""

    label: Label
    """Names a column of a request: `candidates.ad_item`, `input ad_item`, `column ad_item`."""
    where: str = ""
    """Names a request by its number, `requests[{}]: `; empty where a body has one alone."""
    first: int = 0
    """Number of the first request in its body."""

    def of_request(self, request: int) -> str:
        """Begin a message about a request."""
        return self.where.format(self.first + request)

    def path(self, column: str, places: Sequence[int]) -> str:
        """Name a value by the number of its request and its places in lists: `requests[1]: candidates.ad_item[7]`."""
        request, *inside = places
        label = self.label(column, self.first + request)
        if label.startswith("context."):
            inside = inside[1:]
        return self.of_request(request) + label + "".join(f"[{place}]" for place in inside)


@dataclass(frozen=True)
class SentTable:
    """The columns of a body's G requests."""

    columns: Mapping[str, SentColumn]
    counts_G: Int64Array
    """Candidates of each request."""
    names: Names

    def piece(self, of: slice) -> "SentTable":
        """Return some requests."""
        if of == slice(0, len(self.counts_G)):
            return self
        columns = {name: each.piece(of) for name, each in self.columns.items()}
        return SentTable(columns, self.counts_G[of], replace(self.names, first=self.names.first + of.start))

    def in_context(self, name: str) -> Bool:
        """Tell which requests have a column in their context, (G,)."""
        in_context_G = self.columns[name].in_context_G
        return np.zeros(len(self.counts_G), np.bool_) if in_context_G is None else in_context_G

    def sizes(self, columns: RequestColumns) -> Sizes:
        """Measure each request by the lengths of its lists."""
        behaviors_G = values_G = np.zeros(len(self.counts_G), np.int64)
        for name, column in self.columns.items():
            rule, levels, in_context_G = columns.sources[name], column.levels, column.in_context_G
            if levels:
                values_G = values_G + (levels[0] if in_context_G is None else np.where(in_context_G, 0, levels[0]))
            if len(levels) > 1:
                inner_G = totals(levels[1], levels[0])
                if in_context_G is not None:  # one value is little, but its list is repeated
                    inner_G = inner_G * np.where(in_context_G, self.counts_G, 1)
                values_G = values_G + inner_G
            if levels and rule.side == "user" and rule.width is None:
                behaviors_G = np.maximum(behaviors_G, levels[0])
        return Sizes(self.counts_G, behaviors_G, values_G)


def totals(lengths_K: Int64Array, counts_G: Int64Array) -> Int64Array:
    """Add up the next `counts_G[g]` lengths for each g, (G,)."""
    if len(counts_G) == 1:
        found_G: Int64Array = lengths_K.sum(keepdims=True)
    else:
        found_G = np.diff(np.append(0, np.cumsum(lengths_K))[np.append(0, np.cumsum(counts_G))])
    return found_G


def joined(tables: Sequence[SentTable]) -> SentTable:
    """Put the requests of several tables one after the other; all of their values are Python's."""
    if len(tables) == 1:
        return tables[0]
    columns = {}
    for name in tables[0].columns:
        parts = [each.columns[name] for each in tables]
        levels = tuple(np.concatenate(level) for level in zip(*(each.levels for each in parts), strict=True))
        in_context_G: Bool | None = None
        if any(each.in_context_G is not None for each in parts):
            in_context_G = np.concatenate([table.in_context(name) for table in tables])
        columns[name] = SentColumn(list(chain.from_iterable(each.values for each in parts)), levels, None, in_context_G)
    return SentTable(columns, np.concatenate([each.counts_G for each in tables]), Names(lambda column, _: column))


class UnusableValueError(ValueError):
    """Value number `place` of a column has a problem, which tells `told` after the value's place in the body."""

    def __init__(self, place: int, problem: Problem, *told: object) -> None:
        super().__init__(place, problem, *told)
        self.place, self.problem, self.told = place, problem, told

    def named(self, names: Names, column: str, levels: Sequence[Int64Array]) -> RequestError:
        """Make the error for the client; `levels`: the lengths of the lists around the value."""
        return RequestError(self.problem, names.path(column, places_of(levels, self.place)), *self.told)


def places_of(levels: Sequence[Int64Array], place: int) -> list[int]:
    """Return the number of the request that a value belongs to, and its place in each list around it."""
    places: list[int] = []
    for lengths in reversed(levels):
        ends = np.cumsum(lengths)
        row = int(np.searchsorted(ends, place, side="right"))
        places.insert(0, place - int(ends[row] - lengths[row]))
        place = row
    return [place, *places]


def flatten(entries: Sequence[Any], rule: Rule, depth: int) -> tuple[Sequence[Any], Int64Array]:
    """Join lists, inside of `depth` others, and return the length of each. Raises UnusableValueError."""
    if len(entries) == 1 and type(entries[0]) is list:  # most bodies have one request: a third of the time
        return entries[0], np.array([len(entries[0])])
    if not set(map(type, entries)) <= {list}:
        place = next(place for place, entry in enumerate(entries) if type(entry) is not list)
        raise UnusableValueError(place, Problem.UNFIT, short_repr(entries[place]), expected(rule, depth))
    lengths_M = np.fromiter(map(len, entries), np.int64, len(entries))
    return list(chain.from_iterable(entries)), lengths_M


def sent_requests(columns: RequestColumns, requests: Sequence[Request]) -> Steps[SentTable]:
    """Lay out requests by columns, those of the model alone, in pieces. A column that none has is left out.

    Raises RequestError: a column is unknown, in the wrong part or in two, missing in some requests, or has no list.
    """

    def label(column: str, request: int) -> str:
        part = "user" if columns.sources[column].side == "user" else "candidates"
        return f"{'context' if requests and column in requests[request].context else part}.{column}"

    names = Names(label, "requests[{}]: " if len(requests) > 1 else "")
    for number, each in enumerate(requests):
        columns.check_parts(each, names.where.format(number))
        if number % PIECE_REQUESTS == PIECE_REQUESTS - 1:
            yield
    found = dict[str, SentColumn]()
    lists = [[len(value) for value in each.candidates.values() if isinstance(value, list)] for each in requests]
    counts_G = np.array([max(each, default=0) for each in lists], np.int64)
    parts = {"user": [each.user for each in requests], "ad": [each.candidates for each in requests]}
    laid_out = 0
    for name, rule in columns.sources.items():
        if laid_out > CHUNK:
            laid_out = 0
            yield
        in_context_G: Bool | None = None
        try:
            entries: Sequence[Any] = [part[name] for part in parts[rule.side]]
        except KeyError:  # few columns are in context, and in some requests alone
            has = [name in each.user or name in each.context or name in each.candidates for each in requests]
            needs_G = np.ones(len(requests), np.bool_) if rule.side == "user" else counts_G > 0
            lacking = (needs_G & ~np.array(has)).nonzero()[0].tolist()
            if lacking and any(has):
                raise missing(columns, [name], names, lacking[0]) from None
            if lacking:
                continue
            entries = [
                [each.context[name]] if name in each.context else each.candidates.get(name, []) for each in requests
            ]
            if any(name in each.context for each in requests):
                in_context_G = np.array([name in each.context for each in requests])
        levels: tuple[Int64Array, ...] = ()
        for _ in range(rule.depth):
            try:
                entries, lengths = flatten(entries, rule, len(levels))
            except UnusableValueError as failure:
                raise failure.named(names, name, levels) from None
            levels = (*levels, lengths)
        found[name] = SentColumn(entries, levels, None, in_context_G)
        laid_out += len(requests) + len(found[name].values)
    return SentTable(found, counts_G, names)


def missing(columns: RequestColumns, absent: Sequence[str], names: Names, request: int | None = None) -> RequestError:
    """Make the error of columns that a request lacks, or all of them."""
    where = "" if request is None else names.where.format(request)
    labels = ", ".join(names.label(name, request or 0) for name in absent)
    if len(absent) == 1:
        return RequestError(Problem.NO_COLUMN, where, labels, expected(columns.sources[absent[0]], 0))
    return RequestError(Problem.NO_COLUMNS, where, len(absent), labels)


def sent_table(columns: RequestColumns, table: pa.Table) -> Steps[SentTable]:
    """Lay out a table with the columns of sample files, a request per row, by the columns of the model, in pieces.

    Raises RequestError: a column is unknown, twice in the table or of a wrong type, or a list is null.
    """
    columns.check_known(table.column_names, "column ")
    names = Names(lambda column, _: f"column {column}", f"{_TABLE}, row {{}}: ")
    rules = {name: rule for name, rule in columns.sources.items() if name in table.column_names}
    try:
        check_types(table.schema, rules, _TABLE)
    except SchemaError as failure:
        raise RequestError(*failure.args) from None
    found = dict[str, SentColumn]()
    for name, rule in rules.items():
        found[name] = _of_arrow(name, rule, table.column(name).combine_chunks(), names)
        yield
    counts_G = next((found[name].levels[0] for name, rule in rules.items() if rule.side == "ad"), None)
    return SentTable(found, np.zeros(table.num_rows, np.int64) if counts_G is None else counts_G, names)


def _of_arrow(name: str, rule: Rule, array: Any, names: Names) -> SentColumn:
    levels: tuple[Int64Array, ...] = ()
    for _ in range(rule.depth):
        if array.null_count:
            place = int(array.is_null().to_numpy(zero_copy_only=False).argmax())
            raise UnusableValueError(place, Problem.NULL).named(names, name, levels)
        array, ends = unwrapped(array)
        levels = (*levels, np.diff(ends))
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    is_null_N = array.is_null().to_numpy(zero_copy_only=False)
    if not is_text(array.type):
        array = (array.fill_null(0) if array.null_count else array).to_numpy(zero_copy_only=False)
    return SentColumn(array, levels, is_null_N if is_null_N.any() else None)


def check_table(budget: Budget, table: pa.Table) -> None:
    """Raise RequestTooLargeError for a table whose rows or lists are too long.

    Checks only lengths: a few bytes may claim any length of a list of empty lists.
    """
    budget.check("requests", table.num_rows)
    values = 0
    for column in table.columns:
        for chunk in column.chunks:
            array: Any = chunk
            while (inside := _inside(array)) is not None:
                count, array = inside
                budget.check("values", values := values + count)


def stream_of(table: pa.Table) -> bytes:
    """Write a table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _inside(array: Any) -> tuple[int, Any] | None:
    """Return number and values of the entries of lists, or None if the array has no lists. Copies nothing."""
    if pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size
        first, count = array.offset * size, len(array) * size
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        first = array.offsets[0].as_py()
        count = array.offsets[-1].as_py() - first
    else:
        return None
    return count, array.values.slice(first, count)
