"""Networks in int8: what is rounded, by which ranges, and what that costs."""

import pytest
import torch
from torch import nn

from pipeline.errors import BackboneError
from pipeline.network.backbone import calibrated, rounded
from tests.pipeline.network.tiny import SIDE, Tiny


def network() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


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


def test_ranges_of_another_network_are_refused() -> None:
    with pytest.raises(BackboneError, match="the store has a range for stem, which this version of the network lacks"):
        rounded(network(), (("stem", 0.0, 1.0),))
