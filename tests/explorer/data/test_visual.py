"""Visual vectors: E's own, of the newest checkpoint, computed once for each snapshot, whole or not there."""

import shutil

import pyarrow as pa
import pytest
from safetensors.torch import load

from explorer.data import visual
from explorer.data.background import Background
from explorer.data.visual import begin_vectors, image_runs, visual_vectors
from explorer.places import Places
from featurestore import FeatureStore, key_of_uri
from tests.explorer.world import UNKNOWN
from trainer.runs import saved as export
from trainer.runs.checkpoint import read_state
from trainer.runs.folder import finished
from trainer.runs.saved import VECTOR, open_network
from trainer.runs.saving import CheckpointPlace, state_bytes


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def by_key(table, column="vector"):
    return dict(zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True))


def test_they_are_what_the_export_has_and_are_computed_once(world, monkeypatch):
    seen = []
    found = visual_vectors(world.runs / "both", progress=lambda done, total: seen.append((done, total)))
    exported = pa.concat_tables(open_network(world.runs / "both").tables())
    expected = by_key(exported, VECTOR)
    assert by_key(found.table) == expected
    assert seen[-1] == (len(expected), len(expected))
    assert by_key(found.table, "uri") == by_key(exported, "uri")
    before = pa.total_allocated_bytes()
    blocks = [dict(zip(keys_K.tolist(), vectors_KV.tolist(), strict=True)) for keys_K, vectors_KV in found.blocks()]
    assert {key: vector for block in blocks for key, vector in block.items()} == expected
    assert pa.total_allocated_bytes() == before, "they are mapped, and not copied"
    assert all(found.of(key).tolist() == vector for key, vector in expected.items())
    assert found.of(key_of_uri(UNKNOWN)) is None

    monkeypatch.setattr(export.ImageNetwork, "tables", None)  # nothing is computed again
    again = visual_vectors(world.runs / "both")
    assert by_key(again.table) == expected and again.about == found.about


def test_only_runs_with_images_and_a_checkpoint_are_named(world, tmp_path):
    assert image_runs(world.places()) == ["both", "both-longer"]
    assert image_runs(Places(store=str(world.store))) == []
    runs = tmp_path / "runs"
    shutil.copytree(world.runs / "both", runs / "begun", ignore=shutil.ignore_patterns("versions"))
    for name in ("odd", "ad", "behavior", "good <b>"):
        shutil.copytree(world.runs / "both", runs / name)
    (runs / "odd" / "config.yaml").write_text("[]")
    (runs / "file").touch()
    config = (world.runs / "both" / "config.yaml").read_text()
    assert "images: both" in config
    for name in ("ad", "behavior"):  # those that see most come first
        (runs / name / "config.yaml").write_text(config.replace("images: both", f"images: {name}"))
    assert image_runs(Places(store=str(world.store), runs=str(runs))) == ["good <b>", "behavior", "ad"]


def test_the_run_is_read_once_until_it_has_another_checkpoint(world, monkeypatch, tmp_path):
    run = shutil.copytree(world.runs / "both", tmp_path / "runs" / "both")
    calls, real = [], visual.visual_vectors
    monkeypatch.setattr(visual, "visual_vectors", lambda *args, **more: calls.append(args) or real(*args, **more))
    places, store, background = world.places(runs=run.parent), FeatureStore.open(world.store), Background()

    def vectors(version=None):
        return begin_vectors(places, "both", store.snapshot(version), background).result()

    first = vectors()
    assert vectors() is first
    assert len(calls) == 1
    assert len(vectors(1).table) == 26
    (newest,), place = finished(run), CheckpointPlace(run)
    state = read_state(newest)
    tensors = {name: load(newest.read_bytes(name)) for name in state.files}
    place.claim()
    assert vectors() is first, "the checkpoint is the same"
    place.remove([newest])
    parts = {name: place.write(state.step, name, each) for name, each in tensors.items()}
    place.commit(state.step, parts, state_bytes(state, parts), 3, None)
    vectors()
    assert len(calls) == 3
    background.close()
