"""Numbers of a sample: transforms, missing ones, buckets, ages of behaviours, and settings that do not fit."""

import math
from typing import Any

import numpy as np
import pytest

from trainer.config import ModelConfig
from trainer.engine.wiring import table_shapes
from trainer.errors import ConfigError, OverflowingValueError
from trainer.samples.columns import bucket_ids, dense_values
from trainer.schema.fields import Field

NAN = float("nan")


def dense(**settings: Any) -> Field:
    return Field(name="price", side="ad", kind="dense", **settings)


def log1p(x: float) -> float:
    return math.copysign(math.log1p(abs(x)), x)


@pytest.mark.parametrize(
    ("field", "formula"),
    [
        (dense(), lambda x: x),
        (dense(transform="standardize", mean=[3.5], std=[0.7]), lambda x: (x - 3.5) / 0.7),
        (dense(transform="log1p"), log1p),
        (dense(transform="log_standardize", mean=[1.25], std=[2.0]), lambda x: (log1p(x) - 1.25) / 2),
    ],
)
def test_formulas(field: Field, formula: Any) -> None:
    values = np.array([-7.5, -1.0, 0.0, 0.3, 2.0, 1e6], np.float32)
    found = dense_values(field, values)
    assert found.dtype == np.float32
    assert found.shape == (6, 1)
    np.testing.assert_allclose(found[:, 0], [formula(float(x)) for x in values], rtol=1e-6)


def test_each_number_of_a_row_has_its_own_scale_and_one_that_becomes_infinite_is_named() -> None:
    field = dense(width=2, transform="standardize", mean=[1.0, -1.0], std=[2.0, 4.0], fill="mean")
    found = dense_values(field, np.array([3.0, NAN, 1.0, 7.0], np.float32))
    np.testing.assert_array_equal(found, [[1.0, 0.0], [0.0, 2.0]])
    with pytest.raises(OverflowingValueError) as error:
        dense_values(field.model_copy(update={"std": (1.0, 0.18)}), np.array([3.4e38, 1, 1, -3.4e38], np.float32))
    assert (error.value.column, error.value.row, error.value.value) == ("price", 1, pytest.approx(-3.4e38))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (dense(fill=2), 2.0),
        (dense(fill="mean", mean=[5.0]), 5.0),
        (dense(fill=-3.0, transform="log1p"), -math.log1p(3)),
        (dense(fill="mean", transform="standardize", mean=[5.0], std=[2.0]), 0.0),
        (dense(fill=7.0, transform="standardize", mean=[5.0], std=[2.0]), 1.0),
    ],
)
def test_what_stands_in_for_a_missing_number(field: Field, value: float) -> None:
    assert dense_values(field, np.array([NAN], np.float32))[0, 0] == pytest.approx(value)


BOUNDED = Field(name="b", side="ad", kind="id", boundaries=[0, 10, 100], fill="bucket")
NUMBERS = [-5.0, 0.0, 9.99, 10.0, 99.0, 100.0, 1e9, NAN]
AGE = Field(name="age", side="user", kind="multi_id", buckets="log2", table="age")
AGES = [-1, 0, 0.5, 1, 1.9, 2, 3, 4, 1023, 1024, 86_400, 2.0**30, 2.0**40]


@pytest.mark.parametrize(
    ("field", "numbers", "buckets", "ids"),
    [
        (BOUNDED, NUMBERS, 5, [0, 1, 1, 2, 2, 3, 3, 4]),
        (BOUNDED.model_copy(update={"fill": 50.0}), [NAN], 5, [2]),
        (Field(name="b", side="ad", kind="id", boundaries=[0.1, 0.7, 1.3]), [0.1, 0.7, 1.3], 5, [1, 2, 3]),
        (AGE, AGES, 33, [0, 0, 0, 1, 1, 2, 2, 3, 10, 11, 17, 31, 31]),
    ],
    ids=["on a boundary", "filled", "rounded as the column is", "log2"],
)
def test_numbers_have_their_buckets(field: Field, numbers: list[float], buckets: int, ids: list[int]) -> None:
    assert bucket_ids(field, np.array(numbers, np.float32)).tolist() == ids
    assert field.num_buckets == buckets


def test_every_bucket_has_a_row_of_its_own() -> None:
    fields = (AGE, Field(name="ad_age", side="ad", kind="id", buckets=40, boundaries=[1, 2], table="age"))
    (shape,) = table_shapes(fields, ModelConfig(table_shards=8, id_width=3))
    shard, row = shape.place_of(np.arange(41))
    assert len(set(zip(shard.tolist(), row.tolist(), strict=True))) == 41
    assert (shape.num_rows, row.max() < shape.rows_per_shard) == (41, True)
    assert len(set(shape.shards_of(np.arange(41)).tolist())) == 8
    with pytest.raises(ConfigError, match=r"model\.tables\.age: the table has a row for each bucket of age"):
        table_shapes(fields, ModelConfig(tables={"age": 64}))
    item = Field(name="item", side="ad", kind="id", table="age")
    for together in ((item, *fields), (*fields, item)):
        with pytest.raises(ConfigError, match="field item shares table age with buckets"):
            table_shapes(together, ModelConfig(tables={"age": 64}))
