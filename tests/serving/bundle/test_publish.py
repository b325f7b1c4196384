"""A delta publish: what is new and changed, and nothing else; nothing the second time; what is gone goes."""

import re
import shutil
from contextlib import closing
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from featurestore import FeatureRows, FeatureStore
from featurestore.errors import AnotherStoreError
from featurestore.format import shard
from featurestore.problems import Problem as StoreProblem
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.expiry import expire
from featurestore.upkeep.history import restore
from serving.bundle import images
from serving.bundle.images import ChangedImages, PublishReport, network_for, publish
from serving.bundle.open import Bundle
from tests.raised import raises
from tests.serving.scoring.variants import Exported, Variants
from trainer.comm import SoloComm
from trainer.runs.saved import open_trained

ALL = np.arange(995, 1_100)


class World:
    """A bundle and its feature store, both this test's own."""

    def __init__(self, made: Exported, folder: Path) -> None:
        self.run = made.run
        self.url, self.features = str(folder / "model"), str(folder / "features")
        shutil.copytree(made.url, self.url)
        shutil.copytree(made.places.folder / "features", self.features)
        self.source = FeatureStore.open(self.features)
        self.cache = folder / "cache"
        self._random = np.random.default_rng(1)

    @property
    def vectors(self) -> FeatureStore:
        with closing(self.open()) as bundle:
            return FeatureStore.open(bundle.vectors_url(bundle.manifest.vectors[0]))

    def open(self) -> Bundle:
        return Bundle.open(self.url, cache_dir=self.cache)

    def publish(self, **options: object) -> PublishReport:
        with closing(self.open()) as bundle:
            (of,) = bundle.manifest.vectors
            network, source = network_for(bundle, of), {"source_url": self.features, **options}
            return publish(FeatureStore.open(bundle.vectors_url(of)), of, network, **source)

    def put(self, *keys: int, noise: float | None = None) -> None:
        """New features of images, or the old ones with a little noise."""
        features = self._random.normal(size=(len(keys), 16)).astype(np.float32)
        if noise is not None:
            features = self.source.snapshot().get(keys) + np.float32(noise) * features
        self.source.put(FeatureRows.of([f"item/{key - 1_000}" for key in keys], features, keys=np.array(keys)))

    def check(self) -> None:
        """The vectors are those that the run's own E makes of the newest features, and no others are there."""
        snapshot = self.source.snapshot()
        keys = snapshot.keys()
        with closing(open_trained(self.run, SoloComm())) as trained, closing(self.open()) as bundle, torch.no_grad():
            table = bundle.vectors["images"]
            rows, missing = table.lookup(ALL)
            np.testing.assert_array_equal(ALL[~missing], keys[np.isin(keys, ALL)])
            assert table._partition.num_rows == len(keys)
            wanted = trained.engine.services["images"].model(torch.from_numpy(snapshot.get(ALL[~missing])))
        np.testing.assert_allclose(rows[~missing], wanted, rtol=1e-6, atol=1e-6)


@pytest.fixture
def world(exported: Variants, tmp_path: Path) -> World:
    return World(exported("plain"), tmp_path)


def counts(report: PublishReport) -> tuple[int, int, int, int]:
    return report.added, report.changed, report.removed, report.stayed


def test_new_changed_and_removed_images_in_one_commit(world: World) -> None:
    """And nothing the second time."""
    world.check()
    world.put(1_050, 1_051, 1_007)
    world.source.delete([1_010, 1_045])
    report = world.publish()
    assert counts(report) == (2, 1, 1, 0)
    assert (report.mirrored, report.source, report.snapshot, report.committed) == (2, 4, 2, True)
    report = world.publish()
    assert (report.committed, report.snapshot, counts(report), report.num_bytes) == (False, 2, (0, 0, 0, 0), 0)
    world.check()
    manifest = world.vectors.snapshot().manifest
    assert (manifest.operation, manifest.version) == ("publish", 2)
    assert manifest.mirrors.version == 4


def test_only_what_differs_is_looked_at(world: World) -> None:
    """Features of two files, and E on two images; the newer feature of one that changed twice."""
    world.put(1_050, 1_007)
    world.put(1_007)
    with (
        mock.patch.object(images, "visual_vectors", wraps=images.visual_vectors) as looked,
        mock.patch.object(shard, "_rows_of_groups", wraps=shard._rows_of_groups) as opened,
    ):
        world.publish()
    assert [len(call.args[1]) for call in looked.call_args_list] == [2]
    read = {call.args[0].path for call in opened.call_args_list}
    manifests = [world.source.snapshot(version).manifest for version in (2, 4)]
    full = world.source.storage.full
    old, new = ({full(entry.path) for entry in manifest.entries} for manifest in manifests)
    assert read & (old | new) <= new - old
    assert read & new
    world.check()


def test_what_e_computes_again_stays_and_all_else_is_published(world: World) -> None:
    """Also what moved by little: no vector drifts away from what the newest features give."""
    for noise, expected in ((1e-4, (0, 10, 0, 0)), (0.0, (0, 0, 0, 10))):
        world.put(*range(1_020, 1_030), noise=noise)
        assert counts(world.publish()) == expected
        world.check()


def test_a_commit_without_rows_says_where_the_next_one_begins(world: World) -> None:
    compact(world.source, force=True)
    report = world.publish()
    assert (report.committed, report.num_bytes) == (True, 0)
    assert counts(report) == (0, 0, 0, 10)  # of the one shard whose files were merged
    assert world.publish().committed is False
    world.check()


def test_all_images_are_looked_at_where_the_snapshot_has_expired(world: World) -> None:
    world.put(1_050, 1_007)
    world.source.delete([1_010])
    expire(world.source, keep_last=1, keep_days=0, grace_days=0)
    report = world.publish()
    assert report.mirrored is None
    assert counts(report) == (1, 1, 1, 46)
    world.check()


def test_all_images_are_looked_at_after_a_backup_went_another_way(world: World, tmp_path: Path) -> None:
    """The number of the snapshot is there again, and stands for another commit."""
    shutil.copytree(world.features, tmp_path / "backup")
    world.put(1_050, 1_007)
    assert world.publish().source == 3
    shutil.rmtree(world.features)
    shutil.copytree(tmp_path / "backup", world.features)
    world.put(1_051)
    world.put(1_008)
    report = world.publish()
    assert (report.mirrored, report.source) == (None, 4)
    assert counts(report) == (1, 2, 1, 46)
    world.check()


def test_a_restore_of_the_features_is_followed(world: World) -> None:
    world.put(1_050, 1_007)
    world.publish()
    restore(world.source, 2)
    assert counts(world.publish()) == (0, 1, 1, 0)
    world.check()


def test_an_image_whose_uri_changes_keeps_the_one_that_it_had(world: World) -> None:
    world.source.delete([1_020])
    world.source.put(FeatureRows.of(["another"], np.ones((1, 16), np.float32), keys=np.array([1_020])))
    assert counts(world.publish()) == (0, 1, 0, 0)
    world.check()


@pytest.mark.parametrize("changes", [{}, {"num_shards": 8}], ids=["same kind", "other kind"])
def test_another_store_is_refused(world: World, tmp_path: Path, changes: dict[str, int]) -> None:
    other = FeatureStore.create(tmp_path / "other", world.source.info.model_copy(update=changes))
    other.put(FeatureRows.of(["item/0"], np.ones((1, 16), np.float32), keys=np.array([1_000])))
    where, of = re.compile("^the vectors store "), re.compile("^snapshot 2 ")
    with raises(AnotherStoreError, StoreProblem.ANOTHER_STORE, where=where, value=of):
        world.publish(source_url=other.url)
    assert world.vectors.snapshot().version == 1


def test_two_publishes_at_once_make_what_one_makes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another publish commits between this one's reading and its commit; features have changed once more by then."""
    world.put(1_050)
    found = ChangedImages.of_shard
    first = True

    def overtaken(changes: ChangedImages, shard: int) -> object:
        nonlocal first
        result = found(changes, shard)
        if first:
            first = False
            world.put(1_050, 1_051)
            assert counts(world.publish()) == (2, 0, 0, 0)
        return result

    monkeypatch.setattr(ChangedImages, "of_shard", overtaken)
    report = world.publish()
    assert (report.committed, report.snapshot) == (False, 2)
    world.check()
