"""Numbers of a sample: transforms, missing ones, buckets, ages of behaviours, and settings that do not fit."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from trainer.comm import SoloComm
from trainer.config.options import ModelConfig
from trainer.engine.wiring import table_shapes
from trainer.errors import ConfigError, OverflowingValueError, SchemaError
from trainer.exchange.vectors import FieldVectors
from trainer.models.nets import build_model
from trainer.samples.columns import bucket_ids, dense_values
from trainer.samples.index import open_index
from trainer.samples.reader import SampleReader
from trainer.schema import Field, Schema, load_schema
from trainer.schema.__main__ import app

NAN = float("nan")


def dense(**settings: Any) -> Field:
    return Field(name="price", side="ad", kind="dense", **settings)


def log1p(x: float) -> float:
    return math.copysign(math.log1p(abs(x)), x)


@pytest.mark.parametrize(
    ("field", "formula"),
    [
        (dense(), lambda x: x),
        (dense(transform="none"), lambda x: x),
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


def test_each_number_of_a_row_has_its_own_scale() -> None:
    field = dense(width=2, transform="standardize", mean=[1.0, -1.0], std=[2.0, 4.0], fill="mean")
    found = dense_values(field, np.array([3.0, NAN, 1.0, 7.0], np.float32))
    np.testing.assert_array_equal(found, [[1.0, 0.0], [0.0, 2.0]])


def test_a_number_that_its_transform_makes_infinite_is_named() -> None:
    field = dense(width=2, transform="standardize", mean=[0.0, 0.0], std=[1.0, 0.18])
    with pytest.raises(OverflowingValueError) as error:
        dense_values(field, np.array([3.4e38, 1.0, 1.0, -3.4e38], np.float32))
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


class TestBuckets:
    def test_a_number_on_a_boundary_belongs_to_the_bucket_that_begins_there(self) -> None:
        field = Field(name="b", side="ad", kind="id", boundaries=[0, 10, 100], fill="bucket")
        ids = bucket_ids(field, np.array([-5.0, 0.0, 9.99, 10.0, 99.0, 100.0, 1e9, NAN], np.float32))
        assert ids.tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
        assert field.num_buckets == 5
        filled = field.model_copy(update={"fill": 50.0})
        assert bucket_ids(filled, np.array([NAN])).tolist() == [2]

    def test_a_boundary_is_rounded_as_the_column_is(self) -> None:
        field = Field(name="b", side="ad", kind="id", boundaries=[0.1, 0.7, 1.3])
        assert bucket_ids(field, np.array([0.1, 0.7, 1.3], np.float32)).tolist() == [1, 2, 3]

    def test_log2(self) -> None:
        field = Field(name="age", side="user", kind="multi_id", buckets="log2")
        ages = np.array([-1, 0, 0.5, 1, 1.9, 2, 3, 4, 1023, 1024, 86_400, 2.0**30, 2.0**40])
        assert bucket_ids(field, ages).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 10, 11, 17, 31, 31]
        assert field.num_buckets == 33

    def test_every_bucket_has_a_row_of_its_own(self) -> None:
        fields = (
            Field(name="age", side="user", kind="multi_id", buckets="log2", table="age"),
            Field(name="ad_age", side="ad", kind="id", buckets=40, boundaries=[1, 2], table="age"),
        )
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


def test_without_statistics_nothing_is_read() -> None:
    with pytest.raises(SchemaError, match="field price: its mean, std or boundaries are not known"):
        dense_values(dense(transform="standardize"), np.zeros(1))
    with pytest.raises(SchemaError, match="field b: its mean"):
        bucket_ids(Field(name="b", side="ad", kind="id", buckets=4), np.zeros(1))


AGE = Field(name="behavior_age", side="user", kind="multi_id", buckets="log2", beside="behavior_item")
SCHEMA = Schema(fields=(*load_schema().fields, AGE))


@pytest.fixture(name="samples")
def _samples(places: Any, tmp_path: Path) -> Path:
    """Samples with the ages: of behaviour k of a group 60 x 4^k seconds."""
    (tmp_path / "train").mkdir()
    table = pq.read_table(places.folder / "samples/train/day=2026-01-01.parquet", partitioning=None)
    ages = [[60 * 4**place for place in range(len(row))] for row in table["behavior_item"].to_pylist()]
    table = table.append_column("behavior_age", pa.array(ages, pa.list_(pa.int64())))
    pq.write_table(table, tmp_path / "train/a.parquet", row_group_size=7)
    return tmp_path


def test_each_behaviour_has_its_bucket(samples: Path) -> None:
    index = open_index(SoloComm(), str(samples), "train", SCHEMA)
    for batch in SampleReader(index, SCHEMA, batch_size=32, seed=1).batches():
        ages, items = batch.fields["behavior_age"], batch.fields["behavior_item"]
        np.testing.assert_array_equal(ages.lengths_M, items.lengths_M)
        place = np.concatenate([np.arange(length) for length in ages.lengths_M]) if len(ages.lengths_M) else []
        np.testing.assert_array_equal(ages.values_N, 6 + 2 * np.array(place, np.int64))  # 32 <= 60 < 64


def test_inspect_finds_them(samples: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(samples)])
    (tmp_path / "schema.yaml").write_text(result.output)
    found = {field.name: field for field in load_schema(tmp_path / "schema.yaml").fields}
    assert found["behavior_age"] == AGE
    assert "#   behavior_age:" not in result.output  # no rows to choose


def test_din_weighs_a_behaviour_by_its_age_too() -> None:
    fields = (
        Field(name="item", side="user", kind="multi_id", table="t"),
        Field(name="age", side="user", kind="multi_id", buckets="log2", beside="item", width=2),
        Field(name="ad", side="ad", kind="id", table="t"),
    )
    config = ModelConfig(base="din", images="none", id_width=3, mlp=[4], tables={"t": 8})
    torch.manual_seed(0)
    model = build_model(Schema(fields=fields, new_ad_field="ad"), config).double()
    items, ages, ad = (torch.randn(n, width, dtype=torch.float64) for n, width in ((2, 3), (2, 2), (1, 3)))
    places, one = torch.arange(2), torch.ones(1).long()

    def logit(order: list[int]) -> torch.Tensor:
        given = {
            "item": FieldVectors(items, places, 2 * one), "age": FieldVectors(ages[order], places, 2 * one),
            "ad": FieldVectors(ad, places[:1], one),
        }  # fmt: skip
        result: torch.Tensor = model(given, {}, torch.zeros(1).long())
        return result

    together, swapped = logit([0, 1]), logit([1, 0])  # the same ages, of the other behaviour each
    assert abs(float(together.detach() - swapped.detach())) > 1e-6
