"""Columns of text (all that CSV has) as the numbers that logs need; what cannot be read is a fault of its row."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from featurestore.keys import id_of_text
from pipeline.samples.mapping import TimeUnit

_WHOLE = re.compile(r"0|-?[1-9]\d{0,18}")
_LABELS = {"0": 0.0, "1": 1.0, "true": 1.0, "false": 0.0}
_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1}

Parsed = tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]  # values, and which could not be read; nulls are 0 and fine


def parse_ids(column: Any) -> Parsed:
    """int64: a whole number as it is written is itself, other text its hash; so 7 is the same user in every file."""
    return _each(column, id_of_text, np.int64)


def parse_times(column: Any, unit: TimeUnit) -> Parsed:
    """Microseconds since 1970, int64, of ISO 8601 (UTC where it has no zone) or of a number of `unit`."""

    def parse(text: str) -> int:
        if _WHOLE.fullmatch(text):
            return int(text) * _PER_UNIT[unit]
        moment = datetime.fromisoformat(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return round(moment.timestamp() * 1_000_000)

    return _each(column, parse, np.int64)


def parse_numbers(column: Any) -> Parsed:
    """float64."""
    return _each(column, float, np.float64)


def parse_labels(column: Any) -> Parsed:
    """float64: 0 or 1 of true and false too, else the number that is written."""
    return _each(column, lambda text: _LABELS[text.lower()] if text.lower() in _LABELS else float(text), np.float64)


def _each(column: Any, parse: Callable[[str], float], dtype: npt.DTypeLike) -> Parsed:
    """`parse` of each different text; a ValueError or a number beyond the dtype means that it cannot be read."""
    encoded = column.combine_chunks().dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    value_U, wrong_U = np.zeros(len(texts) + 1, dtype), np.zeros(len(texts) + 1, np.bool_)
    for place, text in enumerate(texts):
        try:
            value_U[place] = parse(text.strip())
        except (ValueError, OverflowError):
            wrong_U[place] = True
    place_N = encoded.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False)
    return value_U[place_N], wrong_U[place_N]
