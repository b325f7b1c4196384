"""Decodes requests to the trainer's arrays, by the rules for sample files (trainer/samples/columns.py), in one pass.

Converts a whole column at once: 200 numbers take about 20 us. A column of more than `CHUNK` values is converted in
chunks, between which an event loop may do other work. Errors name the position of the unusable value.

All requests of a call become one batch: G users, B candidates of all of them, M = G or B by side, N values of a column.
"""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from featurestore.keys import NO_IMAGE, ids_of_texts, keys_of_uris
from serving.errors import OverflowingInputError, RequestError
from serving.network import CHUNK, Steps, run_steps
from serving.scoring.request import Request, RequestColumns, expected, short_repr
from trainer.errors import OverflowingValueError
from trainer.samples.columns import Encoded, Index, Rule, TextKind, Values, cross, encode_numbers, sizes_of
from trainer.samples.reader import Batch, Jagged, inputs_of
from trainer.schema import Field

Bool = NDArray[np.bool_]
Result = TypeVar("Result")
CROSSED_CHUNK = 2_000
"""Crossed values per piece; each takes some microseconds."""


class UnusableValueError(ValueError):
    """Value number `place` of a column cannot be used: `why` says what it is and what it has to be."""

    def __init__(self, place: int, why: str) -> None:
        super().__init__(place, why)
        self.place, self.why = place, why


def flatten(entries: Sequence[Any], wanted: str) -> tuple[Sequence[Any], Index]:
    """Join lists, and return the length of each. Raises UnusableValueError for an entry that is not a list."""
    if not set(map(type, entries)) <= {list}:
        place = next(place for place, entry in enumerate(entries) if type(entry) is not list)
        raise UnusableValueError(place, f"{short_repr(entries[place])}, and has to be {wanted}")
    lengths_M = np.fromiter(map(len, entries), np.int64, len(entries))
    return entries[0] if len(entries) == 1 else list(chain.from_iterable(entries)), lengths_M


def whole_numbers(values: Sequence[Any], text: TextKind | None) -> NDArray[np.int64]:
    """Return integers, (N,); texts become IDs as `text` says. Raises UnusableValueError."""
    kinds = set(map(type, values))
    if kinds <= {int}:
        return _int64(values)
    if kinds == {str} and text is not None:
        return _of_texts(values, text)
    usable: set[type] = {int, str} if text is not None else {int}
    if kinds <= usable:
        return _int64([_id_of(value, place, text) for place, value in enumerate(values)])
    raise _first(values, usable, "a whole number" + (" or a text" if text else ""))


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


def image_keys(values: Sequence[Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """Return keys of images, (N,), and a mask of nulls, whose key is NO_IMAGE, or None. Raises UnusableValueError."""
    if None not in values:
        return whole_numbers(values, "uri"), None
    is_null_N = np.fromiter((value is None for value in values), np.bool_, len(values))
    return whole_numbers([NO_IMAGE if value is None else value for value in values], "uri"), is_null_N


def real_numbers(values: Sequence[Any], may_miss: bool) -> NDArray[np.float32]:
    """Return real numbers as float32, (N,); a missing one (null, NaN) is NaN. Raises UnusableValueError."""
    kinds, usable = set(map(type, values)), {int, float, type(None)} if may_miss else {int, float}
    if not kinds <= usable:
        wanted = "a number" + (" or null" if may_miss else "; give its field fill to replace missing ones")
        raise _first(values, usable, wanted)
    with np.errstate(over="ignore"):
        numbers_N = _floats(values, kinds)
    wrong_N = np.isinf(numbers_N) if may_miss else ~np.isfinite(numbers_N)
    if wrong_N.any():
        place = int(wrong_N.argmax())
        way_out = "; fill in the schema replaces missing ones" if np.isnan(numbers_N[place]) else ""
        raise UnusableValueError(place, f"{values[place]}, and has to be a finite float32 number{way_out}")
    return numbers_N


def encode_crossed(values: Sequence[Any]) -> Encoded:
    """Return the values of a column to be crossed, each distinct one once. Raises UnusableValueError."""
    ids_N = whole_numbers(values, "id")
    if str not in set(map(type, values)):
        return encode_numbers(ids_N)
    place_of = {str(value).strip(): place for place, value in enumerate(values)}
    number_of = {text: number for number, text in enumerate(place_of)}
    index_N = np.fromiter((number_of[str(value).strip()] for value in values), np.int64, len(values))
    return Encoded(ids_N[list(place_of.values())], list(place_of), index_N)


def _floats(values: Sequence[Any], kinds: Iterable[type]) -> NDArray[np.float32]:
    """Convert to float32; whole numbers are rounded once, as in a column of integers."""
    try:
        if set(kinds) == {int}:
            return np.array(values, np.int64).astype(np.float32)
        return np.array(values, np.float64).astype(np.float32)
    except OverflowError:
        return np.array([_or_infinite(value) for value in values], np.float64).astype(np.float32)


def _or_infinite(value: Any) -> float:
    try:
        return np.nan if value is None else float(value)
    except OverflowError:
        return float("inf")


def _of_texts(texts: Sequence[str], kind: TextKind) -> NDArray[np.int64]:
    try:
        return keys_of_uris(texts) if kind == "uri" else ids_of_texts(texts)
    except UnicodeEncodeError:
        place = next(place for place, text in enumerate(texts) if not _has_utf8(text))
        raise UnusableValueError(place, f"{short_repr(texts[place])}, a text that is not Unicode") from None


def _id_of(value: Any, place: int, text: TextKind | None) -> Any:
    """Convert one value: a column with numbers and texts is rare."""
    if not isinstance(value, str) or text is None:
        return value
    try:
        return int(_of_texts([value], text)[0])
    except UnusableValueError as failure:
        raise UnusableValueError(place, failure.why) from None


def _has_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _int64(values: Sequence[Any]) -> NDArray[np.int64]:
    try:
        return np.fromiter(values, np.int64, len(values))
    except OverflowError:
        place = next(place for place, value in enumerate(values) if not -(1 << 63) <= value < 1 << 63)
        why = f"{short_repr(values[place])}, beyond 64 bits with a sign; send it as a text if it is a name"
        raise UnusableValueError(place, why) from None


def _first(values: Sequence[Any], usable: set[type], wanted: str) -> UnusableValueError:
    """Make the error of the first value of another type."""
    place = next(place for place, value in enumerate(values) if type(value) not in usable)
    value = values[place]
    is_large = type(value) is float and abs(value) >= 1 << 63  # the JSON parser returns larger whole numbers as floats
    way_out = "; send a number beyond 64 bits as a text if it is a name" if is_large and "text" in wanted else ""
    return UnusableValueError(place, f"{short_repr(value)}, and has to be {wanted}{way_out}")


@dataclass(frozen=True)
class DecodedRequests:
    """The candidates of all requests as the trainer's batch, without labels."""

    batch: Batch
    counts_G: Index
    """Candidates of each request."""
    nulls: Mapping[str, Bool]
    """By column of images: a mask of the nulls, whose key is 0, (N,); columns without nulls are left out."""


def decode_requests(columns: RequestColumns, requests: Sequence[Request]) -> DecodedRequests:
    """Decode and check the requests. Raises RequestError that names the column, the place and the value."""
    return run_steps(request_steps(columns, requests))


def request_steps(
    columns: RequestColumns, requests: Sequence[Request], first: int | None = None
) -> Steps[DecodedRequests]:
    """Decode requests in pieces; `first`: the number of the first one in the body."""
    if first is None and len(requests) > 1:
        first = 0
    counts = [columns.num_candidates(each, _where(first, place)) for place, each in enumerate(requests)]
    reader = _Reader(columns, requests, np.array(counts, np.int64), first)
    found = yield from reader.read()
    for column, rule in columns.rules.items():
        for other in rule.lengths_of:
            reader.check_equal(found, column, other, rule, "value")
    for one, *others in columns.aligned:
        for column in others:
            reader.check_equal(found, column, one, columns.rules[column], "behaviour")
    return reader.decoded(found)


def batch_of(columns: RequestColumns, taken: Callable[[Field, str], Jagged], counts_G: Index) -> Batch:
    """Build the trainer's batch for requests with these numbers of candidates; `taken` returns the rows of a column."""
    num_samples = int(counts_G.sum())
    return Batch(
        **inputs_of(columns.schema, taken),
        group_of_sample_B=np.repeat(np.arange(len(counts_G)), counts_G),
        label_B=np.zeros(num_samples, np.float32),
        group_id_B=np.zeros(num_samples, np.int64),
        global_samples=num_samples,
    )


class _Column(NamedTuple):
    """Flat values; the lengths of the lists around them within a row, outermost first; which values are null."""

    values: Values
    levels: tuple[Index, ...]
    is_null_N: Bool | None


class _Flat(NamedTuple):
    """Unconverted values, flattened, and the lengths of their lists, outermost first.

    `once`: a column of the ads that was read once per request, from its context."""

    values: Sequence[Any]
    levels: tuple[Index, ...]
    once: bool


class _Reader:
    """Reads the columns of some requests."""

    def __init__(
        self, columns: RequestColumns, requests: Sequence[Request], counts_G: Index, first: int | None
    ) -> None:
        self._columns, self._requests, self._counts_G, self._first = columns, requests, counts_G, first
        self._num_samples = int(counts_G.sum())
        self._in_contexts = set(requests[0].context).intersection(*(each.context for each in requests))
        """Columns that all requests have in their context."""
        self._ones = {
            "user": np.ones(len(requests), np.int32),
            "ad": np.ones(self._num_samples, np.int32),
        }

    def read(self) -> Steps[dict[str, _Column]]:
        """Read the columns of all fields; those of integers, which are most, together."""
        flat, found = dict[str, _Flat](), dict[str, _Column]()
        for column, rule in self._columns.rules.items():
            if rule.crossed:
                found[column] = yield from self._crossed(rule)
            else:
                flat[column] = self._flat(column, rule)
            yield
        integers = [column for column, each in flat.items() if self._may_be_integers(column, each.values)]
        values = all_integers([flat[column].values for column in integers])
        known = dict(zip(integers, values, strict=True)) if values else {}
        for column, each in flat.items():
            found[column] = yield from self._column(column, self._columns.rules[column], each, known.get(column))
            yield
        return found

    def _may_be_integers(self, column: str, values: Sequence[Any]) -> bool:
        is_image = column in self._columns.nullable
        return (
            bool(values)
            and type(values[0]) is int
            and not self._columns.rules[column].is_real
            and not (is_image and None in values)
        )

    def _crossed(self, rule: Rule) -> Steps[_Column]:
        parts = []
        for source in rule.crossed:
            flat = self._flat(source, self._columns.sources[source], once=False)
            encoded = yield from self._converted(source, flat, encode_crossed, CROSSED_CHUNK)
            parts.append((encoded, flat.levels))
        first = parts[0][1]
        for source, (_, levels) in zip(rule.crossed[1:], parts[1:], strict=True):
            self._check_levels(source, rule, levels, rule.crossed[0], first, "crossed value")
        ids = []
        for chunks in zip(*(encoded for encoded, _ in parts), strict=True):
            ids.append(cross(chunks).ids)
            yield
        return _Column(np.concatenate(ids), first, None)

    def _column(self, column: str, rule: Rule, flat: _Flat, values: Values | None) -> Steps[_Column]:
        """Convert and check a column; `values` are those of a column of integers."""
        is_null_N: Bool | None = None
        if rule.is_real:
            convert = partial(real_numbers, may_miss=rule.may_miss)
            values = _together((yield from self._converted(column, flat, convert)))
        elif values is None and column in self._columns.nullable:
            keys = yield from self._converted(column, flat, image_keys)
            values, is_null_N = _together([each for each, _ in keys]), _nulls(keys)
        elif values is None:
            whole = partial(whole_numbers, text=rule.text)
            values = _together((yield from self._converted(column, flat, whole)))
        if rule.width is not None and (flat.levels[-1] != rule.width).any():
            self._refuse_width(column, rule, flat.levels)
        if flat.once:
            values = np.repeat(values, self._counts_G)
            is_null_N = None if is_null_N is None else np.repeat(is_null_N, self._counts_G)
        return _Column(values, flat.levels, is_null_N)

    def check_equal(self, found: Mapping[str, _Column], column: str, other: str, rule: Rule, each: str) -> None:
        """Raise RequestError where two columns have lists of unequal lengths."""
        if found[column].levels:
            level = 0 if each == "behaviour" else -1
            one, two = (found[name].levels[level] for name in (column, other))
            self._check_levels(column, rule, (one,), other, (two,), each)

    def decoded(self, found: Mapping[str, _Column]) -> DecodedRequests:
        """Combine the columns to a batch of the trainer."""

        def taken(field: Field, column: str) -> Jagged:
            return jagged[column]

        jagged: dict[str, Jagged] = {}
        for name, column in found.items():
            rule, levels = self._columns.rules[name], column.levels
            if rule.gallery:
                jagged[sizes_of(name)] = Jagged(levels[-1], _int32(levels[0]) if len(levels) > 1 else self._ones["ad"])
            lengths = _int32(_images_of(levels) if len(levels) > 1 else levels[0]) if levels else self._ones[rule.side]
            jagged[name] = Jagged(column.values, lengths)
        try:
            batch = batch_of(self._columns, taken, self._counts_G)
        except OverflowingValueError as failure:
            path = self._path(failure.column, self._columns.rules[failure.column], (), failure.row)
            raise OverflowingInputError(f"{path} has {failure.why}") from None
        nulls = {name: column.is_null_N for name, column in found.items() if column.is_null_N is not None}
        return DecodedRequests(batch, self._counts_G, nulls)

    def _entries(self, column: str, rule: Rule) -> Sequence[Any]:
        """Return a value for each user or candidate."""
        if rule.side == "user":
            return [each.user[column] for each in self._requests]
        first = self._requests[0].candidates.get(column)
        if len(self._requests) == 1 and type(first) is list:
            return first
        entries: list[Any] = []
        for each, count in zip(self._requests, self._counts_G.tolist(), strict=True):
            if column in each.candidates:
                entries += each.candidates[column]
            elif count:
                entries += [each.context[column]] * count
        return entries

    def _flat(self, column: str, rule: Rule, once: bool = True) -> _Flat:
        """Flatten the lists of a column. `once`: read columns that all contexts have once per request."""
        once = once and rule.depth == 1 and column in self._in_contexts
        entries = [each.context[column] for each in self._requests] if once else self._entries(column, rule)
        levels: tuple[Index, ...] = ()
        for _ in range(rule.depth - (rule.side == "ad")):
            try:
                entries, lengths = flatten(entries, expected(rule))
            except UnusableValueError as failure:
                self._refuse(column, _Flat(entries, levels, once), failure)
            levels = (*levels, lengths)
        return _Flat(entries, levels, once)

    def _converted(
        self, column: str, flat: _Flat, convert: Callable[[Sequence[Any]], Result], chunk: int = CHUNK
    ) -> Steps[list[Result]]:
        """Convert the values of a column, a chunk at a time; one chunk at least."""
        values, found = flat.values, list[Result]()
        for start in range(0, len(values) or 1, chunk):
            try:
                found.append(convert(values if len(values) <= chunk else values[start : start + chunk]))
            except UnusableValueError as failure:
                self._refuse(column, flat, UnusableValueError(failure.place + start, failure.why))
            yield
        return found

    def _refuse(self, column: str, flat: _Flat, failure: UnusableValueError) -> NoReturn:
        path = self._path(column, self._columns.sources[column], flat.levels, failure.place, flat.once)
        raise RequestError(f"{path} is {failure.why}") from None

    def _check_levels(
        self, column: str, rule: Rule, one: Sequence[Index], other: str, two: Sequence[Index], each: str
    ) -> None:
        for level, (found, expected_M) in enumerate(zip(one, two, strict=True)):
            if not np.array_equal(found, expected_M):
                place = int((found != expected_M).argmax())
                path = self._path(column, rule, one[:level], place)
                raise RequestError(
                    f"{path} has {found[place]} entries, and {other} has {expected_M[place]} there; each {each} needs "
                    "one entry in both"
                )

    def _refuse_width(self, column: str, rule: Rule, levels: Sequence[Index]) -> NoReturn:
        place = int((levels[-1] != rule.width).argmax())
        path = self._path(column, rule, levels[:-1], place)
        raise RequestError(f"{path} has {levels[-1][place]} numbers; the schema says width={rule.width}")

    def _path(self, column: str, rule: Rule, levels: Sequence[Index], place: int, once: bool = False) -> str:
        """Return the path of a value, e.g. `requests[1]: candidates.ad_categories[7][2]`. `once`: see `_Flat`."""
        places: list[int] = []
        for lengths in reversed(levels):
            ends = np.cumsum(lengths)
            row = int(np.searchsorted(ends, place, side="right"))
            places.insert(0, place - int(ends[row] - lengths[row]))
            place = row
        request = place
        if rule.side == "ad" and not once:
            ends = np.cumsum(self._counts_G)
            request = int(np.searchsorted(ends, place, side="right"))
            place -= int(ends[request] - self._counts_G[request])
        part = "user" if rule.side == "user" else "candidates"
        if rule.side == "ad" and column in self._requests[request].context:
            part = "context"
        if part == "candidates":
            places.insert(0, place)
        name = self._requests[request].name_of(part, column)
        return _where(self._first, request) + name + "".join(f"[{each}]" for each in places)


def _images_of(levels: Sequence[Index]) -> Index:
    """Count the images of each row, of a gallery of behaviours."""
    ends_K = np.append(0, np.cumsum(levels[1]))
    lengths_M: Index = np.diff(ends_K[np.append(0, np.cumsum(levels[0]))])
    return lengths_M


def _int32(lengths: Index) -> NDArray[np.int32]:
    return lengths.astype(np.int32)


def _together(parts: Sequence[Values]) -> Values:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _nulls(parts: Sequence[tuple[Values, Bool | None]]) -> Bool | None:
    """Join which values are null; None where none is."""
    if all(is_null_N is None for _, is_null_N in parts):
        return None
    return np.concatenate([np.zeros(len(keys), np.bool_) if nulls is None else nulls for keys, nulls in parts])


def _where(first: int | None, place: int) -> str:
    return "" if first is None else f"requests[{first + place}]: "
