"""Stores of networks other than the default, through the job: width, spec, a second layer refused."""

import contextlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from typer.testing import CliRunner

from featurestore.keys import key_of_uri
from featurestore.store import FeatureStore
from jobs import extract_features
from pipeline.network.backbone import backbone


@pytest.fixture
def job(client, tmp_path, monkeypatch):
    """Runs the job on the tests' cluster, into a store beside the images."""
    monkeypatch.setattr("pipeline.cluster.tasks.connect", lambda **kwargs: contextlib.nullcontext(client))

    def run(images, *args, store="features", code=0):
        settings = ["--images", str(images), "--store", str(tmp_path / store), "--compute-dtype", "float32"]
        result = CliRunner().invoke(extract_features.app, [*settings, "--weights", "random:3", *args])
        assert result.exit_code == code, result.output
        return result.output

    return run


def stored(path, uris):
    store = FeatureStore.open(path)
    return store.codec.decode(store.snapshot().get([key_of_uri(uri) for uri in uris]))


@torch.inference_mode()
def resnet18_pooled(paths):
    """torchvision's whole resnet18 around the seeded weights, up to its pooling, on its own transform."""
    network = models.resnet18(weights=None)
    state = backbone("resnet18:avgpool", "random:3", "float32").network.extractor.state_dict()
    assert not network.load_state_dict(state, strict=False).unexpected_keys
    network.fc = torch.nn.Identity()
    own = models.ResNet18_Weights.DEFAULT.transforms()
    return network.eval()(torch.stack([own(Image.open(path).convert("RGB")) for path in paths])).numpy()


def test_a_store_of_resnet18(job, photos, tmp_path):
    assert "new          4\n" in job(photos, "--backbone", "resnet18:avgpool", "--dtype", "float32")
    info = FeatureStore.open(tmp_path / "features").info
    assert (info.dim, info.extractor.backbone, info.extractor.layer) == (512, "torchvision resnet18", "avgpool")
    assert json.loads(info.extractor.preprocessing)["preset"] == "torchvision ResNet18_Weights.IMAGENET1K_V1"
    paths = sorted(photos.iterdir())
    expected_BD = resnet18_pooled(paths)
    rows_BD = stored(tmp_path / "features", [path.name for path in paths])
    np.testing.assert_allclose(rows_BD, expected_BD, rtol=1e-3, atol=1e-4 * expected_BD.max())

    refused = job(photos, "--backbone", "resnet18:flatten", code=1)
    assert "extractor.layer is 'avgpool' instead of 'flatten'" in " ".join(refused.split())
    refused = job(photos, "--backbone", "mobilenet_v3_small:avgpool", code=1)
    assert "dim is 512 instead of 576" in " ".join(refused.split())
    assert "unchanged    4\n" in job(photos, "--backbone", "resnet18:avgpool")  # dtype: as the store has it


def test_a_wrong_name_is_a_usage_error_before_a_cluster_starts(job, photos, monkeypatch):
    monkeypatch.setattr("pipeline.cluster.tasks.connect", None)
    text = " ".join(job(photos, "--backbone", "resnet18:avgpol", code=2).split())
    assert "error: backbone 'resnet18:avgpol': resnet18 has no layer 'avgpol'; near: avgpool" in text
    assert "resnet18:avgpool (512)" in text
