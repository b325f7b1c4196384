"""The rows of a shard of a store, as a writer has them."""

import pyarrow as pa

from featurestore.format.datafile import (
    DELETED,
    KEY,
    URI,
    FeatureRows,
    digest_column,
    matrix_of,
    numpy_column,
    schema_of,
    text_column,
)
from featurestore.spec import StoreInfo
from featurestore.store import Snapshot


def rows_of(table: pa.Table, info: StoreInfo) -> FeatureRows:
    """Return the rows of a table that has every column."""
    return FeatureRows(
        keys_N=numpy_column(table, KEY),
        uris=text_column(table, URI),
        features_ND=matrix_of(table, info),
        content_digest_N=digest_column(table),
        source_tag=text_column(table, "source_tag"),
        width_N=numpy_column(table, "width"),
        height_N=numpy_column(table, "height"),
        deleted_N=numpy_column(table, DELETED),
    )


def read_shard(snapshot: Snapshot, shard: int) -> FeatureRows:
    """Read the live rows of one shard in the order of splitmix64, without tombstones."""
    reader, info = snapshot.shard_reader(shard), snapshot.info
    return rows_of(reader.read() if reader.entries else schema_of(info).empty_table(), info)
