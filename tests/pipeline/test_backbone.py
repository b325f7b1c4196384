"""The frozen network: equal to torchvision's, its weights' three sources, its digest."""

import os
import pickle
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import vgg16

from pipeline import backbone
from pipeline.backbone import (
    Backbone,
    Vgg16Fc6,
    check_weights_file,
    check_weights_name,
    fastest_dtype,
    load_weights,
    weights_digest,
)
from pipeline.decode import prepare, preset
from pipeline.errors import WeightsError

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def state():
    with pytest.warns(UserWarning, match="random:0 are NOT pretrained"):
        return load_weights("random:0")


@pytest.fixture(scope="module")
def full_network(state):
    """torchvision's whole VGG16 around the seeded weights; what lies behind fc6 is never used."""
    with torch.device("meta"):
        network = vgg16(weights=None, init_weights=False)
    network.load_state_dict(state, strict=False, assign=True)
    return network.eval()


@torch.inference_mode()
def torchvision_features(network, images):
    own = preset()
    pixels_BCHW = torch.stack([own(image) for image in images])
    return network.classifier[:2](network.avgpool(network.features(pixels_BCHW)).flatten(1)).numpy()


@pytest.mark.filterwarnings("ignore:weights random")
def test_features_are_those_of_torchvisions_own_forward(full_network, photos):
    paths = sorted(photos.iterdir())[:2]
    expected_BD = torchvision_features(full_network, [Image.open(path).convert("RGB") for path in paths])
    pixels_BHWC = np.stack([prepare(path.read_bytes()).pixels_HWC for path in paths])
    assert (expected_BD > 0).mean() > 0.1
    single_BD = Backbone("random:0", "float32").features(pixels_BHWC)
    np.testing.assert_allclose(single_BD, expected_BD, rtol=1e-4, atol=1e-4 * expected_BD.max())
    bfloat_BD = Backbone("random:0", "bfloat16").features(pixels_BHWC)
    norms_B = np.linalg.norm(bfloat_BD, axis=1) * np.linalg.norm(expected_BD, axis=1)
    assert ((bfloat_BD * expected_BD).sum(1) / norms_B).min() > 0.999


def test_only_the_layers_up_to_fc6_are_built():
    names = list(Vgg16Fc6().state_dict())
    assert names[-2:] == ["classifier.0.weight", "classifier.0.bias"]
    assert len(names) == 2 * 14  # 13 convolutions and fc6


def test_random_weights_are_seeded(state, monkeypatch):
    with pytest.warns(UserWarning, match="NOT pretrained"):
        again, other = load_weights("random:0"), load_weights("random:1")
    assert weights_digest(again) == weights_digest(state) != weights_digest(other)
    spread = state["features.28.weight"].std().item()
    assert spread == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)  # He et al. 2015


def test_the_digest_is_of_names_and_values():
    first = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert weights_digest(first) == weights_digest({"b": torch.zeros(2), "a": torch.ones(2)})
    assert weights_digest(first) != weights_digest({"b": torch.ones(2), "a": torch.zeros(2)})
    assert weights_digest(first) != weights_digest({"a": torch.ones(2), "b": torch.zeros(1, 2)})


def test_a_file_with_the_whole_vgg16_is_accepted(state, tmp_path):
    behind = {"classifier.3.weight": torch.zeros(4096, 2), "classifier.6.bias": torch.zeros(1000)}
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    torch.save(half | behind, tmp_path / "vgg16.pth")
    check_weights_file(str(tmp_path / "vgg16.pth"))
    loaded = load_weights(str(tmp_path / "vgg16.pth"))
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], half[name].float()) for name in half)


def test_files_that_do_not_fit_are_refused(state, tmp_path):
    small = {name: torch.zeros(tensor.shape if tensor.ndim == 1 else 1) for name, tensor in state.items()}
    files = {
        r"features.0.weight has shape \(1,\), not \(64, 3, 3, 3\)": small,
        "without features.0.weight, features.0.bias": {"conv1.weight": torch.zeros(2)},
        "not a state dict, which maps names to tensors": [torch.zeros(2)],
    }
    for message, content in files.items():
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(WeightsError, match=message):
            load_weights(str(tmp_path / "weights.pth"))
        with pytest.raises(WeightsError, match=message):
            check_weights_file(str(tmp_path / "weights.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    for read in (load_weights, check_weights_file):
        with pytest.raises(WeightsError, match=r"not a state dict that torch can load safely \(UnpicklingError: "):
            read(str(tmp_path / "text.pth"))


def test_weights_with_nan_are_refused(state, tmp_path, monkeypatch):
    monkeypatch.setattr(backbone, "_from_file", lambda path: state | {"features.0.bias": torch.full((64,), torch.nan)})
    with pytest.raises(WeightsError, match=r"features.0.bias holds NaN"):
        load_weights("file.pth")


class Payload:
    """A pickle that makes a folder when it is run."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_is_not_run(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(WeightsError, match="not a state dict that torch can load safely"):
        load_weights(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "evil.pth").read_bytes())
    assert (tmp_path / "ran").exists(), "it would have been seen"


def test_no_network_is_a_clear_error_and_no_silent_fallback(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models.VGG16_Weights.get_state_dict", refuse)
    with pytest.raises(WeightsError, match=r"no route to host.*https://.*--weights FILE.*--weights random:0"):
        load_weights("imagenet")


def test_names_of_weights(tmp_path, monkeypatch):
    (tmp_path / "mine.pth").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert check_weights_name("imagenet") == "imagenet"
    assert check_weights_name("random:12") == "random:12"
    assert check_weights_name("mine.pth") == str(tmp_path / "mine.pth")
    for name, message in (("random:x", "the seed"), ("random", "the seed"), ("other.pth", "neither imagenet")):
        with pytest.raises(WeightsError, match=message):
            check_weights_name(name)


def test_bfloat16_only_where_the_processor_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert fastest_dtype() == "bfloat16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "avx2": True})
    assert fastest_dtype() == "float32"
