"""Versions on a disk and on S3, and the choice among them: numbered and immutable; damage is refused by name; ID rows
are the trainer's."""

import json
import os
import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore import FeatureRows
from featurestore.errors import StorageError
from featurestore.problems import Problem as StoreProblem
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire as expire_snapshots
from serving.bundle import log
from serving.bundle.export import ExportOptions, export_model
from serving.bundle.files import find_damage
from serving.bundle.images import network_for, publish
from serving.bundle.log import BundleIdentity, expire, remove_leftovers
from serving.bundle.manifest import BUNDLES
from serving.bundle.open import Bundle, ModelVersion
from serving.errors import BrokenBundleError, BundleNotFoundError
from serving.problems import Problem
from tests.faulty import full_from
from tests.featurestore.storage.test_paths import files_below
from tests.raised import raises
from tests.serving.bundle.conftest import export, no_network, versions_there
from tests.serving.scoring.variants import Exported, Variants
from tests.trainer.conftest import Places
from tests.trainer.ids.exact_tables import vectors_of
from trainer.comm import SoloComm
from trainer.ids.exact import ExactTable
from trainer.runs.folder import finished
from trainer.runs.saved import open_trained


@pytest.fixture
def made(exported: Variants) -> Exported:
    return exported("plain")


@pytest.fixture
def exact(exported: Variants) -> Exported:
    """Of exact tables, which have files of their own."""
    return exported("exact")


@pytest.fixture
def url(made: Exported, tmp_path: Path) -> str:
    """A copy of a bundle with one version."""
    return str(shutil.copytree(made.url, tmp_path / "model"))


def open_bundle(url: str, tmp_path: Path, version: int | None = None) -> Bundle:
    return Bundle.open(url, version, cache_dir=tmp_path / "cache")


def id_rows(bundle: Bundle, table: str) -> np.ndarray:
    """Of ids with a row and of others."""
    return bundle.ids.gather(12, bundle.ids.find([table], np.arange(200), np.array([200]))[0])


KEYS = np.arange(995, 1_055)
"""Of images that have a vector, and of others."""


def test_exports_are_numbered_and_use_goes_back_and_forth(url: str, made: Exported, tmp_path: Path) -> None:
    storage, (newest,) = Storage(url), finished(made.run)
    assert export(url, made.run, use=False).version == 2
    assert (log.known_versions(storage), log.version_in_use(storage)) == ([1, 2], 1)
    manifest = export(url, made.run, checkpoint=newest.name)
    assert (manifest.version, manifest.checkpoint) == (3, newest.name)
    assert open_bundle(url, tmp_path).manifest == manifest
    first = open_bundle(url, tmp_path, 1)
    assert (first.manifest, first.identity) == (made.manifest, BundleIdentity(1, {"images": 1}))
    for version in (1, 3):
        log.use(storage, version)
        assert ModelVersion.open(url).manifest.version == version
    assert [each.version for each in log.choices(storage)] == [1, 3, 1, 3]


def test_a_model_without_a_choice_says_how_one_is_made(url: str) -> None:
    shutil.rmtree(f"{url}/use")
    with raises(BundleNotFoundError, Problem.NO_CHOICE, where=url, known="version 1"):
        ModelVersion.open(url)


def test_a_feature_store_is_no_place_for_a_model(made: Exported, tmp_path: Path) -> None:
    url = str(shutil.copytree(made.places.folder / "features", tmp_path / "features"))
    before = files_below(Path(url))
    for refused in (
        lambda: export(url, made.run),
        lambda: ModelVersion.open(url),
        lambda: ModelVersion.open(url, 1),
        lambda: log.use(Storage(url), 1),
    ):
        with raises(BundleNotFoundError, Problem.IS_STORE, where=url):
            refused()
    assert files_below(Path(url)) == before
    assert FeatureStore.open(url).snapshot().num_rows


def test_a_run_is_found_anywhere_and_no_model(made: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.run.parent)
    assert export(tmp_path / "model", Path(made.run.name)).run == str(made.run)
    with raises(BundleNotFoundError, Problem.IS_RUN, where=made.run):
        log.read_version(Storage(made.run))


def test_a_manifest_in_the_place_of_another_is_refused(url: str, tmp_path: Path) -> None:
    shutil.copy(Path(url, "log", f"{1:020}.json"), Path(url, "log", f"{2:020}.json"))
    with raises(BrokenBundleError, Problem.OTHER_MANIFEST, where=re.compile(r"2\.json$"), version=1):
        open_bundle(url, tmp_path, 2)


def test_no_vectors_and_another_store_of_them_are_refused(url: str, made: Exported, tmp_path: Path) -> None:
    vectors = Path(url, made.manifest.folder, "vectors", "images")
    shutil.rmtree(vectors)
    with raises(BrokenBundleError, StoreProblem.NO_STORE, where=vectors):
        open_bundle(url, tmp_path)
    other = export(tmp_path / "other", made.run)
    shutil.copytree(tmp_path / "other" / other.folder / "vectors" / "images", vectors)
    with raises(BrokenBundleError, Problem.OTHER_VECTORS, where=vectors):
        open_bundle(url, tmp_path)


def test_an_export_removes_what_killed_ones_left_a_day_before(url: str, made: Exported) -> None:
    """By the age of its files, however deep they are; what expiries remove is in test_expiry.py."""
    dead, young = (Path(url, BUNDLES, digit * 32) for digit in "de")
    for folder in (dead, young):
        (folder / "vectors" / "images").mkdir(parents=True)
        (folder / "vectors" / "images" / "store.json").write_bytes(b"half")
    os.utime(dead / "vectors" / "images" / "store.json", (0, 0))
    export(url, made.run)
    assert (dead.exists(), young.exists()) == (False, True)
    assert remove_leftovers(Storage(url), grace_s=-1) == [young.name]
    assert versions_there(url) == [1, 2]


def test_a_damaged_version_is_in_the_way_of_no_other(url: str, made: Exported, tmp_path: Path) -> None:
    path = Path(url, "log", f"{1:020}.json")
    path.write_bytes(path.read_bytes()[:-1])
    exported = export_model(url, ExportOptions(run=made.run), network=no_network)
    assert exported.manifest.version == 2
    assert any("1.json is damaged" in note for note in exported.notes)
    open_bundle(url, tmp_path).close()


def test_a_run_that_has_not_ended_is_told_and_metrics_may_be_nan(url: str, made: Exported, tmp_path: Path) -> None:
    run = shutil.copytree(made.run, tmp_path / "half")
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").unlink()
    for each, told in ((made.run, False), (run, True)):
        exported = export_model(url, ExportOptions(run=each), network=no_network)
        assert any("the run has not ended" in note for note in exported.notes) == told
        assert "auc" in exported.manifest.metrics and "step" not in exported.manifest.metrics
    (run / "report.json").write_text(json.dumps(report | {"metrics": {"auc": float("nan")}}))
    assert export(url, run).version == 4
    assert log.known_versions(Storage(url)) == [1, 2, 3, 4], "each is published once"
    assert log.read_version(Storage(url), 4).metrics == {"auc": None}


@pytest.mark.parametrize("size_bytes", [100, 500, 2_000, 4_000, 8_000])
def test_a_full_disk_publishes_nothing(url: str, made: Exported, tmp_path: Path, size_bytes: int) -> None:
    """Whichever file is the first that is too large."""
    with full_from(size_bytes), pytest.raises(StorageError, match="File too large"):
        export(url, made.run)
    assert log.known_versions(Storage(url)) == [1]
    open_bundle(url, tmp_path).close()


def test_open_vectors_outlive_their_files(url: str, tmp_path: Path) -> None:
    """They are expired, or all that is on the disk goes away: what is mapped stays."""
    bundle = open_bundle(url, tmp_path)
    rows, of_ids = bundle.vectors["images"].lookup(KEYS)[0], id_rows(bundle, "item")
    store = FeatureStore.open(bundle.vectors_url(bundle.manifest.vectors[0]))
    store.delete(KEYS)
    compact(store, force=True)
    expire_snapshots(store, keep_last=1, keep_days=0, grace_days=0)
    np.testing.assert_array_equal(bundle.vectors["images"].lookup(KEYS)[0], rows)
    shutil.rmtree(url)
    shutil.rmtree(tmp_path / "cache")
    np.testing.assert_array_equal(bundle.vectors["images"].lookup(KEYS)[0], rows)
    np.testing.assert_array_equal(id_rows(bundle, "item"), of_ids)
    bundle.close()


def test_newer_vectors_are_opened_beside(url: str, tmp_path: Path) -> None:
    bundle = open_bundle(url, tmp_path)
    FeatureStore.open(bundle.vectors_url(bundle.manifest.vectors[0])).delete([1_000])
    newer = bundle.with_vectors()
    assert BundleIdentity.newest(url) == newer.identity == BundleIdentity(1, {"images": 2})
    assert Bundle.open(url, vectors={"images": 1}, cache_dir=tmp_path / "cache").identity == bundle.identity
    assert newer.vectors["images"].time_s > bundle.vectors["images"].time_s
    assert newer.ids is bundle.ids
    assert not bundle.vectors["images"].lookup(np.array([1_000, 1_001]))[1].any()
    bundle.close()
    assert newer.vectors["images"].lookup(np.array([1_000, 1_001]))[1].tolist() == [True, False]
    newer.close()


def test_published_opened_and_brought_up_to_date(exact: Exported, s3_url: str, tmp_path: Path) -> None:
    features = shutil.copytree(exact.places.folder / "features", tmp_path / "features")
    url = f"{s3_url}/models/ctr"
    first = export(url, exact.run)
    second = export(url, exact.run, use=False)
    assert (first.version, second.version, log.version_in_use(Storage(url))) == (1, 2, 1)
    here, there = Bundle.open(exact.url, cache_dir=tmp_path), Bundle.open(url, cache_dir=tmp_path / "cache")
    for table in here.manifest.tables:
        np.testing.assert_array_equal(*(id_rows(bundle, table.name) for bundle in (here, there)))
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


def test_old_versions_go_and_what_is_damaged_is_found(exact: Exported, s3_url: str) -> None:
    url = f"{s3_url}/ctr"
    first, _ = export(url, exact.run), export(url, exact.run)
    storage = Storage(url)
    sample = f"{first.folder}/sample.parquet"
    storage.write_bytes(sample, storage.read_bytes(sample)[:-1] + b"x")
    assert find_damage(storage, first) == []
    with raises(BrokenBundleError, Problem.OTHER_DIGEST, where=storage.full(sample)):
        Bundle.open(url, 1).files.path("sample.parquet")
    storage.delete(sample)
    with raises(BrokenBundleError, Problem.MISSING, where=storage.full(sample)):
        Bundle.open(url, 1).files.path("sample.parquet")
    report = expire(storage, keep_last=1, keep_days=0, grace_days=0)
    assert (report.kept, report.expired) == ((2,), (1,))
    assert report.num_bytes > sum(file.bytes for file in first.files)
    assert storage.entries(first.folder) == []
    assert find_damage(storage, log.read_version(storage)) == []


def test_a_copy_is_fetched_once_and_again_where_it_is_damaged(exact: Exported, s3_url: str, tmp_path: Path) -> None:
    url = f"{s3_url}/ctr"
    manifest = export(url, exact.run)
    Bundle.open(url, cache_dir=tmp_path).close()
    copy = tmp_path / manifest.bundle_id / "ids-12.bin"
    data, fetched = copy.read_bytes(), copy.stat().st_mtime_ns
    Bundle.open(url, cache_dir=tmp_path).close()
    assert copy.stat().st_mtime_ns == fetched
    copy.write_bytes(data[:-1] + b"x")
    Bundle.open(url, cache_dir=tmp_path).close()
    assert copy.read_bytes() == data
    assert [path.name for path in copy.parent.iterdir() if path.name.startswith(".tmp")] == []


def test_copies_of_versions_that_nobody_opens_go(exact: Exported, s3_url: str, tmp_path: Path) -> None:
    url = f"{s3_url}/ctr"
    first, second = export(url, exact.run), export(url, exact.run)
    Bundle.open(url, 1, cache_dir=tmp_path).close()
    os.utime(tmp_path / first.bundle_id, (0, 0))
    (tmp_path / "another").mkdir()
    os.utime(tmp_path / "another", (0, 0))
    Bundle.open(url, 2, cache_dir=tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == {second.bundle_id, "vectors", "another"}
    assert (tmp_path / second.bundle_id).stat().st_mode & 0o077 == 0
    Bundle.open(url, 1, cache_dir=tmp_path).close()


IDS = np.r_[np.arange(-5, 70), 1_000:1_060, 2**62]
OTHERS = ("lr", "images_none", "inputs", "exact")
"""E in float64, another optimiser of rows, many tables, and exact ones."""


def trained_ids(places: Places, bundle: Bundle) -> dict[str, np.ndarray]:
    """The ids that training samples have of each hashed table that is not of texts."""
    files = sorted((places.folder / "samples" / "train").glob("*.parquet"))
    samples = pa.concat_tables([pq.read_table(file) for file in files])
    found: dict[str, list[np.ndarray]] = {}
    for field in bundle.fields:
        if field.is_id and not field.is_bucketed and not field.columns:
            column: Any = samples[field.column_name].combine_chunks()
            while not pa.types.is_integer(column.type) and not pa.types.is_string(column.type):
                column = column.flatten()
            if pa.types.is_integer(column.type):
                found.setdefault(field.table_name, []).append(column.to_numpy())
    return {name: np.unique(np.concatenate(values)) for name, values in found.items()}


@pytest.mark.parametrize("name", ["plain", *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_id_rows_are_the_trainers_and_known_where_it_has_touched_them(exported: Variants, name: str) -> None:
    """Of each table alone, and of all of them at once."""
    made, every = exported(name), {}
    with closing(open_trained(made.run, SoloComm())) as trained, closing(Bundle.open(made.url)) as bundle:
        assert {each.name for each in bundle.manifest.tables} == set(trained.engine.tables)
        for of, table in trained.engine.tables.items():
            ids = np.arange(table.shape.num_rows) if table.shape.direct else IDS[len(every) :]
            request = table.serve(ids, "eval")
            wanted = vectors_of(table, request).detach().numpy()[request.inverse_R]
            rows, known = bundle.ids.find([of], ids, np.array([len(ids)]))
            found = bundle.ids.gather(table.shape.width, rows)
            assert found.dtype == np.float32 and len(np.unique(found, axis=0)) > 2
            np.testing.assert_array_equal(found, wanted.astype(np.float32))
            every[of] = ids, rows, known
        ids, *alone = map(np.concatenate, zip(*every.values(), strict=True))
        together = bundle.ids.find([*every], ids, np.array([len(each) for each, *_ in every.values()]))
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one, other)

        for of, ids_in_training in trained_ids(made.places, bundle).items():
            table = trained.engine.tables[of]
            rows, known = bundle.ids.find([of], IDS, np.array([len(IDS)]))
            if isinstance(table, ExactTable):
                own = np.concatenate([table.map.ids_of(slot) for slot in range(len(table.shards))])
                np.testing.assert_array_equal(known, np.isin(IDS, own))
                continue
            touched = np.isin(rows, bundle.ids.find([of], ids_in_training, np.array([len(ids_in_training)]))[0])
            assert 0 < touched.sum() < len(IDS)
            if trained.config.optim.ids == "adam":
                np.testing.assert_array_equal(known, touched)
            else:  # a row whose gradients were all zero, as they often are with few small layers
                assert not known[~touched].any()
                assert known.sum() > 0.4 * touched.sum()
