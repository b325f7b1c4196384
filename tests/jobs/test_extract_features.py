"""The jobs that extract and refresh as a person types them: what they print, exit codes, errors."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurestore.store import FeatureStore
from jobs import extract_features
from pipeline.errors import PipelineError
from pipeline.features.refresh import RefreshSummary
from pipeline.store_run import BadRow
from tests.cli import ran, said

JOB = Path(extract_features.__file__)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "text.pth"], "neither imagenet, random:SEED, nor a file"),
        (
            ["--weights", "random:3", "--backbone", "resnet18:avgpol"],
            "error: backbone 'resnet18:avgpol': resnet18 has no layer 'avgpol'; near: avgpool",
        ),
    ],
)
def test_a_wrong_network_is_a_usage_error_before_a_cluster_starts(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.cluster.tasks.connect", None)
    assert message in said(extract_features.app, *words, code=2)


def test_the_summary_names_what_was_bad():
    bad = (BadRow(1, "a.jpg", "empty file"), BadRow(2, "b.jpg", "no such file"), BadRow(3, "c.jpg", "empty file"))
    numbers = {"num_images": 13, "num_ignored": 1, "num_new": 2, "num_changed": 1, "num_touched": 1, "num_gone": 5}
    numbers |= {"num_unchanged": 6, "num_kept": 2, "num_resolved": 1, "num_computed": 3, "num_duplicates": 4}
    numbers |= {"num_resumed": 2, "seconds": 2.0, "snapshot": 7}
    counts = RefreshSummary(**numbers, bad=bad, store="/features", precision="float32")
    for part in (
        "images       13 (1 other files ignored)", "new          2", "changed      1", "touched      1 (",
        "unchanged    6",
        "gone         5 (2 not listed, kept)", "quarantined  3: 2 empty file (a.jpg, c.jpg); 1 no such file (b.jpg)",
        "resolved     1 (", "duplicates   4 (", "computed     3 (2 images staged", "2.0 s, 2.0 images/s",
        "/features, snapshot 7", "precision    float32",
    ):  # fmt: skip
        assert part in str(counts)
    assert "time         2.0 s\n" in str(dataclasses.replace(counts, num_images=7)), "no image was worked on"


@pytest.mark.services
@pytest.mark.long(20)
def test_under_dask_submit_with_the_default_places(tmp_path):
    images = tmp_path / "data/images"
    images.mkdir(parents=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.jpg")
    (images / "text.jpg").write_text("a text")
    network = ["--backbone", "squeezenet1_1:flatten", "--weights", "random:0"]  # small: it is sent to the worker
    first = ran(Path(sys.executable).with_name("dask-submit"), "-n", 1, JOB, *network, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "computed     3" in first.stdout
    assert "(text.jpg)" in first.stdout
    assert first.stderr.count("NOT pretrained") == 1
    assert "warning: the weights random:0 are NOT pretrained\n" in first.stderr
    assert FeatureStore.open(tmp_path / "data/features").snapshot().num_rows == 3


def test_errors_of_the_pipeline_survive_the_wire():
    import pickle

    for kind in PipelineError.__subclasses__():
        if not kind.__subclasses__():
            assert str(pickle.loads(pickle.dumps(kind("message")))) == "message"
