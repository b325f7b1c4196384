"""A small store in the place of one too large for this machine: drawn features, the keys of a few batches"""

from pathlib import Path

import numpy as np

from featurestore import FeatureRows, FeatureStore, StoreInfo, to_bits
from featurestore.lookup.mmap import physical_memory_bytes
from trainer.exchange.routing import Int64

_MOST_OF_MEMORY = 0.25
_STANDIN_OF_MEMORY = 0.05
_SHARDS, _ROWS_A_PUT = 8, 8_192


def fits(info: StoreInfo, num_rows: int) -> bool:
    """Whether this machine may map all features for the time of a measurement: a quarter of its memory."""
    return num_rows * info.row_bytes <= _MOST_OF_MEMORY * physical_memory_bytes()


def make(folder: Path, info: StoreInfo, keys_U: Int64) -> FeatureStore:
    """A store of drawn features for `keys_U`, or as many of them as a twentieth of the memory holds.

    int8 becomes bfloat16, which needs no codec.
    """
    dtype = "bfloat16" if info.dtype == "int8" else info.dtype
    small = StoreInfo(num_shards=_SHARDS, dim=info.dim, dtype=dtype, extractor=info.extractor)
    store = FeatureStore.create(folder, small)
    draw = np.random.default_rng(0)
    keys_U = keys_U[: max(1, int(_STANDIN_OF_MEMORY * physical_memory_bytes() / small.row_bytes))]
    for start in range(0, len(keys_U), _ROWS_A_PUT):
        part_U = keys_U[start : start + _ROWS_A_PUT]
        values_UD = np.maximum(draw.standard_normal((len(part_U), info.dim), dtype=np.float32), 0)
        uris = [f"drawn/{key}" for key in part_U]
        store.put(FeatureRows.of(uris, to_bits(values_UD, dtype), keys=part_U))
    return store
