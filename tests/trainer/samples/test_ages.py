"""Ages of behaviours: lists beside the behaviours' items, found by inspect, and part of each behaviour in DIN."""

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
from trainer.errors import DataError, SchemaError
from trainer.exchange.vectors import FieldVectors
from trainer.models.nets import build_model
from trainer.samples.index import open_index
from trainer.samples.reader import SampleReader
from trainer.schema import Field, Schema, load_schema
from trainer.schema.__main__ import app

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


def test_lists_of_other_lengths_are_told(samples: Path) -> None:
    path = samples / "train/a.parquet"
    table = pq.read_table(path, partitioning=None)
    ages = table["behavior_age"].to_pylist()
    ages[12] = [*ages[12], 5]
    table = table.set_column(table.column_names.index("behavior_age"), "behavior_age", pa.array(ages))
    pq.write_table(table, path, row_group_size=7)
    reader = SampleReader(open_index(SoloComm(), str(samples), "train", SCHEMA), SCHEMA, batch_size=32)
    with pytest.raises(DataError, match=r"a\.parquet, row 12: column behavior_age has \d entries, behavior_item has"):
        list(reader.batches())


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("kind: multi_id, side: user, beside: ad", "beside=ad is for fields of side user and kind multi_id"),
        ("kind: multi_id, side: user, beside: gone", "there are items"),
        ("kind: id, side: user, beside: items", "beside=items is for fields of side user"),
        ("kind: multi_id, side: ad, beside: items", "beside=items is for fields of side user"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, settings: str, message: str) -> None:
    (tmp_path / "schema.yaml").write_text(
        "new_ad_field: ad\nfields:\n  - {name: ad, side: ad, kind: id}\n  - {name: items, side: user, kind: multi_id}\n"
        f"  - {{name: age, {settings}}}\n"
    )
    with pytest.raises(SchemaError) as caught:
        load_schema(tmp_path / "schema.yaml")
    assert message in str(caught.value)
