"""The store that pages show: opened for each page, at one of its snapshots."""

from typing import NamedTuple

from explorer.errors import NotHereError
from featurestore import log
from featurestore.errors import ChannelError, SnapshotNotFoundError
from featurestore.published.channels import VersionName
from featurestore.snapshot import Snapshot
from featurestore.store import FeatureStore


class SnapshotName(NamedTuple):
    """What tells a snapshot from all others, also of a store that was made anew at the same address."""

    store_id: str
    version: int
    commit_id: str


def name_of(snapshot: Snapshot) -> SnapshotName:
    """Name a snapshot, to keep values under."""
    return SnapshotName(snapshot.info.store_id, snapshot.version, snapshot.manifest.commit_id)


def open_snapshot(store: FeatureStore, version: VersionName | None) -> Snapshot:
    """Open the newest snapshot, or the one asked for, by its number or a channel.

    Raises NotHereError for one that is not there, or has expired, and for a channel that there is none of.
    """
    try:
        return store.snapshot(version)
    except (SnapshotNotFoundError, ChannelError) as error:
        raise NotHereError(str(error)) from error


def version_before(store: FeatureStore, version: int) -> int | None:
    """Find the kept snapshot before `version`; 0, the empty store, before the first commit; None: all have expired."""
    if version <= 1:
        return 0
    older = [each for each in log.versions(store.storage) if each < version]
    return older[-1] if older else None


def live_rows(snapshot: Snapshot) -> int | None:
    """Count the images of a snapshot where that takes no reading of files; else None."""
    readers = [snapshot.shard_reader(shard) for shard in snapshot.manifest.shards]
    return sum(reader.num_rows for reader in readers) if all(reader.is_plain for reader in readers) else None
