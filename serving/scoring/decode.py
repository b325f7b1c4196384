"""Converts the columns of a body to the trainer's arrays, by the rules for sample files (trainer/samples/columns.py).

Converts a whole column at once: 200 numbers take about 20 us. A column of more than `CHUNK` values is converted in
chunks, between which an event loop may do other work. Errors name the position of the unusable value.

All requests of a call become one batch: G users, B candidates of all of them, M = G or B by side, N values of a column.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featurestore.keys import NO_IMAGE, Int64Array, ids_of_texts, keys_of_uris
from serving.errors import NotFiniteError, RequestError
from serving.network import CHUNK, Steps
from serving.problems import Problem
from serving.scoring.request import RequestColumns, short_repr
from serving.scoring.sent import Bool, SentColumn, SentTable, UnusableValueError, missing, places_of
from trainer.errors import OverflowingValueError
from trainer.samples.columns import Encoded, Rule, TextKind, Values, cross, encode_numbers, encode_texts, ranges
from trainer.samples.reader import Batch, Jagged, inputs_of
from trainer.schema.fields import Field

Result = TypeVar("Result")
CROSSED_CHUNK = 2_000
"""Crossed values per piece; each takes some microseconds."""


class Column(NamedTuple):
    """Converted values, and the lengths of the lists around them inside a row of their side, outermost first."""

    values: Values
    levels: tuple[Int64Array, ...]
    is_null_N: Bool | None
    """Which images are null; their key is 0. None where none is."""


class Decoded(NamedTuple):
    """The trainer's batch of some requests, without labels."""

    batch: Batch
    nulls: Mapping[str, Bool]
    """By column of images: a mask of the nulls, (N,); columns without nulls are left out."""


def decode(columns: RequestColumns, sent: SentTable) -> Steps[Decoded]:
    """Convert and check all columns of the model, in pieces.

    Raises RequestError that names the column, the place and the value, and NotFiniteError.
    """
    if absent := [name for name in columns.sources if name not in sent.columns]:
        raise missing(columns, absent, sent.names)
    found = yield from _Decoder(columns, sent).columns()
    nulls = {name: each.is_null_N for name, each in found.items() if each.is_null_N is not None}
    counts_G = sent.counts_G
    ones = {"user": np.ones(len(counts_G), np.int64), "ad": np.ones(int(counts_G.sum()), np.int64)}

    def taken(field: Field, name: str) -> Jagged:
        values, levels, _ = found[name]
        return Jagged(values, levels[0] if levels else ones[columns.rules[name].side])

    try:
        inputs = inputs_of(columns.schema, taken)
    except OverflowingValueError as failure:
        levels = (counts_G,) if columns.rules[failure.column].side == "ad" else ()
        path = sent.names.path(failure.column, places_of(levels, failure.row))
        raise NotFiniteError(failure.problem, path, failure.values["value"]) from None
    num_samples = len(ones["ad"])
    batch = Batch(
        **inputs,
        group_of_sample_B=np.repeat(np.arange(len(counts_G)), counts_G),
        label_B=np.zeros(num_samples, np.float32),
        group_id_B=np.zeros(num_samples, np.int64),
        global_samples=num_samples,
    )
    return Decoded(batch, nulls)


class _Decoder:
    """Converts the columns of a body."""

    def __init__(self, columns: RequestColumns, sent: SentTable) -> None:
        self._columns, self._sent = columns, sent

    def columns(self) -> Steps[dict[str, Column]]:
        """Convert and check all columns; those of integers, which are most, together."""
        self._check_candidates()
        found, rules = dict[str, Column](), self._columns.rules
        known = self._integers()
        yield
        for name, rule in rules.items():
            if rule.crossed:
                found[name] = yield from self._crossed(rule)
            elif name in known:
                found[name] = self._spread(name, known[name])
            else:
                found[name] = yield from self._converted(name, rule)
        for name, rule in self._columns.measured.items():
            levels = ((self._sent.counts_G,) if rule.side == "ad" else ()) + found[name].levels
            if rule.width is not None:
                self._check_lengths(name, levels, np.full(len(levels[-1]), rule.width), Problem.OTHER_LENGTH)
            for other in rule.lengths_of:
                if found[name].levels:
                    self._check_lengths(name, levels, found[other].levels[-1], Problem.UNEQUAL_LENGTHS, other)
        for one, *others in self._columns.aligned:
            for name in others:
                own, wanted = found[name].levels[:1], found[one].levels[0]
                self._check_lengths(name, own, wanted, Problem.UNEQUAL_LENGTHS, one)
        return found

    def _check_candidates(self) -> None:
        """Check that each column of the ads has one entry for each candidate."""
        wanted_G, lengths = self._sent.counts_G, dict[str, Int64Array]()
        for name, sent in self._sent.columns.items():
            if self._columns.sources[name].side == "ad":
                own_G = sent.levels[0]
                lengths[name] = own_G if sent.in_context_G is None else np.where(sent.in_context_G, wanted_G, own_G)
        if lengths and (np.array(list(lengths.values())) != wanted_G).any():  # all at once: a third of the time
            for name, own_G in lengths.items():
                self._check_lengths(name, (own_G,), wanted_G, Problem.OTHER_CANDIDATES)

    def _check_lengths(
        self, name: str, levels: Sequence[Int64Array], wanted_M: Int64Array, problem: Problem, *other: str
    ) -> None:
        """Raise RequestError where a column's innermost lists are not as long as wanted, or as those of `other`."""
        found_M = levels[-1]
        if (wrong_M := found_M != wanted_M).any():
            place = int(wrong_M.argmax())
            path = self._sent.names.path(name, places_of(levels[:-1], place))
            raise RequestError(problem, path, int(found_M[place]), *other, int(wanted_M[place]))

    def _integers(self) -> dict[str, Values]:
        """Convert the columns of whole numbers of JSON, if all of their values are."""
        some: dict[str, Sequence[Any]] = {}
        for name in self._columns.integers:
            values = self._sent.columns[name].values
            is_one = isinstance(values, list) and values and type(values[0]) is int
            if is_one and not (name in self._columns.nullable and None in values):
                some[name] = values
        return dict(zip(some, all_integers(list(some.values())) or (), strict=False))

    def _converted(self, name: str, rule: Rule) -> Steps[Column]:
        """Convert the values of a column, a chunk at a time."""
        sent, is_nullable = self._sent.columns[name], name in self._columns.nullable
        values, is_null_N = sent.values, sent.is_null_N
        if is_nullable and isinstance(values, list) and None in values:
            is_null_N = np.fromiter((value is None for value in values), np.bool_, len(values))
            values = [NO_IMAGE if value is None else value for value in values]
        try:
            if not rule.is_real and not is_nullable:
                _refuse_nulls(is_null_N)
            elif is_null_N is not None and rule.is_real:  # NaN, as in a file
                values = np.where(is_null_N, np.nan, values)
            parts = yield from _in_chunks(values, partial(_convert, rule=rule))
            found: Values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        except UnusableValueError as failure:
            raise failure.named(self._sent.names, name, sent.levels) from None
        if is_null_N is None or not is_nullable:
            return self._spread(name, found)
        return self._spread(name, np.where(is_null_N, NO_IMAGE, found), is_null_N)

    def _crossed(self, rule: Rule) -> Steps[Column]:
        """Make one ID of the values of several columns together, a chunk at a time."""
        encoded = list[Encoded]()
        levels: tuple[Int64Array, ...] = ()
        for name in rule.crossed:
            sent = self._sent.columns[name]
            try:
                found = yield from _encoded(sent, self._columns.sources[name])
            except UnusableValueError as failure:
                raise failure.named(self._sent.names, name, sent.levels) from None
            column = self._spread(name, found.index_N)
            levels = levels if encoded else column.levels
            for depth, wanted_M in enumerate(levels):
                outer = (self._sent.counts_G,) if rule.side == "ad" else ()
                inside = (*outer, *column.levels[: depth + 1])
                self._check_lengths(name, inside, wanted_M, Problem.UNEQUAL_LENGTHS, rule.crossed[0])
            encoded.append(Encoded(found.ids_U, found.texts_U, column.values))
        ids = [np.zeros(0, np.int64)]
        for start in range(0, len(encoded[0].index_N), CROSSED_CHUNK):
            here = slice(start, start + CROSSED_CHUNK)
            ids.append(cross([Encoded(each.ids_U, each.texts_U, each.index_N[here]) for each in encoded]).ids)
            yield
        return Column(np.concatenate(ids), levels, None)

    def _spread(self, name: str, values: Values, is_null_N: Bool | None = None) -> Column:
        """Give each candidate its own row; what is in context is repeated for each of them."""
        sent = self._sent.columns[name]
        if self._columns.sources[name].side == "user":
            return Column(values, sent.levels, is_null_N)
        levels = sent.levels[1:]
        if sent.in_context_G is None:
            return Column(values, levels, is_null_N)
        times_R = np.repeat(np.where(sent.in_context_G, self._sent.counts_G, 1), sent.levels[0])
        if not levels:
            return Column(np.repeat(values, times_R), (), None if is_null_N is None else np.repeat(is_null_N, times_R))
        starts_R = np.cumsum(levels[0]) - levels[0]
        lengths_B = np.repeat(levels[0], times_R)
        place_N = ranges(np.repeat(starts_R, times_R), lengths_B)
        return Column(values[place_N], (lengths_B,), None if is_null_N is None else is_null_N[place_N])


def _in_chunks(values: Any, convert: Callable[[Any], Result], chunk: int = CHUNK) -> Steps[list[Result]]:
    """Convert values a chunk at a time; one chunk at least. Raises UnusableValueError."""
    found = list[Result]()
    for start in range(0, len(values) or 1, chunk):
        try:
            found.append(convert(values if len(values) <= chunk else values[start : start + chunk]))
        except UnusableValueError as failure:
            raise UnusableValueError(failure.place + start, failure.problem, *failure.told) from None
        yield
    return found


def _convert(values: Any, rule: Rule) -> Values:
    """Convert values of a list, an array of numbers, or an Arrow array of texts, whose nulls have the ID of some text.

    Raises UnusableValueError.
    """
    if isinstance(values, pa.Array):
        return _hashed(values, rule).ids
    if isinstance(values, np.ndarray):
        return _reals(values, rule.may_miss) if rule.is_real else whole_array(values)
    return real_numbers(values, rule.may_miss) if rule.is_real else whole_numbers(values, rule.text)


def all_integers(columns: Sequence[Sequence[Any]]) -> list[NDArray[np.int64]] | None:
    """Convert several columns at once, (N,) each; None if a value is not a 64-bit integer."""
    joined = list(chain.from_iterable(columns))
    try:
        values_N = np.frombuffer(struct.pack(f"{len(joined)}q", *joined), np.int64)  # half the time of array("q")
    except struct.error:
        return None
    # A bool passes for 0 or 1; checking every type would take longer than all the rest.
    doubtful = ((values_N | 1) == 1).nonzero()[0].tolist()
    if bool in {type(joined[place]) for place in doubtful}:
        return None
    ends = list(accumulate(map(len, columns)))
    return [values_N[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def whole_numbers(values: Sequence[Any], text: TextKind | None) -> NDArray[np.int64]:
    """Return integers, (N,); texts become IDs as `text` says. Raises UnusableValueError."""
    kinds = set(map(type, values))
    if kinds <= {int}:
        return _int64(values)
    if kinds == {str} and text is not None:
        return _of_texts(values, text)
    usable: set[type] = {int, str} if text is not None else {int}
    if kinds <= usable:
        return _int64([_of_texts([each], text)[0] if isinstance(each, str) and text else each for each in values])
    raise _first(values, usable, "a whole number" + (" or a text" if text else ""))


def real_numbers(values: Sequence[Any], may_miss: bool) -> NDArray[np.float32]:
    """Return real numbers as float32, (N,); a missing one (null, NaN) is NaN. Raises UnusableValueError."""
    kinds, usable = set(map(type, values)), {int, float, type(None)} if may_miss else {int, float}
    if not kinds <= usable:
        wanted = "a number" + (" or null" if may_miss else "; give its field fill to replace missing ones")
        raise _first(values, usable, wanted)
    with np.errstate(over="ignore"):
        try:  # whole numbers are rounded once, as in a column of integers
            numbers_N = np.array(values, np.int64 if kinds == {int} else np.float64)
        except OverflowError:
            known = [np.inf if type(value) is int and abs(value) >= 1 << 1023 else value for value in values]
            numbers_N = np.array(known, np.float64)
        return _finite(numbers_N.astype(np.float32), values, may_miss)


def _finite(numbers_N: NDArray[np.float32], values: Any, may_miss: bool) -> NDArray[np.float32]:
    """Return the numbers. Raises UnusableValueError for one that is infinite or, unless it may miss, NaN."""
    wrong_N = np.isinf(numbers_N) if may_miss else ~np.isfinite(numbers_N)
    if wrong_N.any():
        place = int(wrong_N.argmax())
        way_out = "; fill in the schema replaces missing ones" if np.isnan(numbers_N[place]) else ""
        raise UnusableValueError(place, Problem.NOT_FINITE, values[place], way_out)
    return numbers_N


def whole_array(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return whole numbers as int64. Raises UnusableValueError."""
    if values.dtype.kind not in "iu" and len(values):
        raise UnusableValueError(0, Problem.UNFIT, short_repr(values[0].item()), "a whole number")
    if values.dtype == np.uint64 and len(values) and int(values.max()) >= 1 << 63:
        raise UnusableValueError(int(values.argmax()), Problem.BEYOND_64_BITS, values.max())
    return values.astype(np.int64, copy=False)


def _reals(values: NDArray[Any], may_miss: bool) -> NDArray[np.float32]:
    """Return numbers as float32. Raises UnusableValueError."""
    if values.dtype.kind not in "iuf" and len(values):
        raise UnusableValueError(0, Problem.UNFIT, short_repr(values[0].item()), "a number")
    with np.errstate(over="ignore"):
        return _finite(values.astype(np.float32), values, may_miss)


def _refuse_nulls(is_null_N: Bool | None) -> None:
    if is_null_N is not None and is_null_N.any():
        raise UnusableValueError(int(is_null_N.argmax()), Problem.NULL)


def _hashed(texts: Any, rule: Rule) -> Encoded:
    """Hash an Arrow array of texts. Raises UnusableValueError."""
    assert rule.text is not None
    try:
        return encode_texts(texts.fill_null(""), rule.text)
    except UnicodeDecodeError:
        raise UnusableValueError(0, Problem.COLUMN_NOT_UTF8) from None


def _encoded(sent: SentColumn, rule: Rule) -> Steps[Encoded]:
    """Return the values of a column to be crossed with their texts, a chunk at a time. Raises UnusableValueError.

    A text may be among them twice."""
    _refuse_nulls(sent.is_null_N)
    parts = yield from _in_chunks(sent.values, partial(_encoded_chunk, rule=rule), CROSSED_CHUNK)
    if len(parts) == 1:
        return parts[0]
    starts = accumulate((len(each.texts_U) for each in parts), initial=0)
    return Encoded(
        np.concatenate([each.ids_U for each in parts]),
        [text for each in parts for text in each.texts_U],
        np.concatenate([each.index_N + start for each, start in zip(parts, starts, strict=False)]),
    )


def _encoded_chunk(values: Any, rule: Rule) -> Encoded:
    """Return the values of a column to be crossed, each distinct one once. Raises UnusableValueError."""
    if isinstance(values, pa.Array):
        return _hashed(values, rule)
    if isinstance(values, np.ndarray):
        return encode_numbers(whole_array(values))
    ids_N = whole_numbers(values, "id")
    if str not in set(map(type, values)):
        return encode_numbers(ids_N)
    return encode_texts(pa.array(list(map(str, values)), pa.string()), "id")


def _of_texts(texts: Sequence[str], kind: TextKind) -> NDArray[np.int64]:
    return keys_of_uris(texts) if kind == "uri" else ids_of_texts(texts)


def _int64(values: Sequence[Any]) -> NDArray[np.int64]:
    try:
        return np.fromiter(values, np.int64, len(values))
    except OverflowError:
        place = next(place for place, value in enumerate(values) if not -(1 << 63) <= value < 1 << 63)
        raise UnusableValueError(place, Problem.BEYOND_64_BITS, short_repr(values[place])) from None


def _first(values: Sequence[Any], usable: set[type], wanted: str) -> UnusableValueError:
    """Make the error of the first value of another type."""
    place = next(place for place, value in enumerate(values) if type(value) not in usable)
    value = values[place]
    if type(value) is float and abs(value) >= 1 << 63:  # the JSON parser returns larger whole numbers as floats
        return UnusableValueError(place, Problem.BEYOND_64_BITS, short_repr(value))
    return UnusableValueError(place, Problem.UNFIT, short_repr(value), wanted)
