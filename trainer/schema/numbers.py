"""What a field can say of the numbers in its column: how they are scaled, cut into buckets, filled where missing."""

import math
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic
from pydantic import BeforeValidator

if TYPE_CHECKING:
    from trainer.schema.fields import Field

Transform = Literal["standardize", "log1p", "log_standardize"]
STANDARDIZED: frozenset[Transform | None] = frozenset({"standardize", "log_standardize"})
LOGARITHMIC: frozenset[Transform | None] = frozenset({"log1p", "log_standardize"})
LOG2 = "log2"
LOG2_BOUNDARIES = tuple(float(1 << power) for power in range(31))
"""1, 2, 4, .. 2**30: in seconds the last one is 34 years."""


def _no_text(value: object) -> object:
    return None if value == "none" else value


def _ascending(values: object) -> object:
    if isinstance(values, list | tuple):
        numbers = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
        if len(numbers) < len(values) or sorted(set(numbers)) != numbers:
            raise ValueError("it should be finite numbers, each larger than the one before")
    return values


OptionalTransform = Annotated[Transform | None, BeforeValidator(_no_text)]
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Numbers = tuple[Finite, ...]
Positive = tuple[Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)], ...]
Boundaries = Annotated[tuple[float, ...], BeforeValidator(_ascending)]
Buckets = Annotated[int, pydantic.Field(ge=2, le=65_536)] | Literal["log2"]
Fill = Literal["mean", "bucket"] | Finite


def check_numbers(field: "Field") -> None:
    """Raise ValueError where the settings of a field's numbers do not fit its kind or each other."""
    name, width = f"field {field.name}", field.width or 1
    is_dense = field.kind == "dense"
    if field.transform is not None and not is_dense:
        raise ValueError(
            f"{name}: transform={field.transform} is for kind dense, not {field.kind}; buckets makes IDs of numbers"
        )
    if field.is_bucketed and not field.is_id:
        raise ValueError(f"{name}: buckets are for kinds id and multi_id, not {field.kind}; its IDs are the buckets")
    if field.is_bucketed and (field.weights is not None or field.columns is not None):
        other = f"columns={list(field.columns)}" if field.columns is not None else f"weights={field.weights}"
        raise ValueError(f"{name}: it has buckets and {other}; give one of them")
    for setting, values in (("mean", field.mean), ("std", field.std)):
        if values is not None and (not is_dense or len(values) != width):
            raise ValueError(f"{name}: {setting} is for kind dense, one number for each of the {width} of a row")
    is_scaled = field.transform in STANDARDIZED
    for setting, unused in (
        ("mean", field.mean is not None and not is_scaled and field.fill != "mean"),
        ("std", field.std is not None and not is_scaled),
    ):
        if unused:
            raise ValueError(f"{name}: {setting} does nothing without transform=standardize or log_standardize; set it")
    if field.fill == "mean" and not is_dense:
        raise ValueError(f"{name}: fill=mean is for kind dense; buckets have fill=bucket, or a number")
    if field.fill == "bucket" and not field.is_bucketed:
        raise ValueError(f"{name}: fill=bucket is for fields with buckets; give a number, or mean for kind dense")
    if field.fill is not None and not (is_dense or field.is_bucketed):
        raise ValueError(f"{name}: fill={field.fill} is for kind dense and for fields with buckets")
