"""OpenVINO gives what torch gives, whatever else is in a batch; and computes only where it is right and quick."""

import importlib.util
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.network import backbone as compute
from pipeline.network.backbone import BATCH, by_openvino, by_torch, calibrated, can_compile, compute_of, rounded
from tests.pipeline.network.test_int8 import network, pixels
from tests.pipeline.network.tiny import SIDE

PRECISIONS = ("float32", "bfloat16", "int8")


def layers(precision: str) -> nn.Module:
    return rounded(network(), calibrated(network(), pixels(9)).ranges) if precision == "int8" else network()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_machine_computes_the_same(precision: str) -> None:
    """OpenVINO where it is right here, against torch; in bfloat16, or to one of 256, they may round differently."""
    found = compute_of(layers(precision), (SIDE, SIDE), precision)(pixels(BATCH + 5))
    expected = by_torch(layers(precision), precision)(pixels(BATCH + 5))
    error = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 1e-2}[precision]
    np.testing.assert_allclose(found, expected, rtol=0, atol=error * np.abs(expected).max())
    assert can_compile("float32") and sys.modules["openvino_telemetry"] is None


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
