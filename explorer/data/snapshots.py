"""Snapshots of a store: opened, their images by key, uri and shard, the timeline, and what changed between two.

Memory: three counts per shard, and the names of the few shards on a page, for any number of images.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from explorer.data.cache import LruCache
from explorer.errors import NotHereError
from featurestore import log
from featurestore.errors import ChannelError, CorruptFileError, SnapshotNotFoundError
from featurestore.keys import Int64Array, shard_of
from featurestore.published.versions import VersionName, read_channels
from featurestore.spec import Manifest
from featurestore.storage.storage import in_threads
from featurestore.store import FeatureStore, Snapshot
from featurestore.upkeep.history import SnapshotDiff, diff_shard, read_pins

_READERS = 4
_MANY_FILES = 6_000
"""Files in manifests that a page may read before it is shown: some hundredths of a second."""
_THREADS = 2
_LARGEST = 1 << 63


class SnapshotName(NamedTuple):
    """A unique name of a snapshot, also if a store is created again at the same address."""

    store_id: str
    version: int
    commit_id: str


def name_of(snapshot: Snapshot) -> SnapshotName:
    """Return the unique name of a snapshot, as a key for caches."""
    return SnapshotName(snapshot.info.store_id, snapshot.version, snapshot.manifest.commit_id)


def open_snapshot(store: FeatureStore, version: VersionName | None) -> Snapshot:
    """Open a snapshot by its number or a channel, by default the newest.

    Raises NotHereError for a missing or expired snapshot, and for an unknown channel.
    """
    try:
        return store.snapshot(version)
    except (SnapshotNotFoundError, ChannelError) as error:
        raise NotHereError(*error.args) from error


def version_before(store: FeatureStore, version: int) -> int | None:
    """Find the snapshot before `version`; 0, the empty store, before the first commit; None if all have expired."""
    if version <= 1:
        return 0
    older = [each for each in log.versions(store.storage) if each < version]
    return older[-1] if older else None


def live_rows(snapshot: Snapshot) -> int | None:
    """Count the images of a snapshot if that needs no reading of files, or return None."""
    readers = [snapshot.shard_reader(shard) for shard in snapshot.manifest.shards]
    return sum(reader.num_rows for reader in readers) if all(reader.is_plain for reader in readers) else None


class NamedImage(NamedTuple):
    """An image by its key and uri."""

    key: int
    uri: str


def named(snapshot: Snapshot, keys: Sequence[int]) -> list[NamedImage]:
    """Find the uris of keys, in the order asked, without missing keys. Reads the uris of their shards."""
    keys_U = np.asarray(keys, np.int64)
    shard_U = shard_of(keys_U, snapshot.info.num_shards)

    def uris(shard: int) -> list[NamedImage]:
        found_K, names = snapshot.shard_reader(shard).uris(keys_U[shard_U == shard])
        return list(map(NamedImage, found_K.tolist(), names))

    known = {image.key: image for part in in_threads(uris, np.unique(shard_U).tolist(), _THREADS) for image in part}
    return [known[key] for key in keys if key in known]


def find_key(snapshot: Snapshot, key: int) -> NamedImage | None:
    """Find an image by its key, or return None. Reads the names of one shard."""
    if not -_LARGEST <= key < _LARGEST:
        return None
    shard = int(shard_of([key], snapshot.info.num_shards)[0])
    keys, uris = snapshot.shard_reader(shard).uris(np.array([key], np.int64))
    return NamedImage(key, uris[0]) if len(keys) else None


@dataclass(frozen=True, kw_only=True)
class SnapshotLine:
    """One snapshot. If its manifest is damaged, only version, pins and channels are known."""

    version: int
    pins: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    is_damaged: bool = False
    time_s: float | None = None
    operation: str = ""
    writer: str = ""
    num_files: int | None = None
    file_rows: int | None = None
    """Rows in its files: images, their older rows, and tombstones."""
    file_bytes: int | None = None
    rows_written: int | None = None
    """Live rows in files that the previous commit did not have; None if that has expired."""
    rows_deleted: int | None = None
    """Tombstones in those files."""
    num_quarantined: int = 0


class Timeline:
    """The lines of a store's snapshots; reads each manifest once. Thread-safe."""

    def __init__(self) -> None:
        self._lines: LruCache[SnapshotLine] = LruCache(10_000)

    def is_quick(self, store: FeatureStore, versions: Sequence[int], num_files: int) -> bool:
        """Return whether `lines` is fast for these versions, with about this number of files each."""
        unknown = sum(self._lines.peek((store.info.store_id, version)) is None for version in versions)
        return unknown * num_files <= _MANY_FILES

    def lines(self, store: FeatureStore, versions: Sequence[int]) -> list[SnapshotLine]:
        """Describe snapshots, in the order given, without those that have just expired. Raises CorruptFileError."""
        pins: dict[int | None, list[str]] = {}
        channels: dict[int | None, list[str]] = {}
        for pin in read_pins(store.storage):
            pins.setdefault(pin.version, []).append(pin.name)
        for move in read_channels(store.storage):
            channels.setdefault(move.version, []).append(move.channel)
        found = in_threads(lambda version: self._line(store, version), versions, _READERS)
        return [
            replace(line, pins=tuple(pins.get(line.version, ())), channels=tuple(channels.get(line.version, ())))
            for line in found
            if line is not None
        ]

    def _line(self, store: FeatureStore, version: int) -> SnapshotLine | None:
        try:
            return self._lines.get((store.info.store_id, version), lambda: _read_line(store, version))
        except FileNotFoundError:
            return None
        except CorruptFileError:
            return SnapshotLine(version=version, is_damaged=True)


def _read_line(store: FeatureStore, version: int) -> SnapshotLine:
    manifest = log.read(store.storage, version)
    written = _written(manifest, _parent_of(store, manifest))
    return SnapshotLine(
        version=version,
        time_s=manifest.time_s,
        operation=manifest.operation,
        writer=manifest.writer,
        num_files=manifest.num_files,
        file_rows=manifest.file_rows,
        file_bytes=manifest.file_bytes,
        rows_written=None if written is None else written[0],
        rows_deleted=None if written is None else written[1],
        num_quarantined=manifest.num_quarantined,
    )


def _parent_of(store: FeatureStore, manifest: Manifest) -> Manifest | None:
    if manifest.version == 1:
        return log.EMPTY
    try:
        parent = log.find(store.storage, manifest.version - 1)
    except CorruptFileError:
        return None
    return parent if parent is not None and parent.commit_id == manifest.parent else None


def _written(manifest: Manifest, parent: Manifest | None) -> tuple[int, int] | None:
    """Count live rows and tombstones of the files that the commit added."""
    if parent is None:
        return None
    known = {entry.path for entry in parent.entries}
    new = [entry for entry in manifest.entries if entry.path not in known]
    return sum(entry.num_live for entry in new), sum(entry.num_deleted for entry in new)


ChangeKind = Literal["added", "changed", "removed"]
KINDS: tuple[ChangeKind, ...] = ("added", "changed", "removed")


@dataclass(frozen=True)
class ChangeCounts:
    """Numbers of images added, changed and removed between two snapshots, in each shard whose files differ, (S,)."""

    shards: tuple[int, ...]
    of: Mapping[ChangeKind, Int64Array]
    """The counts of each kind by shard, (S,)."""

    def total(self, kind: ChangeKind) -> int:
        """Count the images of one kind."""
        return int(self.of[kind].sum())


@dataclass(frozen=True)
class Since:
    """The snapshot that was the newest at a time, or the nearest one if it has expired."""

    snapshot: Snapshot
    is_exact: bool
    """Whether no snapshot since that time has expired."""


class Changes:
    """Differences between snapshots, cached. Thread-safe."""

    def __init__(self) -> None:
        self._counts: LruCache[ChangeCounts] = LruCache(200)
        self._diffs: LruCache[SnapshotDiff] = LruCache(4)

    def peek(self, old: Snapshot, new: Snapshot) -> ChangeCounts | None:
        """Return the result of `count` if it is cached."""
        return self._counts.peek((name_of(old), name_of(new)))

    def count(self, old: Snapshot, new: Snapshot) -> ChangeCounts:
        """Count the changes. Reads names of the shards whose files differ. Raises CorruptFileError."""
        return self._counts.get((name_of(old), name_of(new)), lambda: _count(old, new, self.shard))

    def page(self, old: Snapshot, new: Snapshot, kind: ChangeKind, first: int, most: int) -> list[NamedImage]:
        """List up to `most` images of one kind from number `first` on, by shard and hash of the key."""
        counts = self.count(old, new)
        count_S = counts.of[kind]
        start_S = np.cumsum(count_S) - count_S
        found: list[NamedImage] = []
        for shard, start, number in zip(counts.shards, start_S.tolist(), count_S.tolist(), strict=True):
            if number == 0 or start + number <= first or start >= first + most:
                continue
            rows = getattr(self.shard(old, new, shard), kind)
            chosen = slice(max(0, first - start), first + most - start)
            found += map(NamedImage, rows.keys_N[chosen].tolist(), rows.uris[chosen])
        return found

    def shard(self, old: Snapshot, new: Snapshot, shard: int) -> SnapshotDiff:
        """Return all changes of a shard. Reads its names in both snapshots. Raises CorruptFileError."""
        return self._diffs.get((name_of(old), name_of(new), shard), lambda: diff_shard(old, new, shard))


def newest_at(store: FeatureStore, time_s: float, *, never_empty: bool = False) -> Since:
    """Open the snapshot that was the newest at a time; 0, the empty store, before the first commit.

    `never_empty`: then the first one that is kept, if there is any. Reads a few manifests by binary search, as their
    times are ascending, and begins again if one expires meanwhile. Raises NotHereError, CorruptFileError.
    """
    known = log.versions(store.storage)
    try:
        later = bisect.bisect_right(known, time_s, key=lambda version: open_snapshot(store, version).manifest.time_s)
        before = known[later - 1] if later else 0
        is_exact = later == len(known) or known[later] == before + 1
        if not before and known and (never_empty or not is_exact):
            before = known[0]
        return Since(open_snapshot(store, before), is_exact)
    except NotHereError:
        if {*known} <= {*log.versions(store.storage)}:
            raise
    return newest_at(store, time_s, never_empty=never_empty)


def _count(old: Snapshot, new: Snapshot, diff: Callable[[Snapshot, Snapshot, int], SnapshotDiff]) -> ChangeCounts:
    mine, other = old.manifest, new.manifest
    shards = [shard for shard in sorted({*mine.shards, *other.shards}) if mine.files(shard) != other.files(shard)]

    def counts(shard: int) -> list[int]:
        found = diff(old, new, shard)
        return [len(getattr(found, kind)) for kind in KINDS]

    counts_S3 = np.array(list(in_threads(counts, shards, _THREADS)), np.int64).reshape(-1, len(KINDS))
    return ChangeCounts(tuple(shards), dict(zip(KINDS, counts_S3.T, strict=True)))
