"""The import job on the tests' cluster, and vectors to import."""

import contextlib

import numpy as np
import pytest

from featurestore.store import FeatureStore
from jobs import import_features
from pipeline import formats
from tests.cli import invoke
from tests.featurestore.staged import metadata_of

DIM = 6


@pytest.fixture
def job(client, tmp_path, monkeypatch):
    """Runs the job on the tests' cluster into tmp_path/features."""
    monkeypatch.setattr("pipeline.cluster.tasks.connect", lambda **kwargs: contextlib.nullcontext(client))

    def run(source, *args, code=0, store=None):
        settings = ["--from", str(source), "--store", str(store or tmp_path / "features"), *map(str, args)]
        result = invoke(import_features.app, *settings, code=code)
        assert code == 0 or isinstance(result.exception, SystemExit)
        return " ".join(result.output.split())

    return run


@pytest.fixture(name="vectors_ND")
def draw_vectors():
    return np.random.default_rng(0).normal(size=(40, DIM)).astype(np.float32)


def write_xdl(folder, keys, vectors_ND, number_of=lambda key: key % formats.NUM_FILES):
    folder.mkdir(exist_ok=True)
    for key, vector_D in zip(keys, vectors_ND, strict=False):
        with (folder / f"data.{number_of(int(key))}").open("ab") as file:
            file.write(np.int64(key).astype("<i8").tobytes() + vector_D.astype("<f4").tobytes())


def stored(path, keys):
    store = FeatureStore.open(path)
    return store.codec.decode(store.snapshot().get(list(keys)))


def uris(path):
    return {row["key"]: row["uri"] for row in metadata_of(FeatureStore.open(path).snapshot()).to_pylist()}
