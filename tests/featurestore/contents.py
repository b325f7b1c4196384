"""What a store holds, damages to it, images to take down, and commands of a store."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import Result

from featurestore import FeaturePartition, FeatureStore, Snapshot, StoreInfo
from featurestore.__main__ import app
from featurestore.format import datafile
from featurestore.log import EXPIRED, manifest_path
from featurestore.spec import FileEntry
from featurestore.storage.storage import Storage
from featurestore.upkeep.purge import Images
from featurestore.upkeep.verify import verify
from tests.cli import invoke

SHARD = 3
GONE = ["images/3.jpg", "images/17.jpg"]
IMAGES = Images.of_uris(GONE)


def run(*arguments: object, code: int | None = None) -> Result:
    """A command of a store; it has to end with `code`, where one is given."""
    return invoke(app, *arguments, code=code)


def metadata_of(snapshot: Snapshot) -> pa.Table:
    """Read key, uri, content_digest, source_tag, width and height of all live rows, by key."""
    return snapshot.to_arrow(datafile.METADATA_COLUMNS).sort_by("key")


def rows_of(table: pa.Table, info: StoreInfo) -> datafile.FeatureRows:
    """Return the rows of a table that has every column."""
    return datafile.FeatureRows(
        keys_N=datafile.numpy_column(table, datafile.KEY),
        uris=datafile.text_column(table, datafile.URI),
        features_ND=datafile.matrix_of(table, info),
        content_digest_N=datafile.digest_column(table),
        source_tag=datafile.text_column(table, "source_tag"),
        width_N=datafile.numpy_column(table, "width"),
        height_N=datafile.numpy_column(table, "height"),
        deleted_N=datafile.numpy_column(table, datafile.DELETED),
    )


def everything(store: FeatureStore, version: int | str | None = None, by: str = "key") -> dict[Any, bytes]:
    """Features by key, or by uri."""
    table = store.snapshot(version).to_arrow([by, "feature"], decode=False)
    return dict(zip(table[by].to_pylist(), table["feature"].to_pylist(), strict=True))


def contents(store: FeatureStore, version: int | str | None = None) -> dict[str, bytes]:
    """Features by uri."""
    return everything(store, version, "uri")


def without(before: dict[str, bytes]) -> dict[str, bytes]:
    return {uri: feature for uri, feature in before.items() if uri not in GONE}


def files_of(store: FeatureStore, shard: int = SHARD) -> tuple[FileEntry, ...]:
    return store.snapshot().manifest.files(shard)


def needs(snapshot: Snapshot) -> set[str]:
    """Paths of the files that a snapshot names."""
    entries = snapshot.manifest.entries
    return {path for entry in entries for path in (entry.path, entry.statistics_path) if path}


def paths_in(store: FeatureStore, folder: str = "") -> set[str]:
    """Paths of the files that there are."""
    return {entry.path for entry in store.storage.entries(folder)}


def check_whole(store: FeatureStore, tmp_path: Path) -> None:
    """Nothing to complain of, and a partition serves exactly the snapshot."""
    assert verify(store).problems == []
    held = everything(store)
    with FeaturePartition.load(store, cache_dir=tmp_path / "cache") as partition:
        assert partition.num_rows == len(held)
        found = partition.lookup(np.array(list(held), np.int64)).features_UD
    assert [row.tobytes() for row in found] == list(held.values())


def flip(file: Path, place: int | None = None) -> None:
    """Flip a bit of a file, at a place or in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    file.write_bytes(data)


def spoil(store: FeatureStore, path: str, place: int | None = None) -> None:
    flip(Path(store.url) / path, place)


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
