"""A store's history: commits, the differences between them, pins, and channels.

Letters of shapes: K rows that may differ, N keys.
"""

import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from featurestore import log as manifests
from featurestore.errors import CorruptFileError, PinError, SnapshotNotFoundError
from featurestore.format import datafile
from featurestore.keys import BoolArray, Int64Array
from featurestore.problems import Problem
from featurestore.published import versions
from featurestore.spec import LAST_SECOND, FileEntry, Manifest, Sealed, Version, create_sealed, read_sealed
from featurestore.storage.storage import Progress, Storage, in_threads
from featurestore.store import Commit, FeatureStore, Shards, Snapshot

_THREADS = 4
_COMPARED = [name for name in datafile.METADATA_COLUMNS if name not in ("key", "source_tag")]  # which a touch changes


@dataclass(frozen=True)
class LogEntry:
    """One snapshot that can be opened; without a manifest where that is damaged."""

    version: int
    manifest: Manifest | None
    pins: tuple[str, ...]
    channels: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamedRows:
    """The names of some rows: keys (N,) and uris."""

    keys_N: Int64Array
    uris: list[str]

    def __len__(self) -> int:
        return len(self.keys_N)


@dataclass(frozen=True)
class SnapshotDiff:
    """Differences from one snapshot to another, each by shard and splitmix64.

    Changed: another feature, or another content, uri or size of the image; not where its tag alone is new.
    """

    added: NamedRows
    changed: NamedRows
    removed: NamedRows


def log(store: FeatureStore, last: int | None = None) -> list[LogEntry]:
    """List the kept snapshots, newest first; the `last` ones where that is given. Reads one small file for each."""
    known = manifests.versions(store.storage)[::-1][:last]
    pins: dict[int, list[str]] = {}
    for pin in read_pins(store.storage):
        pins.setdefault(pin.version, []).append(pin.name)

    channels: dict[int | None, list[str]] = {}
    for move in versions.read_channels(store.storage):
        channels.setdefault(move.version, []).append(move.channel)

    def entry(version: int) -> LogEntry | None:
        try:
            manifest: Manifest | None = manifests.read(store.storage, version)
        except CorruptFileError:
            manifest = None
        except FileNotFoundError:  # it has expired meanwhile
            return None
        return LogEntry(version, manifest, tuple(pins.get(version, ())), tuple(channels.get(version, ())))

    return [found for found in in_threads(entry, known, _THREADS) if found is not None]


def diff(
    store: FeatureStore, before: versions.VersionName, after: versions.VersionName, progress: Progress | None = None
) -> SnapshotDiff:
    """Find the rows added, changed and removed from snapshot `before` to `after`, in whichever order they were made.

    Shards with the same files are not read; of others the keys are, and features only of rows in files that one of the
    two snapshots alone has. Raises SnapshotNotFoundError, CorruptFileError.
    """
    old, new = store.snapshot(before), store.snapshot(after)
    shards = sorted({*old.manifest.shards, *new.manifest.shards})
    tables: list[list[pa.Table]] = [[_no_rows(old)] for _ in range(3)]
    for parts in in_threads(lambda shard: _shard_diff(old, new, shard), shards, _THREADS, progress):
        for group, part in zip(tables, parts, strict=True):
            group.append(part)
    return _diff_of(pa.concat_tables(group) for group in tables)


def diff_shard(old: Snapshot, new: Snapshot, shard: int) -> SnapshotDiff:
    """Compare one shard for `diff`: the memory is that of the shard's keys and names. Raises CorruptFileError."""
    return _diff_of(_shard_diff(old, new, shard))


@dataclass(kw_only=True)
class _Restore(Commit):
    """The files of an old snapshot, in the place of all that there are."""

    store: FeatureStore
    version: int

    def onto(self, parent: Manifest) -> Shards:
        """Return the old files, looked up again each time: the snapshot may expire meanwhile."""
        return self.store.snapshot(self.version).manifest.shards

    def manifest_after(self, parent: Manifest) -> Manifest:
        """Return the next manifest, with the `mirrors` of the old snapshot."""
        mirrors = self.store.snapshot(self.version).manifest.mirrors
        return super().manifest_after(parent).model_copy(update={"mirrors": mirrors})


def restore(store: FeatureStore, version: int) -> Snapshot:
    """Commit a new snapshot with the rows of an old one, which must be kept still.

    Nothing is lost: later commits stay in the log, and can be restored as well. Raises SnapshotNotFoundError.
    """
    operation = f"restore {version}"
    return _Restore(storage=store.storage, info=store.info, operation=operation, store=store, version=version).publish()


def _shard_diff(old: Snapshot, new: Snapshot, shard: int) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Return key and uri of the rows that came, changed and went."""
    old_files, new_files = old.manifest.files(shard), new.manifest.files(shard)
    same = (mine.path == other.path for mine, other in zip(old_files, new_files, strict=False))
    num_same = sum(1 for _ in takewhile(bool, same))
    # What the common first files decide, and no later one touches, is the same on both sides.
    files = [*old_files[num_same:], *new_files[num_same:]]
    if not files:
        return _no_rows(old), _no_rows(old), _no_rows(old)
    keys_K = np.unique(np.concatenate([_keys_of(new, file) for file in files]))
    old_table, new_table = _live_rows(old, shard, keys_K), _live_rows(new, shard, keys_K)
    old_keys, new_keys = datafile.numpy_column(old_table, datafile.KEY), datafile.numpy_column(new_table, datafile.KEY)
    is_new, is_gone = ~np.isin(new_keys, old_keys), ~np.isin(old_keys, new_keys)
    both_old, both_new = old_table.filter(pa.array(~is_gone)), new_table.filter(pa.array(~is_new))
    is_changed = _changed(old, new, shard, both_old, both_new)
    chosen, names = ((new_table, is_new), (both_new, is_changed), (old_table, is_gone)), [datafile.KEY, datafile.URI]
    added, changed, removed = (table.select(names).filter(pa.array(mask)) for table, mask in chosen)
    return added, changed, removed


def _changed(old: Snapshot, new: Snapshot, shard: int, old_table: pa.Table, new_table: pa.Table) -> BoolArray:
    """Return which rows of equal keys differ; features are compared as many at a time as a row group holds."""
    keys_K = datafile.numpy_column(new_table, datafile.KEY)
    changed_K = np.zeros(len(keys_K), np.bool_)
    for name in _COMPARED:
        changed_K |= np.asarray(pc.not_equal(old_table[name].combine_chunks(), new_table[name].combine_chunks()))
    old_reader, new_reader = old.shard_reader(shard), new.shard_reader(shard)
    unknown = np.flatnonzero(~changed_K)
    step = max(1, datafile.ROW_GROUP_BYTES // new.info.row_bytes)
    for start in range(0, len(unknown), step):
        rows = unknown[start : start + step]
        old_features, _ = old_reader.features(keys_K[rows])
        new_features, _ = new_reader.features(keys_K[rows])
        changed_K[rows] = (old_features != new_features).any(axis=1)
    return changed_K


def _live_rows(snapshot: Snapshot, shard: int, keys_K: Int64Array) -> pa.Table:
    """Read the compared columns of the live rows among `keys_K`, by splitmix64, without features."""
    reader = snapshot.shard_reader(shard)
    columns = [datafile.KEY, *_COMPARED]
    table = reader.read(columns) if reader.entries else datafile.schema_of(snapshot.info).empty_table().select(columns)
    return table.filter(pa.array(np.isin(datafile.numpy_column(table, datafile.KEY), keys_K)))


def _keys_of(snapshot: Snapshot, entry: FileEntry) -> Int64Array:
    with datafile.open_entry(snapshot.storage, snapshot.info, entry) as file:
        return datafile.numpy_column(file.read([datafile.KEY]), datafile.KEY)


def _no_rows(snapshot: Snapshot) -> pa.Table:
    return datafile.schema_of(snapshot.info).empty_table().select([datafile.KEY, datafile.URI])


def _diff_of(tables: Iterable[pa.Table]) -> SnapshotDiff:
    """Name the rows of three tables: those that came, changed and went."""
    added, changed, removed = map(_rows, tables)
    return SnapshotDiff(added, changed, removed)


def _rows(table: pa.Table) -> NamedRows:
    return NamedRows(datafile.numpy_column(table, datafile.KEY), datafile.text_column(table, datafile.URI))


PINS = manifests.PINS
_SUFFIX = ".json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


class Pin(Sealed):
    """One name, and the snapshot that it keeps."""

    name: str
    version: Version
    writer: str
    time_s: Annotated[float, Field(ge=0, le=LAST_SECOND)]  # for display


def is_pin_name(name: str) -> bool:
    """Return whether a pin may have this name."""
    return _NAME.fullmatch(name) is not None


def pin(store: FeatureStore, name: str, version: versions.VersionName | None = None) -> Pin:
    """Keep a snapshot, the newest by default, until `unpin`. To make the same pin again is not an error.

    Raises PinError where the name keeps another snapshot, SnapshotNotFoundError where `expire` was first.
    """
    path, storage = _path(name), store.storage
    wanted = store.snapshot(version).version
    if wanted == 0:
        raise SnapshotNotFoundError(Problem.NOTHING_TO_PIN, store.url)
    mine = Pin(name=name, version=wanted, writer=manifests.writer_name(), time_s=time.time())
    kept = create_sealed(storage, path, mine)
    if kept.version != wanted:
        raise PinError(Problem.NAME_TAKEN, name, kept.version)
    # `expire` puts a copy aside before it looks at the pins for the last time: one of the two sees the other.
    if not _is_there(storage, manifests.manifest_path(wanted)) or _is_there(
        storage, manifests.manifest_path(wanted, manifests.EXPIRED)
    ):
        if kept == mine:
            storage.delete(path)
        raise SnapshotNotFoundError(Problem.EXPIRING, wanted, store.url)
    return kept


def unpin(store: FeatureStore, name: str) -> None:
    """Remove a pin, damaged ones too. Raises PinError where there is none."""
    path = _path(name)
    if not _is_there(store.storage, path):
        names = [found.removesuffix(_SUFFIX) for found in store.storage.list(PINS)]
        raise PinError(Problem.NO_PIN, store.url, name, ", ".join(names) or "none")
    store.storage.delete(path)


def read_pins(storage: Storage) -> list[Pin]:
    """Read all pins, by name. Raises CorruptFileError, as the snapshot of a damaged pin is unknown."""
    found = []
    for name in storage.list(PINS):
        pin_name = name.removesuffix(_SUFFIX)
        try:
            found.append(read_pin(storage, pin_name))
        except FileNotFoundError:
            continue  # unpinned meanwhile
        except CorruptFileError as error:
            way_out = f"crossmedia store unpin {storage.url} {pin_name}, and pin the snapshot again"
            raise CorruptFileError(Problem.BROKEN_UNTIL_MENDED, error, way_out) from error
    return found


def referenced_versions(storage: Storage) -> set[int]:
    """Return the snapshots that a pin or a channel keeps. Raises CorruptFileError.

    Pins are read first: who moves a channel pins its snapshot until the channel points there.
    """
    pinned = {pin.version for pin in read_pins(storage)}
    return pinned | {move.version for move in versions.read_channels(storage) if move.version is not None}


def read_pin(storage: Storage, name: str) -> Pin:
    """Read one pin. Raises FileNotFoundError, CorruptFileError."""
    path = f"{PINS}/{name}{_SUFFIX}"
    found = read_sealed(storage, path, Pin)
    if found.name != name:
        raise CorruptFileError(Problem.ANOTHER_PIN, storage.full(path), found.name)
    return found


def _path(name: str) -> str:
    if not is_pin_name(name):
        raise PinError(Problem.NOT_A_PIN_NAME, name)
    return f"{PINS}/{name}{_SUFFIX}"


def _is_there(storage: Storage, path: str) -> bool:
    try:
        storage.entry(path)
    except FileNotFoundError:
        return False
    except CorruptFileError:  # a link out of the store
        return True
    return True


def move_channel(
    store: FeatureStore, name: str, version: versions.VersionName, reason: str = "set"
) -> versions.ChannelMove:
    """Let a channel point to a snapshot, which `expire` keeps from then on; it is made where it is not there.

    Raises ChannelError, SnapshotNotFoundError where `expire` was first.
    """
    versions.check_channel_name(name)
    snapshot = store.snapshot(version)
    if snapshot.version == 0:
        raise SnapshotNotFoundError(Problem.NOTHING_TO_PIN, store.url)
    # A pin first: of this and an expiry one sees the other. An expiry reads the pins before the channels, so the
    # snapshot is kept at every moment. A kill in between leaves the pin, which keeps too much rather than too little.
    guard = f"moving-{name}-{uuid.uuid4().hex[:8]}"
    pin(store, guard, snapshot.version)
    try:
        return versions.add_move(store.storage, name, snapshot.version, snapshot.manifest.commit_id, reason)
    finally:
        unpin(store, guard)


def remove_channel(store: FeatureStore, name: str) -> versions.ChannelMove:
    """Remove a channel; its history stays, and the next `expire` decides about its snapshot.

    Raises ChannelError where there is none.
    """
    found = versions.find_channel(store.storage, name)
    return versions.add_move(store.storage, name, None, "", f"removed; it was at snapshot {found.version}")
