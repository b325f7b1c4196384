"""Samples in which training has never seen a share of the items, and features that say nothing: images' hard case.

The test split stays as it is: there the held-out items are shown, and stand in histories, as new items do in life. Of
the metrics of a run, `new_ad_auc` is then theirs.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo
from featurestore.keys import sampled

NOISE_DIM = 512
_BEHAVIORS = ("behavior_item", "behavior_image", "behavior_category")
_IMPRESSIONS = ("ad_item", "ad_image", "ad_category", "ad_scene", "label")
_DRAWN = ExtractorSpec(
    backbone="drawn", layer="none", weights_digest="none", preprocessing="none", compute_dtype="float32"
)


def hold_out(samples: Path, out: Path, share: float, seed: int = 0) -> None:
    """Writes `samples`, of the preset's schema, to `out` with `share` of all items, chosen by `seed`, not in train/;
    test/ is copied. Groups that lose all of their impressions are left out.
    """
    (out / "train").mkdir(parents=True)
    shutil.copytree(samples / "test", out / "test")
    for file in sorted((samples / "train").glob("*.parquet")):
        source = pq.ParquetFile(file)
        with pq.ParquetWriter(out / "train" / file.name, source.schema_arrow) as writer:
            for number in range(source.num_row_groups):
                table = _without(source.read_row_group(number), _BEHAVIORS, share, seed)
                table = _without(table, _IMPRESSIONS, share, seed)
                has_any: Any = pc.list_value_length(table["label"]).to_numpy() > 0
                writer.write_table(table.filter(pa.array(has_any)))


def make_noise(samples: Path, store: Path, seed: int = 0) -> None:
    """A store with drawn features, independent of everything, for every image of `samples`."""
    tables = [pq.read_table(file, columns=["ad_image", "behavior_image"]) for file in samples.glob("*/*.parquet")]
    lists: list[Any] = [column.combine_chunks() for table in tables for column in table.columns]
    keys = np.unique(np.concatenate([np.asarray(each.flatten()) for each in lists]))
    features = np.random.default_rng(seed).standard_normal((len(keys), NOISE_DIM), np.float32)
    made = FeatureStore.create(str(store), StoreInfo(num_shards=64, name="images", dim=NOISE_DIM, extractor=_DRAWN))
    made.put(FeatureRows.of([str(key) for key in keys], features, keys=keys))


def _without(table: pa.Table, columns: Sequence[str], share: float, seed: int) -> pa.Table:
    """The table without the held-out items in these lists, which lie side by side; the first one has the items."""
    items: Any = table[columns[0]].combine_chunks()
    is_kept_N = ~sampled(items.flatten().to_numpy(zero_copy_only=False), share, seed)
    kept_before = np.r_[0, np.cumsum(is_kept_N)]
    ends = np.cumsum(pc.list_value_length(items).to_numpy(zero_copy_only=False))
    offsets = pa.array(kept_before[np.r_[0, ends]], pa.int32())
    for name in columns:
        kept: Any = table[name].combine_chunks()
        column = pa.ListArray.from_arrays(
            offsets, kept.flatten().filter(pa.array(is_kept_N)), type=table.schema.field(name).type
        )
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    return table
