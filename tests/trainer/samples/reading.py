"""Readers of written samples, and all values of their batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.comm import SoloComm
from trainer.samples.index import open_index
from trainer.samples.reader import Batch, SampleReader
from trainer.schema import Field, Schema, load_schema

SCHEMA = Schema(
    fields=(
        *load_schema().fields,
        Field(name="serial", side="ad", kind="id", column="ad_serial"),
        Field(name="session", side="user", kind="id"),
    )
)


def reader_of(
    folder: Path, rank: int = 0, num_ranks: int = 1, kind: type[SampleReader] = SampleReader, **options: Any
) -> SampleReader:
    schema = options.pop("schema", SCHEMA)
    index = open_index(SoloComm(), str(folder), "train", schema)
    arguments = {"batch_size": 16, "seed": 3, "window": 50} | options
    return kind(index, schema, rank=rank, num_ranks=num_ranks, **arguments)


def serials_of(batch: Batch) -> list[int]:
    return batch.fields["serial"].values_N.tolist()


def rows_of(batch: Batch) -> list[tuple[Any, ...]]:
    """Every sample of a batch as one tuple of all its values, its group's among them."""
    user_fields = ["user", "session", "behavior_item", "behavior_category", "behavior_image_id", "behavior_image"]
    split = {
        name: np.split(batch.fields[name].values_N, np.cumsum(batch.fields[name].lengths_M)[:-1])
        for name in user_fields
    }
    per_group = [
        tuple(tuple(split[name][group].tolist()) for name in user_fields)
        for group in range(len(batch.fields["user"].lengths_M))
    ]
    ads = [batch.fields[name].values_N for name in ("serial", "ad_item", "ad_image", "ad_image_id", "ad_scene")]
    return [
        (*(int(field[b]) for field in ads), int(batch.label_B[b]), int(batch.group_id_B[b]), per_group[g])
        for b, g in enumerate(batch.group_of_sample_B)
    ]


def expected_rows(tables: list[pa.Table]) -> dict[int, tuple[Any, ...]]:
    found = {}
    for row in pa.concat_tables(tables).to_pylist():
        behaviors = [tuple(row[f"behavior_{name}"]) for name in ("item", "category", "image", "image")]
        user = ((row["user"],), (row["session"],), *behaviors)
        ads = zip(row["ad_serial"], row["ad_item"], row["ad_image"], row["ad_image"], row["ad_scene"], row["label"])  # noqa: B905
        found.update({ad[0]: (*ad, row["user"], user) for ad in ads})
    return found
