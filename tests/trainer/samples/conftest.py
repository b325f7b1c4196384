"""Samples whose columns have numbers: prices of a heavy tail, incomes with nulls, a constant, ages of behaviours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.schema import Field, Schema, load_schema
from trainer.schema.fields import schema_text

NUMBERS = (
    Field(name="income", side="user", kind="dense", transform="log_standardize", fill="mean"),
    Field(name="place", side="user", kind="dense", width=2, transform="standardize"),
    Field(name="same", side="user", kind="dense", transform="standardize"),
    Field(name="ad_price", side="ad", kind="dense", transform="log_standardize"),
    Field(name="ad_price_bucket", side="ad", kind="id", column="ad_price", buckets=8),
    Field(name="ad_rating", side="ad", kind="id", buckets=5, fill="bucket"),
)
SCHEMA = Schema(fields=(*load_schema().fields, *NUMBERS))


def price_of(item: int) -> float:
    """Of an ad: from 1 to some thousands."""
    return float(np.float32(1.3 ** (item * 7 % 31)))


def with_numbers(table: pa.Table) -> pa.Table:
    """The table with columns of numbers; those of an ad hang on the ad alone."""
    users, ads = table["user"].to_pylist(), table["ad_item"].to_pylist()
    ratings = [[None if ad % 4 == 0 else float(ad % 7) for ad in row] for row in ads]
    columns: dict[str, Any] = {
        "income": pa.array([None if user % 5 == 0 else 900.0 * 1.2**user for user in users], pa.float64()),
        "place": pa.array([[user * 10.0, -0.5 * (user % 3)] for user in users], pa.list_(pa.float32(), 2)),
        "same": pa.array([0.1] * len(users), pa.float64()),
        "ad_price": pa.array([[price_of(ad) for ad in row] for row in ads], pa.list_(pa.float32())),
        "ad_rating": pa.array(ratings, pa.list_(pa.float64())),
    }
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


@pytest.fixture(scope="session")
def numbered(make_places: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Places whose samples have these columns; schema.yaml is theirs."""
    places = make_places(tmp_path_factory.mktemp("numbered"))
    for path in places.folder.glob("samples/*/*.parquet"):
        pq.write_table(with_numbers(pq.read_table(path, partitioning=None)), path, row_group_size=7)
    (places.folder / "schema.yaml").write_text(schema_text(SCHEMA))
    return places
