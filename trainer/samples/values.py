"""Values of columns: texts that become IDs, and numbers transformed.

Letters of shapes: N values, U distinct ones.

Plain functions of the values and of what the schema says of them, so training, evaluation and exports agree. Letters of
shapes as in trainer/samples/reader.py; W numbers a row.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featurestore.keys import ids_of_texts, keys_of_uris
from trainer.errors import OverflowingValueError, SchemaError
from trainer.schema import Field
from trainer.schema.fields import LOGARITHMIC, STANDARDIZED

TextKind = Literal["id", "uri"]
"""id: a whole number as it is written is itself, other text its hash, as in build_samples. uri: always the hash, which
is an image's key."""
Int64 = NDArray[np.int64]


class UndecodableTextError(ValueError):
    """Value number `place` of a column is no UTF-8."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


@dataclass(frozen=True)
class Encoded:
    """Value n has the ID `ids_U[index_N[n]]` and was written `texts_U[index_N[n]]`."""

    ids_U: Int64
    texts_U: Sequence[str]
    index_N: Int64

    @property
    def ids(self) -> Int64:
        """The ID of each value, (N,)."""
        ids_N: Int64 = self.ids_U[self.index_N]
        return ids_N


def is_text(kind: pa.DataType | None) -> bool:
    """Tell whether an Arrow type has strings, of any size of their offsets."""
    return kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind))


def encode_texts(array: Any, kind: TextKind) -> Encoded:
    """Hash a string array without nulls to IDs. Raises UndecodableTextError."""
    encoded = array.dictionary_encode()
    index_N = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    try:
        texts_U = encoded.dictionary.to_pylist()
    except UnicodeDecodeError as failure:
        raise UndecodableTextError(_first_wrong(encoded.dictionary, index_N)) from failure
    if kind == "uri":
        return Encoded(keys_of_uris(texts_U), texts_U, index_N)
    texts_U = [text.strip() for text in texts_U]
    return Encoded(ids_of_texts(texts_U), texts_U, index_N)


def encode_numbers(values_N: Int64) -> Encoded:
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


def _as_json(part: Encoded, place_U: Int64) -> list[int | str]:
    """The part's values at these places; a whole number is one, also where it was a text."""
    chosen_U = part.index_N[place_U]
    ids = part.ids_U[chosen_U].tolist()
    texts = [part.texts_U[place] for place in chosen_U]
    return [number if str(number) == text else text for number, text in zip(ids, texts, strict=True)]


def _first_wrong(dictionary: Any, index_N: Int64) -> int:
    """The first value whose text is no UTF-8."""
    kind = pa.large_binary() if pa.types.is_large_string(dictionary.type) else pa.binary()
    wrong = [place for place, name in enumerate(dictionary.cast(kind).to_pylist()) if not _is_utf8(name)]
    return int(np.flatnonzero(np.isin(index_N, wrong))[0])


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


Float64 = NDArray[np.float64]


def dense_values(field: Field, values_N: NDArray[Any]) -> NDArray[np.float32]:
    """Compute the values of a dense field, a whole number of rows, as float32 (M, W), by way of float64.

    Raises OverflowingValueError for a value that the transform makes infinite.
    """
    width = field.width or 1
    if field.transform is None and field.fill is None:
        return values_N.astype(np.float32, copy=False).reshape(-1, width)
    _check_known(field)
    values_MW = before_scaling(field, values_N.reshape(-1, width))
    if field.fill == "mean":
        values_MW = np.where(np.isnan(values_MW), np.array(field.mean), values_MW)
    if field.transform in STANDARDIZED:
        values_MW = (values_MW - np.array(field.mean)) / np.array(field.std)
    with np.errstate(over="ignore"):
        found_MW = values_MW.astype(np.float32)
    if not np.isfinite(found_MW).all():
        place = int((~np.isfinite(found_MW)).argmax())
        raise OverflowingValueError(field.column_name, place // width, float(values_N[place]))
    return found_MW


def before_scaling(field: Field, values: NDArray[Any]) -> Float64:
    """Compute the values whose mean and deviation are taken: filled by a number, and their logarithm if asked for.

    sign(x) log(1 + |x|) has a value for negative numbers too, and is log(1 + x) for the others.
    """
    numbers = filled(field, values)
    if field.transform in LOGARITHMIC:
        numbers = np.copysign(np.log1p(np.abs(numbers)), numbers)
    return numbers


def filled(field: Field, values: NDArray[Any]) -> Float64:
    """Return the values in float64, missing ones replaced where `fill` is a number."""
    numbers = values.astype(np.float64)
    return np.where(np.isnan(numbers), field.fill, numbers) if isinstance(field.fill, float) else numbers


def bucket_ids(field: Field, values_N: NDArray[Any]) -> NDArray[np.int64]:
    """Find the bucket of each number (N,): how many buckets begin at it or before it. A missing number's is the last.

    Compared in float32, as columns are read: 0.7 lies in the bucket that begins at 0.7, whatever either is rounded to.
    """
    _check_known(field)
    starts = field.bucket_starts
    assert starts is not None
    numbers_N = filled(field, values_N)
    ids_N = np.searchsorted(np.array(starts, np.float32), numbers_N.astype(np.float32), side="right").astype(np.int64)
    ids_N[np.isnan(numbers_N)] = len(starts) + 1
    return ids_N


def _check_known(field: Field) -> None:
    if field.lacks_statistics:
        raise SchemaError(
            f"field {field.name}: its mean, std or boundaries are not known; they are found in the training samples "
            "before a run, and go with its checkpoint"
        )
