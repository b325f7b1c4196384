"""Damages to a store, images to take down, and what is left in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from featurestore import FeaturePartition, FeatureStore, Snapshot
from featurestore.log import EXPIRED, manifest_path
from featurestore.spec import FileEntry
from featurestore.storage.storage import Storage
from featurestore.upkeep.purge import Images
from featurestore.upkeep.verify import verify
from tests.featurestore.shardrows import read_shard

SHARD = 3
GONE = ["images/3.jpg", "images/17.jpg"]
IMAGES = Images.of_uris(GONE)


def files_of(store: FeatureStore, shard: int = SHARD) -> tuple[FileEntry, ...]:
    return store.snapshot().manifest.files(shard)


def needs(snapshot: Snapshot) -> set[str]:
    """Paths of the files that a snapshot names."""
    entries = snapshot.manifest.entries
    return {path for entry in entries for path in (entry.path, entry.statistics_path) if path}


def spoil(store: FeatureStore, path: str, place: int | None = None) -> None:
    file = Path(store.url) / path
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    file.write_bytes(data)


def everything(store: FeatureStore, version: int | None = None) -> dict[int, bytes]:
    """Features by key."""
    snapshot = store.snapshot(version)
    rows = [read_shard(snapshot, shard) for shard in range(store.info.num_shards)]
    return {int(key): row.tobytes() for each in rows for key, row in zip(each.keys_N, each.features_ND, strict=True)}


def contents(store: FeatureStore, version: int | str | None = None) -> dict[str, bytes]:
    """Features by uri."""
    snapshot = store.snapshot(version)
    rows = [read_shard(snapshot, shard) for shard in range(store.info.num_shards)]
    return {uri: each.features_ND[n].tobytes() for each in rows for n, uri in enumerate(each.uris)}


def without(before: dict[str, bytes]) -> dict[str, bytes]:
    return {uri: feature for uri, feature in before.items() if uri not in GONE}


def check_whole(store: FeatureStore, tmp_path: Path) -> None:
    """Nothing to complain of, and a partition serves exactly the snapshot."""
    assert verify(store).problems == []
    held = everything(store)
    with FeaturePartition.load(store, cache_dir=tmp_path / "cache") as partition:
        assert partition.num_rows == len(held)
        found = partition.lookup(np.array(list(held), np.int64)).features_UD
    assert [row.tobytes() for row in found] == list(held.values())


def leave_in_expired(store: FeatureStore, damaged: list[int], aside: list[int]) -> None:
    """Damage manifests, and move others to expired/, as an expiry does."""
    for version in aside:
        store.storage.write_bytes(manifest_path(version, EXPIRED), store.storage.read_bytes(manifest_path(version)))
        if version not in damaged:
            store.storage.delete(manifest_path(version))
    for version in damaged:
        spoil(store, manifest_path(version))


@contextmanager
def days_later(days: float) -> Iterator[None]:
    """As if all that is in a store were older by that."""
    now = Storage.now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "now", lambda storage: now(storage) + days * 86_400)
        yield
