"""What came, changed and went between two snapshots: counted shard by shard, and read a page at a time.

Memory: three counts a shard, and the names of the few shards that a page shows, whatever the number of images.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from explorer.data.kept import Kept
from explorer.data.store.opened import name_of, open_snapshot
from featurestore import log
from featurestore.keys import Int64Array
from featurestore.snapshot import Snapshot
from featurestore.storage.threads import in_threads
from featurestore.store import FeatureStore
from featurestore.upkeep.history import SnapshotDiff, diff_shard

ChangeKind = Literal["added", "changed", "removed"]
KINDS: tuple[ChangeKind, ...] = ("added", "changed", "removed")
_THREADS = 2


class NamedImage(NamedTuple):
    """An image by its key and uri."""

    key: int
    uri: str


@dataclass(frozen=True)
class ChangeCounts:
    """How many images came, changed and went from one snapshot to another, in each shard whose files differ, (S,)."""

    shards: tuple[int, ...]
    added_S: Int64Array
    changed_S: Int64Array
    removed_S: Int64Array

    def of(self, kind: ChangeKind) -> Int64Array:
        """Give the counts of one kind by shard, (S,)."""
        return {"added": self.added_S, "changed": self.changed_S, "removed": self.removed_S}[kind]

    def total(self, kind: ChangeKind) -> int:
        """Count the images of one kind."""
        return int(self.of(kind).sum())


@dataclass(frozen=True)
class Since:
    """The snapshot that was the newest at a time. Where that has expired, it is the nearest that is kept."""

    version: int
    is_exact: bool
    """Whether nothing of the time from then on has expired."""


class Changes:
    """Differences of snapshots, counted once. For several threads."""

    def __init__(self) -> None:
        self._counts: Kept[ChangeCounts] = Kept(200)
        self._diffs: Kept[SnapshotDiff] = Kept(4)

    def peek(self, old: Snapshot, new: Snapshot) -> ChangeCounts | None:
        """Return what `count` does where it is there without reading."""
        return self._counts.peek((name_of(old), name_of(new)))

    def count(self, old: Snapshot, new: Snapshot) -> ChangeCounts:
        """Count what differs. Reads names of the shards whose files differ. Raises CorruptFileError."""
        return self._counts.get((name_of(old), name_of(new)), lambda: _count(old, new, self.shard))

    def page(self, old: Snapshot, new: Snapshot, kind: ChangeKind, first: int, most: int) -> list[NamedImage]:
        """Name the images of one kind from number `first` on, at most `most`, by shard and hash of the key."""
        counts = self.count(old, new)
        start_S = np.cumsum(counts.of(kind)) - counts.of(kind)
        found: list[NamedImage] = []
        for shard, start, number in zip(counts.shards, start_S.tolist(), counts.of(kind).tolist(), strict=True):
            if number == 0 or start + number <= first or start >= first + most:
                continue
            rows = getattr(self.shard(old, new, shard), kind)
            chosen = slice(max(0, first - start), first + most - start)
            found += map(NamedImage, rows.keys_N[chosen].tolist(), rows.uris[chosen])
        return found

    def shard(self, old: Snapshot, new: Snapshot, shard: int) -> SnapshotDiff:
        """Give all changes of a shard. Reads its names in both snapshots. Raises CorruptFileError."""
        return self._diffs.get((name_of(old), name_of(new), shard), lambda: diff_shard(old, new, shard))


def newest_at(store: FeatureStore, time_s: float) -> Since:
    """Find the snapshot that was the newest at a time; before the first commit that is 0, the empty store.

    Reads a few manifests, by halves: their times never run backwards. Raises NotHereError, CorruptFileError.
    """
    known = log.versions(store.storage)

    def time_of(version: int) -> float:
        return open_snapshot(store, version).manifest.time_s

    later = bisect.bisect_right(known, time_s, key=time_of)
    before = known[later - 1] if later else 0
    if later == len(known) or known[later] == before + 1:
        return Since(before, True)
    return Since(before or known[0], False)


def _count(old: Snapshot, new: Snapshot, diff: Callable[[Snapshot, Snapshot, int], SnapshotDiff]) -> ChangeCounts:
    mine, other = old.manifest, new.manifest
    shards = [shard for shard in sorted({*mine.shards, *other.shards}) if mine.files(shard) != other.files(shard)]

    def counts(shard: int) -> list[int]:
        found = diff(old, new, shard)
        return [len(getattr(found, kind)) for kind in KINDS]

    counts_S3 = np.array(list(in_threads(counts, shards, _THREADS)), np.int64).reshape(-1, len(KINDS))
    added_S, changed_S, removed_S = counts_S3.T
    return ChangeCounts(tuple(shards), added_S, changed_S, removed_S)
