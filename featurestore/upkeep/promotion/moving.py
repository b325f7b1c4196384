"""Move a channel to a snapshot, or remove it, so that no expiry at the same time takes the snapshot away."""

import uuid

from featurestore.errors import SnapshotNotFoundError
from featurestore.published.channels import (
    ChannelMove,
    VersionName,
    add_move,
    check_channel_name,
    find_channel,
)
from featurestore.store import FeatureStore
from featurestore.upkeep.pins import pin, unpin


def move_channel(
    store: FeatureStore, name: str, version: VersionName, reason: str = "set", after: int | None = None
) -> ChannelMove:
    """Let a channel point to a snapshot, which `expire` keeps from then on; it is made where it is not there.

    `after`: the number of the move that the caller saw as the newest, 0 for none: where another writer has moved the
    channel since, CommitConflictError is raised, and nothing happens. Where it points there already, and no `after` is
    given, nothing is written. Raises ChannelError, SnapshotNotFoundError where `expire` was first.
    """
    check_channel_name(name)
    snapshot = store.snapshot(version)
    if snapshot.version == 0:
        raise SnapshotNotFoundError(f"{store.url} has no commit that a channel could point to; 0 is the empty store")
    # A pin first: of this and an expiry one sees the other. An expiry reads the pins before the channels, so the
    # snapshot is kept at every moment. A kill in between leaves the pin, which keeps too much rather than too little.
    guard = f"moving-{name}-{uuid.uuid4().hex[:8]}"
    pin(store, guard, snapshot.version)
    try:
        return add_move(store.storage, name, snapshot.version, snapshot.manifest.commit_id, reason, after)
    finally:
        unpin(store, guard)


def remove_channel(store: FeatureStore, name: str) -> ChannelMove:
    """Remove a channel; its history stays, and the next `expire` decides about its snapshot.

    Raises ChannelError where there is none.
    """
    found = find_channel(store.storage, name)
    return add_move(store.storage, name, None, "", f"removed; it was at snapshot {found.version}")
