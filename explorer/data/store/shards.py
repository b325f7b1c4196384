"""The shards of a snapshot: files, bytes, rows and deltas of each, and which want compaction; no file is read."""

from dataclasses import dataclass

from featurestore.spec import Manifest
from featurestore.upkeep.compaction import needs_compaction


@dataclass(frozen=True)
class ShardLine:
    """One shard by its entries in a manifest."""

    shard: int
    num_files: int
    num_deltas: int
    bytes: int
    delta_bytes: int
    rows: int
    """In its files: images, their older rows, and tombstones."""
    num_deleted: int
    is_due: bool
    """Whether `compact` would make one file of it."""


def shard_lines(manifest: Manifest) -> list[ShardLine]:
    """Describe the shards that have files, by number."""
    return [
        ShardLine(
            shard=shard,
            num_files=len(files),
            num_deltas=len(files) - 1,
            bytes=sum(file.bytes for file in files),
            delta_bytes=sum(file.bytes for file in files[1:]),
            rows=sum(file.rows for file in files),
            num_deleted=sum(file.num_deleted for file in files),
            is_due=needs_compaction(files),
        )
        for shard, files in sorted(manifest.shards.items())
        if files
    ]
