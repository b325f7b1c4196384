"""The commits between two snapshots, and by which of them each image came, changed or went."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from explorer.data.store.changes import KINDS, Changes, NamedImage
from explorer.data.store.opened import open_snapshot
from explorer.data.store.timeline import SnapshotLine, Timeline
from featurestore import log
from featurestore.keys import shard_of
from featurestore.snapshot import Snapshot
from featurestore.store import FeatureStore

MOST_LISTED = 40
MOST_STEPS = 12
"""Commits among which that of each image is looked for: each may read the names of the images' shards."""


class CameBy(NamedTuple):
    """The commit that an image came by; not `is_sure`: by it, or by one before it that has gone from the history."""

    commit: SnapshotLine
    is_sure: bool


@dataclass(frozen=True)
class CommitsBetween:
    """The kept commits after one snapshot up to another, newest first."""

    lines: Sequence[SnapshotLine] = ()
    """At most MOST_LISTED."""
    count: int = 0
    of_key: Mapping[int, CameBy] = field(default_factory=dict)
    """By the images' keys; empty where there are more than MOST_STEPS."""


def commits_between(
    store: FeatureStore,
    timeline: Timeline,
    changes: Changes,
    old: Snapshot,
    new: Snapshot,
    images: Sequence[NamedImage],
) -> CommitsBetween:
    """List the commits after `old` up to `new`, and find the newest one that changed each image.

    Cost: a manifest for each commit; names of the images' shards, twice for each commit that changed them, unless there
    is one commit alone. Raises CorruptFileError, NotHereError.
    """
    versions = [each for each in log.versions(store.storage) if old.version < each <= new.version]
    lines = timeline.lines(store, versions[::-1][:MOST_LISTED])
    if not versions or len(versions) > MOST_STEPS:
        return CommitsBetween(lines, len(versions))
    by_version = {line.version: line for line in lines}
    steps = [old, *(open_snapshot(store, version) for version in versions[:-1]), new]
    keys_N = np.array([image.key for image in images], np.int64)
    version_N = np.full(len(keys_N), new.version if len(versions) == 1 else 0)
    shard_N = shard_of(keys_N, store.info.num_shards)
    for before, after in reversed(list(pairwise(steps))):
        for shard in np.unique(shard_N[version_N == 0]).tolist():
            if before.manifest.files(shard) == after.manifest.files(shard):
                continue
            found = changes.shard(before, after, shard)
            changed = np.concatenate([getattr(found, kind).keys_N for kind in KINDS])
            version_N[(version_N == 0) & (shard_N == shard) & np.isin(keys_N, changed)] = after.version
    before_of = {after.version: before.version for before, after in pairwise(steps)}
    of_key = {
        key: CameBy(by_version[version], before_of[version] == version - 1)
        for key, version in zip(keys_N.tolist(), version_N.tolist(), strict=True)
        if version in by_version
    }
    return CommitsBetween(lines, len(versions), of_key)
