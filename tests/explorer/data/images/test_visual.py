"""Runs that look at images, and their vectors: of the newest checkpoint, read once, and what E makes of a feature."""

import shutil

import numpy as np
import pytest
from safetensors.torch import load

from explorer.data.images import visual
from explorer.data.images.visual import ImageRuns, blocks_of, embed, vector_of
from explorer.errors import ExplorerError
from explorer.places import Places
from featurestore import FeatureStore, key_of_uri
from tests.explorer.world import PLAIN, UNKNOWN
from trainer.runs.checkpoint import read_state
from trainer.runs.folder import finished
from trainer.runs.saving import CheckpointPlace, state_bytes


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def places(world):
    return Places(store=str(world.store), runs=str(world.runs))


def test_only_runs_with_images_and_a_checkpoint_are_named(world, places, tmp_path):
    assert ImageRuns(places).names() == ["both", "both-longer"]
    assert ImageRuns(Places(store=str(world.store))).names() == []
    runs = tmp_path / "runs"
    shutil.copytree(world.runs / "both", runs / "begun", ignore=shutil.ignore_patterns("versions"))
    shutil.copytree(world.runs / "both", runs / "odd")
    (runs / "odd" / "config.yaml").write_text("[]")
    (runs / "file").touch()
    shutil.copytree(world.runs / "both", runs / "good <b>")
    assert ImageRuns(Places(store=str(world.store), runs=str(runs))).names() == ["good <b>"]
    config = (world.runs / "both" / "config.yaml").read_text()
    for name, images in (("ad", "ad"), ("behavior", "behavior")):  # those that see most come first
        shutil.copytree(world.runs / "both", runs / name)
        assert "images: both" in config
        (runs / name / "config.yaml").write_text(config.replace("images: both", f"images: {images}"))
    assert ImageRuns(Places(store=str(world.store), runs=str(runs))).names() == ["good <b>", "behavior", "ad"]


def test_the_vectors_are_what_e_makes_of_the_features(world, places):
    snapshot = FeatureStore.open(world.store).snapshot()
    vectors = ImageRuns(places).vectors("both", snapshot)
    keys_N = snapshot.keys()
    expected_NV = embed(places, "both", snapshot, snapshot.get(keys_N))
    for key, expected_V in zip(keys_N.tolist(), expected_NV, strict=True):
        np.testing.assert_allclose(vector_of(vectors, key), expected_V, rtol=1e-4, atol=1e-5)
    assert vector_of(vectors, key_of_uri(UNKNOWN)) is None
    assert sum(len(keys_K) for keys_K, _ in blocks_of(vectors)) == len(keys_N)


def test_the_run_is_read_once_until_it_has_another_checkpoint(world, places, monkeypatch, tmp_path):
    shutil.copytree(world.runs / "both", tmp_path / "runs" / "both")
    places = Places(store=places.store, runs=str(tmp_path / "runs"))
    calls, real = [], visual.visual_vectors
    monkeypatch.setattr(visual, "visual_vectors", lambda *args, **more: calls.append(args) or real(*args, **more))
    runs, store = ImageRuns(places), FeatureStore.open(world.store)
    first = runs.vectors("both", store.snapshot())
    assert runs.vectors("both", store.snapshot()) is first
    assert len(calls) == 1
    assert len(runs.vectors("both", store.snapshot(1)).keys_N) == 26
    run, place = tmp_path / "runs" / "both", CheckpointPlace(tmp_path / "runs" / "both")
    (newest,) = finished(run)
    state = read_state(newest)
    tensors = {name: load(newest.read_bytes(name)) for name in state.files}
    place.claim()
    assert runs.vectors("both", store.snapshot()) is first, "the checkpoint is the same"
    place.remove([newest])
    parts = {name: place.write(state.step, name, each) for name, each in tensors.items()}
    place.commit(state.step, parts, state_bytes(state, parts), 3, None)
    runs.vectors("both", store.snapshot())
    assert len(calls) == 3


def test_a_run_is_named_and_no_path(places, world):
    snapshot = FeatureStore.open(world.store).snapshot()
    for name in ("../runs/both", "both/../both", "..", "", "/etc"):
        with pytest.raises(ExplorerError, match="no run"):
            ImageRuns(places).vectors(name, snapshot)
    assert snapshot.get([key_of_uri(PLAIN[0])]).shape == (1, 576)
