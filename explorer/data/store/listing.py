"""A store at a snapshot: opened, with its broken images."""

from dataclasses import dataclass
from typing import NamedTuple

from explorer.data.pictures import Pictures
from explorer.errors import NotHereError
from featurestore import log
from featurestore.errors import ChannelError, SnapshotNotFoundError
from featurestore.published.versions import VersionName
from featurestore.snapshot import Snapshot
from featurestore.staging import QuarantineRow
from featurestore.storage.storage import in_threads
from featurestore.store import FeatureStore


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
        raise NotHereError(str(error)) from error


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


_THREADS = 8


@dataclass(frozen=True)
class BrokenImage:
    """One image in quarantine, with its current file if that can be read."""

    key: int
    uri: str
    reason: str
    time_s: float
    size_bytes: int | None
    first_bytes: bytes


def look_at(rows: list[QuarantineRow], pictures: Pictures) -> list[BrokenImage]:
    """Read the first bytes of the files of images in quarantine."""

    def broken(row: QuarantineRow) -> BrokenImage:
        seen = pictures.look(row.uri)
        return BrokenImage(row.key, row.uri, row.reason, row.time_s, seen.size_bytes, seen.first_bytes)

    return list(in_threads(broken, rows, _THREADS)) if rows else []
