"""All that a snapshot holds beside the features."""

import pyarrow as pa

from featurestore import Snapshot
from featurestore.format.datafile import METADATA_COLUMNS, schema_of


def metadata_of(snapshot: Snapshot) -> pa.Table:
    """Read key, uri, content_digest, source_tag, width and height of all live rows."""
    readers = [snapshot.shard_reader(shard) for shard in sorted(snapshot.manifest.shards)]
    empty = schema_of(snapshot.info).empty_table().select(METADATA_COLUMNS)
    return pa.concat_tables([empty, *(reader.read(METADATA_COLUMNS) for reader in readers)])
