"""Samples with columns of every kind, whose values are functions of their IDs, and their schema."""

from typing import Any

import pyarrow as pa

from trainer.schema import Field, Schema, load_schema

WEIGHTS = {"behavior_item": "behavior_item_weight", "ad_category": "ad_category_weight"}
MORE = (
    Field(name="behavior_age", side="user", kind="multi_id", buckets="log2", beside="behavior_item"),
    Field(name="behavior_photos", side="user", kind="content", gallery="mean"),
    Field(name="height", side="user", kind="dense"),
    Field(name="ad_photos", side="ad", kind="content", gallery="mean"),
    Field(name="ad_words", side="ad", kind="multi_id", weights="ad_words_weight"),
    Field(name="ad_price", side="ad", kind="dense", transform="log1p"),
    Field(name="ad_pair", side="ad", kind="id", columns=("ad_item", "ad_scene"), context=True),
    Field(name="ad_tags", side="ad", kind="multi_id", columns=("ad_first", "ad_second")),
)
SCHEMA = Schema(fields=(*(f.model_copy(update={"weights": WEIGHTS.get(f.name)}) for f in load_schema().fields), *MORE))
"""The packaged one with weights, galleries, ages, numbers and crossed columns."""


def gallery_of(image: int) -> list[int]:
    """None to three images of those with a feature."""
    return [1_000 + (image * step) % 50 for step in range(1, 4)][: image % 4]


def words_of(item: int) -> list[int]:
    """None to two words of an ad."""
    return [item * 3 + n for n in range(item % 3)]


def ad_columns(items: list[int]) -> dict[str, list[Any]]:
    """All of ads beside the packaged schema's columns, by their items."""
    words = [words_of(item) for item in items]
    return {
        "ad_photos": [gallery_of(item + 1_000) for item in items],
        "ad_words": words,
        "ad_words_weight": [[1.0 + word % 2 for word in each] for each in words],
        "ad_price": [1.3 ** (item * 7 % 31) for item in items],
        "ad_category_weight": [1 + item % 2 / 2 for item in items],
        "ad_first": [[1, item % 7] for item in items],
        "ad_second": [[2, 3] for _ in items],
    }


def with_every_kind(table: pa.Table) -> pa.Table:
    """The table with a column of every kind."""
    behaviors, ads = (table[name].to_pylist() for name in ("behavior_item", "ad_item"))
    by_row = [ad_columns(row) for row in ads]
    columns: dict[str, list[Any]] = {
        "behavior_age": [[60 * 4**place for place in range(len(row))] for row in behaviors],
        "behavior_photos": [[gallery_of(item + 1_000) for item in row] for row in behaviors],
        "behavior_item_weight": [[item % 4 - 1.0 for item in row] for row in behaviors],
        "height": [150.5 + user for user in table["user"].to_pylist()],
        **{name: [row[name] for row in by_row] for name in by_row[0]},
    }
    for name, values in columns.items():
        depth = 0 if name == "height" else 1 + (name in ("behavior_photos", "ad_photos", "ad_first", "ad_second"))
        depth += name.startswith("ad_words")
        kind = pa.float64() if name == "height" or name.endswith(("weight", "price")) else pa.int64()
        for _ in range(depth):
            kind = pa.list_(kind)
        table = table.append_column(name, pa.array(values, kind))
    return table
