"""A bundle on an object store: published, opened through a local copy, its vectors brought up to date."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from featurestore import FeatureRows, FeatureStore
from featurestore.storage.storage import Storage
from serving.bundle import log
from serving.bundle.files import find_damage
from serving.bundle.images import network_for, publish
from serving.bundle.log import BundleIdentity, expire, remove_leftovers
from serving.bundle.open import Bundle
from serving.errors import BrokenBundleError
from tests.serving.bundle.conftest import export
from tests.serving.scoring.variants import Exported, Variants

IDS, KEYS = np.arange(200), np.arange(995, 1_055)


@pytest.fixture
def made(exported: Variants) -> Exported:
    return exported("exact")


def test_published_opened_and_brought_up_to_date(made: Exported, s3_url: str, tmp_path: Path) -> None:
    features = tmp_path / "features"
    shutil.copytree(made.places.folder / "features", features)
    url = f"{s3_url}/models/ctr"
    first = export(url, made.run)
    second = export(url, made.run, use=False)
    assert (first.version, second.version, log.version_in_use(Storage(url))) == (1, 2, 1)
    here, there = Bundle.open(made.url, cache_dir=tmp_path), Bundle.open(url, cache_dir=tmp_path / "cache")
    for table in here.manifest.tables:
        found = [
            bundle.ids.gather(12, bundle.ids.find([table.name], IDS, np.array([len(IDS)]))[0])
            for bundle in (here, there)
        ]
        np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(*(bundle.vectors["images"].lookup(KEYS)[0] for bundle in (here, there)))

    FeatureStore.open(features).put(FeatureRows.of(["new"], np.ones((1, 16), np.float32), keys=np.array([1_050])))
    (of,) = there.manifest.vectors
    vectors = FeatureStore.open(there.vectors_url(of))
    report = publish(vectors, of, network_for(there, of), source_url=str(features))
    assert (report.added, report.snapshot) == (1, 2)
    assert BundleIdentity.newest(url) == BundleIdentity(1, {"images": 2})
    newer = there.with_vectors()
    assert not newer.vectors["images"].lookup(np.array([1_050]))[1].any()
    assert remove_leftovers(Storage(url), grace_s=-1) == []


def test_old_versions_go_and_what_is_damaged_is_found(made: Exported, s3_url: str) -> None:
    url = f"{s3_url}/ctr"
    first, _ = export(url, made.run), export(url, made.run)
    storage = Storage(url)
    sample = f"{first.folder}/sample.parquet"
    storage.write_bytes(sample, storage.read_bytes(sample)[:-1] + b"x")
    assert find_damage(storage, first) == []
    with pytest.raises(BrokenBundleError, match=rf"{storage.full(sample)} is damaged: its sha256 is not the one"):
        Bundle.open(url, 1).files.path("sample.parquet")
    storage.delete(sample)
    with pytest.raises(BrokenBundleError, match=r"sample\.parquet is missing"):
        Bundle.open(url, 1).files.path("sample.parquet")
    report = expire(storage, keep_last=1, keep_days=0, grace_days=0)
    assert (report.kept, report.expired) == ((2,), (1,))
    assert report.num_bytes > sum(file.bytes for file in first.files)
    assert storage.entries(first.folder) == []
    assert find_damage(storage, log.read_version(storage)) == []


def test_a_copy_is_fetched_once_and_again_where_it_is_damaged(made: Exported, s3_url: str, tmp_path: Path) -> None:
    url = f"{s3_url}/ctr"
    manifest = export(url, made.run)
    Bundle.open(url, cache_dir=tmp_path).close()
    copy = tmp_path / manifest.bundle_id / "ids-12.bin"
    data, fetched = copy.read_bytes(), copy.stat().st_mtime_ns
    Bundle.open(url, cache_dir=tmp_path).close()
    assert copy.stat().st_mtime_ns == fetched
    copy.write_bytes(data[:-1] + b"x")
    Bundle.open(url, cache_dir=tmp_path).close()
    assert copy.read_bytes() == data
    assert [path.name for path in copy.parent.iterdir() if path.name.startswith(".tmp")] == []


def test_copies_of_versions_that_nobody_opens_go(made: Exported, s3_url: str, tmp_path: Path) -> None:
    url = f"{s3_url}/ctr"
    first, second = export(url, made.run), export(url, made.run)
    Bundle.open(url, 1, cache_dir=tmp_path).close()
    os.utime(tmp_path / first.bundle_id, (0, 0))
    (tmp_path / "another").mkdir()
    os.utime(tmp_path / "another", (0, 0))
    Bundle.open(url, 2, cache_dir=tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == {second.bundle_id, "vectors", "another"}
    assert (tmp_path / second.bundle_id).stat().st_mode & 0o077 == 0
    Bundle.open(url, 1, cache_dir=tmp_path).close()
