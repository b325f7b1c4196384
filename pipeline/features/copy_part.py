"""Copies of rows of images whose bytes the store knows, inside a Dask worker: nothing is computed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from featurestore.format.rows import FeatureRows
from featurestore.format.shard import take_rows
from featurestore.keys import Int64Array, shard_of, splitmix64
from featurestore.snapshot import Snapshot
from featurestore.store import FeatureStore
from pipeline.features.diff import ImageCopy

_DESCRIPTION = ["key", "content_digest", "width", "height"]


def copy_part(store: FeatureStore, run_id: str, part: str, version: int, copies: Sequence[ImageCopy]) -> None:
    """Stage a row for each of `copies` as `part` of the run: its own key, uri and tag, all else from its source.

    Reads the row groups around the sources in snapshot `version`. Raises MissingKeysError where a source is not in it.
    """
    snapshot = store.snapshot(version)
    sources_K = np.array([copy.source_key for copy in copies], np.int64)
    features_KD = snapshot.get(sources_K)
    described = _described(snapshot, sources_K)
    digests: list[Any] = described["content_digest"].to_pylist()
    rows = FeatureRows.of(
        [copy.ref.uri for copy in copies],
        features_KD,
        keys=np.array([copy.ref.key for copy in copies], np.int64),
        content_digests=digests,
        source_tags=[copy.ref.source_tag for copy in copies],
        widths=described["width"].to_numpy(),
        heights=described["height"].to_numpy(),
    )
    store.stage_part(run_id, part, rows)


def _described(snapshot: Snapshot, keys_K: Int64Array) -> pa.Table:
    """Read the small columns of `keys_K`, which are all there, in their order."""
    shard_K = shard_of(keys_K, snapshot.info.num_shards)
    tables, order = [], []
    for shard in np.unique(shard_K):
        here_K = np.flatnonzero(shard_K == shard)
        table = snapshot.shard_reader(int(shard)).read(_DESCRIPTION)
        place_K = np.searchsorted(splitmix64(table["key"].to_numpy()), splitmix64(keys_K[here_K]))
        tables.append(take_rows(table, place_K))
        order.append(here_K)
    return take_rows(pa.concat_tables(tables), np.argsort(np.concatenate(order)))
