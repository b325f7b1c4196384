"""Visual vectors of all images: E's own, computed once for each checkpoint and snapshot, whole or not there."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from explorer.data.vectors import VisualVectors, visual_vectors
from featurestore import FeatureRows, FeatureStore
from tests.trainer.conftest import Places, make_places
from trainer.comm import SoloComm
from trainer.config import load_config
from trainer.errors import ConfigError
from trainer.main import train
from trainer.runs import export
from trainer.runs.export import VECTOR, open_network


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    places = make_places(tmp_path_factory.mktemp("places"))
    for name, images in (("both", "both"), ("none", "none")):
        config = load_config(settings=places.settings(run__name=name, train__max_steps=2, model__images=images))
        train(config, SoloComm())
    return places


@pytest.fixture
def run(places: Places) -> Path:
    return places.folder / "runs" / "both"


def by_key(found: VisualVectors) -> dict[int, list[float]]:
    return dict(zip(found.keys_N.tolist(), found.vectors_NV.tolist(), strict=True))


def test_they_are_what_the_export_has_and_are_computed_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    found = visual_vectors(run, cache=tmp_path, progress=lambda done, total: seen.append((done, total)))
    expected, uris = {}, {}
    for table in open_network(run).tables():
        expected |= dict(zip(table["key"].to_pylist(), table[VECTOR].to_pylist(), strict=True))
        uris |= dict(zip(table["key"].to_pylist(), table["uri"].to_pylist(), strict=True))
    assert by_key(found) == expected
    assert seen[-1] == (len(expected), len(expected))
    assert {int(key): found.uri(row) for row, key in enumerate(found.keys_N)} == uris
    key = int(found.keys_N[3])
    assert found.row_of(key) == 3
    assert found.row_of(-1) is None
    assert isinstance(found.vectors_NV, np.memmap)

    monkeypatch.setattr(export.ImageNetwork, "tables", None)  # nothing is computed again
    again = visual_vectors(run, cache=tmp_path)
    assert by_key(again) == expected
    assert again.about == found.about


def test_another_snapshot_or_store_has_its_own(places: Places, run: Path, tmp_path: Path) -> None:
    before = visual_vectors(run, cache=tmp_path)
    moved = tmp_path / "moved"
    shutil.copytree(places.folder / "features", moved)
    store = FeatureStore.open(moved)
    dim = store.snapshot().info.dim
    store.put(FeatureRows.of(["new"], np.ones((1, dim), np.float32), keys=np.array([77])))
    after = visual_vectors(run, store=str(moved), cache=tmp_path)
    assert set(by_key(after)) == {*by_key(before), 77}
    assert after.digest != before.digest
    assert (after.about["snapshot"], before.about["snapshot"]) == (2, 1)


def test_a_computation_that_fails_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = export.ImageNetwork.tables

    def broken(network: export.ImageNetwork) -> object:
        yield next(tables(network)).slice(0, 1)
        raise OSError("disk")

    monkeypatch.setattr(export.ImageNetwork, "tables", broken)
    with pytest.raises(OSError, match="disk"):
        visual_vectors(run, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_without_images_says_so(places: Places, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no E for images"):
        visual_vectors(places.folder / "runs" / "none", cache=tmp_path)
