"""A store of imported vectors of another width beside the first one: the trainer takes it as it is."""

import contextlib
import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from featurestore.store import FeatureStore
from jobs import import_features
from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.main import train


def test_a_run_on_imported_vectors(make_places, tmp_path, monkeypatch, client):
    places = make_places(tmp_path)
    np.save(tmp_path / "text.npy", np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32))
    np.save(tmp_path / "keys.npy", np.arange(1_000, 1_050))
    monkeypatch.setattr("pipeline.cluster.tasks.connect", lambda **kwargs: contextlib.nullcontext(client))
    options = ["--keys", str(tmp_path / "keys.npy"), "--store", str(tmp_path / "features-text"), "--name", "text"]
    result = CliRunner().invoke(import_features.app, ["--from", str(tmp_path / "text.npy"), *options])
    assert result.exit_code == 0, result.output
    assert [FeatureStore.open(tmp_path / name).info.dim for name in ("features", "features-text")] == [16, 64]
    settings = places.settings(
        data__store=tmp_path / "features-text", run__name="text", train__max_steps=2, model__images="both"
    )
    config = load_config(settings=settings)
    train(config, SoloComm())
    report = json.loads((Path(config.run.dir) / "text/report.json").read_text())
    assert report["global_step"] == 2
    assert np.isfinite(report["metrics"]["logloss"])
