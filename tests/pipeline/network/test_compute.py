"""OpenVINO gives what torch gives, whatever is in a batch, also in int8; and computes only where it is right."""

import importlib.util
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import BackboneError
from pipeline.network import backbone as compute
from pipeline.network.backbone import BATCH, by_openvino, by_torch, calibrated, can_compile, compute_of, rounded
from pipeline.problems import Problem
from tests.pipeline.network.tiny import SIDE, Tiny
from tests.raised import raises

PRECISIONS = ("float32", "bfloat16", "int8")


def network() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def layers(precision: str) -> nn.Module:
    return rounded(network(), calibrated(network(), pixels(9)).ranges) if precision == "int8" else network()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.long
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_machine_computes_the_same(precision: str) -> None:
    """OpenVINO where it is right here, against torch; in bfloat16, or to one of 256, they may round differently."""
    found = compute_of(layers(precision), (SIDE, SIDE), precision)(pixels(BATCH + 5))
    expected = by_torch(layers(precision), precision)(pixels(BATCH + 5))
    error = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 1e-2}[precision]
    np.testing.assert_allclose(found, expected, rtol=0, atol=error * np.abs(expected).max())
    assert can_compile("float32") and sys.modules["openvino_telemetry"] is None


@pytest.mark.long
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_image_has_the_same_bits_in_any_batch_and_by_any_threads(precision: str) -> None:
    images = pixels(BATCH + 3)
    whole = by_openvino(layers(precision), (SIDE, SIDE), precision)
    features = whole(images)
    for place in (0, 7, BATCH + 2):
        np.testing.assert_array_equal(whole(images[place : place + 1])[0], features[place])
    np.testing.assert_array_equal(whole(images.flip(0))[::-1], features)
    torch.set_num_threads(1)
    np.testing.assert_array_equal(by_openvino(layers(precision), (SIDE, SIDE), precision)(images), features)


def test_it_computes_where_it_is_installed_and_the_processor_has_the_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for units, quick in (
        ((), ["float32"]),
        (("avx512_f", "avx512_bf16"), ["float32", "bfloat16"]),
        (("avx_vnni",), ["float32", "int8"]),
        (("amx_int8", "amx_bf16"), [*PRECISIONS]),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: dict.fromkeys(units, True))
        assert [precision for precision in PRECISIONS if can_compile(precision)] == quick
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not can_compile("float32")
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(compute, "by_openvino", None)
    expected = by_torch(network(), "float32")(pixels(2))
    np.testing.assert_array_equal(compute_of(network(), (SIDE, SIDE), "float32")(pixels(2)), expected)


def test_ranges_are_means_of_images_and_the_cost_is_measured_on_others() -> None:
    images = torch.cat([pixels(20), 0.9 * pixels(10, 1)])
    spec = calibrated(network(), images)
    assert (spec.num_images, spec.num_held_out) == (20, 10)
    ranges = {name: (low, high) for name, low, high in spec.ranges}
    assert list(ranges) == ["pool", "plain", "last"], "neither what takes pixels nor what is depthwise"
    seen = list[torch.Tensor]()
    observed = network()
    observed.get_submodule("last").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        observed(images[:20])
        assert ranges["last"] == pytest.approx((float(seen[0].amin(1).mean()), float(seen[0].amax(1).mean())))
        assert ranges["plain"][0] == 0  # behind a ReLU
        single, int8 = network()(images[20:]), rounded(network(), spec.ranges)(images[20:])
    assert spec.mean_cosine == pytest.approx(float(torch.cosine_similarity(single, int8).mean()), abs=1e-6)
    assert 0.999 < spec.mean_cosine < 1
    assert calibrated(network(), images) == spec
    assert calibrated(network(), pixels(2)).num_held_out == 1
    with raises(BackboneError, Problem.RANGE_OF_NO_LAYER, where="stem"):
        rounded(network(), (("stem", 0.0, 1.0),))


@torch.no_grad()
def test_inputs_and_each_channels_weights_have_at_most_256_numbers() -> None:
    layers = rounded(network(), calibrated(network(), pixels(9)).ranges)
    seen = list[torch.Tensor]()
    layers.plain.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))  # type: ignore[union-attr, operator]
    layers(pixels(4, 2))
    assert 100 < len(seen[0].unique()) <= 256
    for name in ("plain", "last"):
        before, after = (each.get_submodule(name).weight.flatten(1) for each in (network(), layers))
        step_O = before.abs().amax(1, keepdim=True) / 127
        assert (before - after).abs().le(0.501 * step_O).all() and not torch.equal(before, after)
        assert max(len(channel.unique()) for channel in after) <= 255
