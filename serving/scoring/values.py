"""Converts Python values of a column to flat arrays, by the rules for sample files (trainer/samples/columns.py).

Converts a whole column at once: 200 numbers take about 20 us. Errors name the position of the unusable value.
"""

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.keys import NO_IMAGE, ids_of_texts, keys_of_uris
from trainer.samples.columns import Encoded, Index, TextKind, encode_numbers

_SHOWN = 60  # characters


class UnusableValueError(ValueError):
    """Value number `place` of a column cannot be used: `why` says what it is and what it has to be."""

    def __init__(self, place: int, why: str) -> None:
        super().__init__(place, why)
        self.place, self.why = place, why


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


def as_list(value: Any) -> Sequence[Any] | None:
    """Return a list or tuple as it is, a numpy array as a list, and None for anything else."""
    if isinstance(value, list | tuple):
        return value
    return value.tolist() if isinstance(value, np.ndarray) and value.ndim else None


def flatten(entries: Sequence[Any], wanted: str) -> tuple[Sequence[Any], Index]:
    """Join lists, and return the length of each. Raises UnusableValueError for an entry that is not a list."""
    if not set(map(type, entries)) <= {list}:
        lists = [as_list(entry) for entry in entries]
        if None in lists:
            place = lists.index(None)
            raise UnusableValueError(place, f"{short_repr(entries[place])}, and has to be {wanted}")
        entries = lists
    lengths_M = np.fromiter(map(len, entries), np.int64, len(entries))
    return entries[0] if len(entries) == 1 else list(chain.from_iterable(entries)), lengths_M


def whole_numbers(values: Sequence[Any], text: TextKind | None) -> NDArray[np.int64]:
    """Return integers, (N,); texts become IDs as `text` says. Raises UnusableValueError."""
    kinds = set(map(type, values))
    if kinds <= {int}:
        return _int64(values)
    if kinds == {str} and text is not None:
        return _of_texts(values, text)
    if all(_is_whole(kind) or (text is not None and kind is str) for kind in kinds):
        return _int64([_id_of(value, place, text) for place, value in enumerate(values)])
    wanted = "a whole number" + (" or a text" if text else "")
    raise _first(values, lambda value: _is_whole(type(value)) or (text is not None and type(value) is str), wanted)


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


def images(values: Sequence[Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """Return keys of images, (N,), and a mask of nulls, whose key is NO_IMAGE, or None. Raises UnusableValueError."""
    if None not in values:
        return whole_numbers(values, "uri"), None
    is_null_N = np.fromiter((value is None for value in values), np.bool_, len(values))
    return whole_numbers([NO_IMAGE if value is None else value for value in values], "uri"), is_null_N


def real_numbers(values: Sequence[Any], may_miss: bool) -> NDArray[np.float32]:
    """Return real numbers as float32, (N,); a missing one (null, NaN) is NaN. Raises UnusableValueError."""
    kinds = set(map(type, values))
    if not kinds <= {float} and not all(_is_real(kind) or (may_miss and kind is type(None)) for kind in kinds):
        wanted = "a number" + (" or null" if may_miss else "; give its field fill to replace missing ones")
        raise _first(values, lambda value: _is_real(type(value)) or (may_miss and value is None), wanted)
    with np.errstate(over="ignore"):
        numbers_N = _floats(values, kinds)
    wrong_N = np.isinf(numbers_N) if may_miss else ~np.isfinite(numbers_N)
    if wrong_N.any():
        place = int(wrong_N.argmax())
        way_out = "; fill in the schema replaces missing ones" if np.isnan(numbers_N[place]) else ""
        raise UnusableValueError(place, f"{values[place]}, and has to be a finite float32 number{way_out}")
    return numbers_N


def encoded(values: Sequence[Any]) -> Encoded:
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


def _is_whole(kind: type) -> bool:
    return issubclass(kind, int | np.integer) and kind is not bool


def _is_real(kind: type) -> bool:
    return issubclass(kind, int | float | np.integer | np.floating) and kind is not bool


def _first(values: Sequence[Any], is_right: Callable[[Any], bool], wanted: str) -> UnusableValueError:
    place = next(place for place, value in enumerate(values) if not is_right(value))
    value = values[place]
    is_large = type(value) is float and abs(value) >= 1 << 63  # the JSON parser returns larger whole numbers as floats
    way_out = "; send a number beyond 64 bits as a text if it is a name" if is_large and "text" in wanted else ""
    return UnusableValueError(place, f"{short_repr(value)}, and has to be {wanted}{way_out}")
