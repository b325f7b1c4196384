"""Numbers of a column as the model takes them: filled where missing, scaled, or cut into buckets that are IDs.

Plain functions of the values and of what the schema says of them, so training, evaluation and exports agree. Letters of
shapes as in trainer/samples/batch.py; W numbers a row.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import OverflowingValueError, SchemaError
from trainer.schema import Field
from trainer.schema.numbers import LOGARITHMIC, STANDARDIZED

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
