"""The frozen network: equal to torchvision's for any model, its weights' sources, its digest."""

import os
import pickle
import re
import threading
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

from pipeline.errors import BackboneError, WeightsError
from pipeline.images.decode import prepare
from pipeline.network import DEFAULT_BACKBONE, check_weights_name
from pipeline.network import backbone as compute
from pipeline.network.backbone import Backbone, feature_dim, load_weights, network_of, weights_digest
from pipeline.problems import Problem
from tests.pipeline.conftest import draw_photo
from tests.raised import raises

pytestmark = pytest.mark.long  # they make whole networks
SMALL_ONES = ["mnasnet0_5", "shufflenet_v2_x0_5", "squeezenet1_1"]
SMALL = "mobilenet_v3_small:avgpool"
NEAR = re.compile(r"\bavgpool\b")
AN_IMAGE = {"layer": "layer4.1.relu_1", "value": "(512, 7, 7)"}
TOKENS = {"layer": "encoder.ln", "value": "(197, 768)"}
TABLE = "features.1.0.attn.relative_position_bias_table"


@pytest.fixture(scope="module")
def state():
    """Weights of a network of 2.5 million; what reads files is the same for all."""
    return load_weights(network_of(SMALL, "random:0"), "random:0")


@pytest.fixture(scope="module")
def drawn():
    """Weights of the default network with random:0, drawn once: there are 117 million."""
    return load_weights(network_of(DEFAULT_BACKBONE, "random:0"), "random:0")


@pytest.fixture
def by_torch(monkeypatch):
    """Spares seconds for OpenVINO to compile a network: test_compute.py compares both, and here a small one does."""
    monkeypatch.setattr(compute, "can_compile", lambda precision: False)


@pytest.fixture(scope="module")
def default(drawn):
    """The default network in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute, "load_weights", lambda *_: drawn)
        return Backbone(DEFAULT_BACKBONE, "random:0", "float32")


@torch.inference_mode()
def torchvision_features(model, state, layers, images, **arguments):
    """torchvision's own model and transform; what lies behind `layers` is never used."""
    with torch.device("meta"):
        network = models.get_model(model, weights=None, **arguments)
    network.load_state_dict(state, strict=False, assign=True)
    own = models.get_model_weights(model).DEFAULT.transforms()
    pixels_BCHW = torch.stack([own(image) for image in images])
    return layers(network.eval(), pixels_BCHW).numpy()


def least_cosine(one_BD, other_BD):
    norms_B = np.linalg.norm(one_BD, axis=1) * np.linalg.norm(other_BD, axis=1)
    return ((one_BD * other_BD).sum(1) / norms_B).min()


def class_token(network, pixels_BCHW):
    tokens = network._process_input(pixels_BCHW)
    return network.encoder(torch.cat([network.class_token.expand(len(tokens), -1, -1), tokens], 1))[:, 0]


@pytest.mark.usefixtures("by_torch")
def test_bfloat16_is_close(default, drawn, monkeypatch):
    pixels_BHWC = np.stack([np.asarray(draw_photo(seed, 224, 224)) for seed in range(2)])
    monkeypatch.setattr(compute, "load_weights", lambda *_: drawn)  # not drawn twice
    half = Backbone(DEFAULT_BACKBONE, "random:0", "bfloat16")
    assert least_cosine(default.features(pixels_BHWC), half.features(pixels_BHWC)) > 0.999


@pytest.mark.parametrize(
    ("name", "layers", "arguments"),
    [
        (
            DEFAULT_BACKBONE,
            lambda network, pixels: network.classifier[:2](network.avgpool(network.features(pixels)).flatten(1)),
            {"init_weights": False},
        ),
        (SMALL, lambda network, pixels: network.avgpool(network.features(pixels)).flatten(1), {}),
        ("resnet18:fc", nn.Module.__call__, {}),
        pytest.param("vit_b_16:getitem_5", class_token, {}, marks=pytest.mark.slow),
        ("inception_v3:fc", nn.Module.__call__, {"transform_input": True, "init_weights": False}),
    ],
)
def test_features_are_those_of_torchvisions_own_forward(name, layers, arguments, photos, default, drawn, request):
    if name != SMALL:
        request.getfixturevalue("by_torch")
    paths = sorted(photos.iterdir())[:2]
    is_default = name == DEFAULT_BACKBONE
    single = default if is_default else Backbone(name, "random:0", "float32")
    filled = drawn if is_default else load_weights(network_of(name, "random:0"), "random:0")
    images = [Image.open(path).convert("RGB") for path in paths]
    expected_BD = torchvision_features(name.partition(":")[0], filled, layers, images, **arguments)
    pixels_BHWC = np.stack([prepare(path.read_bytes(), single.preset).pixels_HWC for path in paths])
    features_BD = single.features(pixels_BHWC)
    assert features_BD.shape == (2, feature_dim(name, "random:0"))
    np.testing.assert_allclose(features_BD, expected_BD, rtol=0, atol=1e-4 * np.abs(expected_BD).max())
    assert (np.abs(expected_BD) > 0.01 * expected_BD.std()).mean() > 0.1
    assert (features_BD[0] != features_BD[1]).any()


def test_the_default_is_what_it_always_was(default):
    """Stores hold features of it: another digest would make their owners compute all of them again."""
    spec = default.spec
    assert (spec.backbone, spec.layer) == ("torchvision vgg16", "classifier.1")
    assert spec.weights_digest == "xxh3-128:ba98d63ee5e296794092e487cff71e88"
    assert spec.preprocessing == (
        '{"preset":"torchvision VGG16_Weights.IMAGENET1K_V1","resize":[256],"interpolation":"bilinear",'
        '"antialias":true,"crop":[224],"mean":[0.485,0.456,0.406],"std":[0.229,0.224,0.225],"exif_orientation":true,'
        '"alpha":"on white","jpeg_scaled_to_at_least":1024}'
    )


def test_preprocessing_is_that_of_the_weights_and_a_block_stands_for_its_last_operation():
    first, second = (network_of("resnet50:avgpool", f"imagenet:IMAGENET1K_V{n}").preset for n in (1, 2))
    assert (first.resize, second.resize) == ((256,), (232,))
    assert network_of("resnet50:avgpool", "random:0").preset == second  # torchvision's default
    large = network_of("vit_b_16:getitem_5", "imagenet:IMAGENET1K_SWAG_E2E_V1")
    assert (large.preset.crop, large.preset.interpolation.value) == ((384,), "bicubic")
    assert large.tensors()["encoder.pos_embedding"].shape == (1, 1 + 24 * 24, 768)
    assert large.preset.scaled_side == 4 * 384
    first = re.compile("^imagenet:IMAGENET1K_V1, ")
    with raises(WeightsError, Problem.NO_SUCH_ENTRY, value="imagenet:V2", model="resnet50", known=first):
        network_of("resnet50:avgpool", "imagenet:V2")
    assert network_of("vit_b_16:heads", "random:0").layer == "heads.head"


@pytest.mark.parametrize(
    ("name", "problem", "values", "near"),
    [
        ("resnet81:avgpool", Problem.NO_SUCH_MODEL, {"value": "resnet81"}, r"\bresnet18,"),
        ("resnet18:avgpol", Problem.NO_SUCH_LAYER, {"value": "avgpol", "near": NEAR}, r":avgpool \(512\)"),
        ("resnet18", Problem.LAYER_NEEDED, {"model": "resnet18"}, r"resnet18:flatten \(512\)"),
        ("resnet18:layer4", Problem.NOT_ONE_VECTOR, AN_IMAGE, r"resnet18:avgpool \(512\)"),
        ("vit_b_16:encoder.ln", Problem.NOT_ONE_VECTOR, TOKENS, r"vit_b_16:getitem_5 \(768\)"),
        ("vit_b_16:encoder.dim", Problem.NOT_ONE_VECTOR, {"layer": "encoder.dim", "value": "no tensor"}, ""),
        ("vgg16:classifier.1x", Problem.NO_SUCH_LAYER, {"value": "classifier.1x"}, ""),
        ("", Problem.NO_SUCH_MODEL, {"value": ""}, ""),
    ],
)
def test_a_name_that_is_none_lists_those_that_are_near(name, problem, values, near):
    with raises(BackboneError, problem, where=name, **values, hint=re.compile(near)):
        feature_dim(name, "random:0")


REST = sorted({*models.list_models(module=models)} - {*SMALL_ONES})


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("some", [SMALL_ONES, pytest.param(REST, marks=pytest.mark.slow)], ids=["small ones", "rest"])
def test_every_model_of_torchvision_can_be_cut(some):
    for model in some:
        with pytest.raises(BackboneError) as caught:
            network_of(model, "imagenet")
        layer = re.search(r"(\S+) \(", str(caught.value.values["hint"]))[1]
        assert network_of(layer, "imagenet").dim > 0


def test_other_threads_compute_while_a_network_is_cut():
    network, ones, done = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2), threading.Event()
    expected = network(ones)

    def compute():
        while not done.is_set():
            assert torch.equal(network(ones), expected)

    with ThreadPoolExecutor(1) as thread:
        computing = thread.submit(compute)
        try:
            network_of("resnet18:avgpool", "random:0")
        finally:
            done.set()
        computing.result()


def test_random_weights_are_seeded_and_the_digest_is_of_names_and_values():
    """Tables of positions, too, which torchvision draws; what others draw in this process stays as it would be."""
    states = [load_weights(network_of("resnet18:avgpool", name), name) for name in ("random:0", "random:0", "random:1")]
    first, again, other = map(weights_digest, states)
    assert first == again != other
    spread = states[0]["layer4.1.conv2.weight"].std().item()
    assert spread == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)  # He et al. 2015
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    network = network_of("swin_t:flatten", "random:0")
    first, again, other = (load_weights(network, name)[TABLE] for name in ("random:0", "random:0", "random:1"))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    first = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert weights_digest(first) == weights_digest({"b": torch.zeros(2), "a": torch.ones(2)})
    assert weights_digest(first) != weights_digest({"b": torch.ones(2), "a": torch.zeros(2)})
    assert weights_digest(first) != weights_digest({"a": torch.ones(2), "b": torch.zeros(1, 2)})


def test_files_with_the_whole_network_or_names_of_old_densenets_are_accepted(state, tmp_path):
    behind = {"classifier.0.weight": torch.zeros(1024, 576), "classifier.3.bias": torch.zeros(1000)}
    half = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    torch.save(half | behind, tmp_path / "whole.pth")
    loaded = load_weights(network_of(SMALL, "random:0"), str(tmp_path / "whole.pth"))
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], half[name].to(state[name].dtype)) for name in half)
    network = network_of("densenet121:flatten", "random:0")
    state = load_weights(network, "random:0")
    old = {name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value for name, value in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "densenet.pth")
    assert weights_digest(load_weights(network, str(tmp_path / "densenet.pth"))) == weights_digest(state)


def test_files_that_do_not_fit_are_refused(state, tmp_path):
    network, file = network_of(SMALL, "random:0"), tmp_path / "weights.pth"
    small = {name: torch.zeros(tensor.shape if tensor.ndim == 1 else 1) for name, tensor in state.items()}
    weight, bias = "features.0.0.weight", "features.0.1.bias"
    for problem, values, content in (
        (Problem.WRONG_SHAPE, {"tensor": weight, "value": "(1,)", "wanted": "(16, 3, 3, 3)"}, small),
        (Problem.OTHER_MODEL, {"missing": re.compile(f"^{weight}, features.0.1.weight")}, {"conv1": torch.zeros(2)}),
        (Problem.NOT_A_STATE_DICT, {}, [torch.zeros(2)]),
        (Problem.NOT_FINITE, {"tensor": bias}, state | {bias: torch.full((16,), torch.nan)}),
    ):
        torch.save(content, file)
        with raises(WeightsError, problem, where=file, **values):
            load_weights(network, str(file))
    for data, kind in ((b"no weights", "UnpicklingError"), (b"", "EOFError"), (b"PK\x03\x04torn", "RuntimeError")):
        file.write_bytes(data)
        with raises(WeightsError, Problem.WEIGHTS_UNREAD, where=file, reason=kind):
            load_weights(network, str(file))


class Payload:
    """A pickle that makes a folder when it is run."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_is_not_run(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with raises(WeightsError, Problem.WEIGHTS_UNREAD, where=tmp_path / "evil.pth"):
        load_weights(network_of(DEFAULT_BACKBONE, "random:0"), str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "evil.pth").read_bytes())
    assert (tmp_path / "ran").exists(), "it would have been seen"


def test_names_of_weights_and_what_a_machine_without_network_says(tmp_path, monkeypatch):
    (tmp_path / "mine.pth").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for name in ("imagenet", "imagenet:IMAGENET1K_V2", "random:12"):
        assert check_weights_name(name) == name
    assert check_weights_name("mine.pth") == str(tmp_path / "mine.pth")
    seed, none = Problem.WRONG_SEED, Problem.NO_SUCH_WEIGHTS
    for name, problem in (("random:x", seed), ("random", seed), ("other.pth", none)):
        with raises(WeightsError, problem, value=name):
            check_weights_name(name)

    def refuse(self, *args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models.VGG16_Weights.get_state_dict", refuse)
    away = {"reason": re.compile("no route to host"), "where": re.compile("^https://")}
    with raises(WeightsError, Problem.NOT_DOWNLOADED, **away):
        load_weights(network_of(DEFAULT_BACKBONE, "random:0"), "imagenet")
