"""The refresh job as a person types it: its options, what is refused with one message, its help."""

import contextlib

import pytest
from typer.testing import CliRunner

from featurestore import ExtractorSpec, FeatureStore, StoreInfo
from featurestore.spec import NetworkName
from jobs import refresh_features
from pipeline.features.refresh import RefreshOptions, RefreshSummary
from pipeline.store_run import BadRow


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


def test_mistakes_are_one_message(job, tmp_path):
    assert_message(job(), 2, "data/features: store.json is not there; crossmedia extract makes one")
    assert_message(job("--channel", "19"), 2, "not the name of a channel")


def test_what_does_not_fit_the_store_is_one_message(job, store):
    assert_message(job(), 2, "weights.pth': neither imagenet, random:SEED, nor a file")
    assert_message(job("--weights", "random:x"), 2, "the seed of random weights is a number")
    assert_message(job("--weights", "random:0"), 2, "there is no folder data/images")
    assert_message(job("--compute-dtype", "bfloat16"), 1, "were computed in float32: leave the option away")


def test_all_options_arrive_and_the_counts_are_printed(job, monkeypatch):
    seen = []

    def refresh(options, client):
        seen.append(options)
        bad = (BadRow(1, "a.jpg", "empty file"),)
        return RefreshSummary(
            num_images=10,
            num_ignored=0,
            num_new=1,
            num_changed=2,
            num_touched=3,
            num_unchanged=3,
            num_gone=5,
            num_kept=0,
            num_resolved=1,
            num_computed=3,
            num_duplicates=0,
            num_resumed=0,
            bad=bad,
            seconds=1.0,
            store="/features",
            snapshot=4,
        )

    monkeypatch.setattr("pipeline.features.refresh.refresh", refresh)
    result = job(
        "--images", "i", "--store", "s", "--backbone", "b:l", "--weights", "w", "--compute-dtype", "bfloat16",
        "--batch-size", "3", "--part-size", "4", "--keep-missing", "--max-gone", "0.25",
    )  # fmt: skip
    assert result.exit_code == 0
    assert seen == [
        RefreshOptions(
            images="i",
            store="s",
            backbone="b:l",
            weights="w",
            compute_dtype="bfloat16",
            batch_size=3,
            part_size=4,
            keep_missing=True,
            max_gone=0.25,
        )
    ]
    for line in (
        "new          1",
        "changed      2",
        "touched      3 ",
        "unchanged    3",
        "gone         5",
        "resolved     1 ",
    ):
        assert line in result.stdout
    assert "quarantined  1: 1 empty file (a.jpg)" in result.stdout
