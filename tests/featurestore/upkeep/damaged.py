"""Damages to a store, what is left in it, and repairs that are killed."""

from pathlib import Path

import numpy as np

from featurestore import FeaturePartition, FeatureStore
from featurestore.spec import FileEntry
from featurestore.upkeep.repair import repair
from featurestore.upkeep.verify import verify
from tests.faulty import Fault, faulty

SHARD = 3


def files_of(store: FeatureStore, shard: int = SHARD) -> tuple[FileEntry, ...]:
    return store.snapshot().manifest.files(shard)


def spoil(store: FeatureStore, path: str, place: int | None = None) -> None:
    file = Path(store.url) / path
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    file.write_bytes(data)


def everything(store: FeatureStore, version: int | None = None) -> dict[int, bytes]:
    """Features by key."""
    snapshot = store.snapshot(version)
    rows = [snapshot.read_shard(shard) for shard in range(8)]
    return {int(key): row.tobytes() for each in rows for key, row in zip(each.keys_N, each.features_ND, strict=True)}


def check_whole(store: FeatureStore, tmp_path: Path) -> None:
    """Nothing to complain of, and a partition serves exactly the snapshot."""
    assert verify(store).problems == []
    held = everything(store)
    with FeaturePartition.load(store, cache_dir=tmp_path / "cache") as partition:
        assert partition.num_rows == len(held)
        found = partition.lookup(np.array(list(held), np.int64)).features_UD
    assert [row.tobytes() for row in found] == list(held.values())


class Killed(BaseException):
    """As good as a kill: nothing in between catches it."""


def repair_until(store: FeatureStore, num_writes: int) -> bool:
    """Repair a store, killed before a write; whether it came to its end first."""
    writes = iter(range(num_writes))

    def mortal(write: Fault, *arguments: object) -> object:
        if next(writes, None) is None:
            raise Killed
        return write(*arguments)

    names = ("write_bytes", "create_exclusive", "open_output", "delete_files")
    try:
        repair(faulty(store, **dict.fromkeys(names, mortal)))
    except Killed:
        return False
    return True
