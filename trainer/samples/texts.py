"""Texts, and values of several columns crossed into one, as int64 IDs; each distinct value is hashed once.

Letters of shapes: N values, U distinct ones.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featurestore.keys import ids_of_texts, keys_of_uris

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
