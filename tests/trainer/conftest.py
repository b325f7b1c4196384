"""Synthetic sample groups in Parquet, in the form that the samples job writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SampleTable = Callable[..., pa.Table]


def _lists(values: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def sample_table(groups: int, seed: int = 0, *, items: int = 40, users: int = 25, first_serial: int = 0) -> pa.Table:
    """`groups` sample groups with 1 to 6 impressions and 0 to 5 behaviours each; `ad_serial` numbers the impressions.

    An image's key is its item's number plus 1,000; a click is likelier on an even item.
    """
    random = np.random.default_rng(seed)
    ads, behaviors = random.integers(1, 7, groups), random.integers(0, 6, groups)
    ad_offsets, behavior_offsets = np.r_[0, np.cumsum(ads)], np.r_[0, np.cumsum(behaviors)]
    ad_item, behavior_item = random.integers(0, items, ads.sum()), random.integers(0, items, behaviors.sum())
    label = (random.random(ads.sum()) < np.where(ad_item % 2 == 0, 0.6, 0.2)).astype(np.int8)
    return pa.table(
        {
            "user": random.integers(0, users, groups),
            "session": np.arange(groups),
            "timestamp": 1_700_000_000 + np.arange(groups),
            "behavior_item": _lists(behavior_item, behavior_offsets),
            "behavior_image": _lists(behavior_item + 1_000, behavior_offsets),
            "behavior_category": _lists(behavior_item % 5, behavior_offsets),
            "ad_item": _lists(ad_item, ad_offsets),
            "ad_image": _lists(ad_item + 1_000, ad_offsets),
            "ad_category": _lists(ad_item % 5, ad_offsets),
            "ad_scene": _lists(random.integers(0, 3, ads.sum()), ad_offsets),
            "ad_serial": _lists(np.arange(first_serial, first_serial + ads.sum()), ad_offsets),
            "label": _lists(label, ad_offsets),
        }
    )


@pytest.fixture(name="sample_table", scope="session")
def _sample_table() -> SampleTable:
    return sample_table


@pytest.fixture(scope="session")
def write_samples() -> Callable[..., list[pa.Table]]:
    """Writes files of sample groups below a folder and returns their tables."""

    def write(folder: Path, groups_of_file: list[int], row_group: int = 7, **options: Any) -> list[pa.Table]:
        folder.mkdir(parents=True)
        tables: list[pa.Table] = []
        serial = options.pop("first_serial", 0)
        seed = options.pop("seed", 0)
        for number, groups in enumerate(groups_of_file):
            tables.append(sample_table(groups, seed + number, first_serial=serial, **options))
            serial += len(tables[-1].column("label").combine_chunks().flatten())
            pq.write_table(tables[-1], folder / f"day=2026-01-{number + 1:02}.parquet", row_group_size=row_group)
        return tables

    return write
