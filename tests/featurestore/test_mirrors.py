"""A store whose rows are made of another store's says of which snapshot, in each of its manifests."""

import json
from pathlib import Path

import numpy as np
import pytest

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo
from featurestore.errors import AnotherStoreError, CommitConflictError
from featurestore.log import manifest_path
from featurestore.snapshot import SnapshotId
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.history import restore

EXTRACTOR = ExtractorSpec(backbone="b", layer="l", weights_digest="0", preprocessing="n", compute_dtype="float32")


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore.create(
        tmp_path / "vectors", StoreInfo(num_shards=2, dim=3, dtype="float32", extractor=EXTRACTOR)
    )


@pytest.fixture
def source(tmp_path: Path) -> FeatureStore:
    source = FeatureStore.create(tmp_path / "features", StoreInfo(num_shards=2, dim=8, extractor=EXTRACTOR))
    source.put(rows("a", 8))
    source.put(rows("b", 8))
    return source


def rows(uri: str, dim: int = 3) -> FeatureRows:
    return FeatureRows.of([uri], np.ones((1, dim), np.float32))


def mirrored(source: FeatureStore, version: int) -> SnapshotId:
    return SnapshotId.of(source.snapshot(version))


def test_a_commit_says_it_and_later_ones_keep_it(store: FeatureStore, source: FeatureStore) -> None:
    one, two = mirrored(source, 1), mirrored(source, 2)
    assert store.put(rows("x")).manifest.mirrors is None
    made = store.commit(store.write(rows("y")), "publish", mirrors=one.as_source())
    assert made.manifest.mirrors == one.as_source()
    assert SnapshotId.of_source(store.snapshot().manifest.mirrors) == one  # type: ignore[arg-type]
    assert store.delete([1]).manifest.mirrors == one.as_source()
    compact(store, force=True)
    assert store.snapshot().manifest.mirrors == one.as_source()
    assert store.commit({}, "publish", mirrors=two.as_source()).manifest.mirrors == two.as_source()
    assert restore(store, 2).manifest.mirrors == one.as_source(), "what the old snapshot mirrored"
    assert restore(store, 1).manifest.mirrors is None


def test_manifests_of_other_stores_do_not_have_the_field(store: FeatureStore, source: FeatureStore) -> None:
    store.put(rows("x"))
    store.commit({}, "publish", mirrors=mirrored(source, 1).as_source())
    without, with_it = (json.loads(store.storage.read_bytes(manifest_path(version))) for version in (1, 2))
    assert "mirrors" not in without
    assert list(with_it)[-2:] == ["mirrors", "digest"]
    assert with_it["mirrors"] == mirrored(source, 1).as_source().model_dump()


def test_a_commit_may_ask_to_follow_one_snapshot_alone(store: FeatureStore) -> None:
    store.put(rows("x"))
    written = store.write(rows("y"))
    store.put(rows("z"))
    with pytest.raises(CommitConflictError, match="has snapshot 2, and not 1"):
        store.commit(written, "publish", only_after=1)
    assert store.commit(written, "publish", only_after=2).num_rows == 3


def test_another_store_is_told_by_what_is_kept(store: FeatureStore, source: FeatureStore, tmp_path: Path) -> None:
    kept = SnapshotId.of_source(mirrored(source, 1).as_source())
    kept.check(SnapshotId.of(source.snapshot()), "it", "")
    other = FeatureStore.create(tmp_path / "other", source.info)
    other.put(rows("a", 8))
    with pytest.raises(AnotherStoreError):
        kept.check(SnapshotId.of(other.snapshot()), "it", "")
