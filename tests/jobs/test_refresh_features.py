"""The refresh job as a person types it: its options, what is refused with one message, its help."""

import contextlib

import pytest
from typer.testing import CliRunner

from featurestore import ExtractorSpec, FeatureStore, StoreInfo
from featurestore.spec import NetworkName
from jobs import refresh_features


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Runs the job without a cluster."""
    monkeypatch.setattr("pipeline.cluster.tasks.connect", lambda **kwargs: contextlib.nullcontext(None))
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(refresh_features.app, args)


@pytest.fixture
def store(tmp_path):
    extractor = ExtractorSpec(
        backbone="torchvision vgg16",
        layer="classifier.1",
        weights_digest="0",
        preprocessing="",
        compute_dtype="float32",
    )
    network = NetworkName(backbone="vgg16:classifier.1", weights=str(tmp_path / "weights.pth"))
    return FeatureStore.create(tmp_path / "data/features", StoreInfo(dim=8, extractor=extractor, network=network))


def assert_message(result, code, text):
    assert result.exit_code == code
    assert text in " ".join(result.stderr.split())
    assert isinstance(result.exception, SystemExit)  # no traceback
    assert not result.stdout


def test_what_does_not_fit_the_store_is_one_message(job, store):
    assert_message(job(), 2, "weights.pth': neither imagenet, random:SEED, nor a file")
    assert_message(job("--weights", "random:x"), 2, "the seed of random weights is a number")
    assert_message(job("--weights", "random:0"), 2, "there is no folder data/images")
    assert_message(job("--compute-dtype", "bfloat16"), 1, "were computed in float32: leave the option away")
