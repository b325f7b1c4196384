"""Layers of the networks: pooling and softmax against plain loops, norms against torch's, dropout, starts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from trainer.config import ModelConfig
from trainer.exchange.vectors import take_rows
from trainer.models.layers import PlacedDropout, StepPlace, expand_rows, segment_max, segment_softmax, segment_sum
from trainer.models.nets import build_model
from trainer.schema.fields import Field, Schema, load_schema

LENGTHS = torch.tensor([2, 0, 3])


def values(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("num_rows", [41, 1 << 16, 200_000])
def test_take_rows_sums_many_gradients_in_order(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    high_N = torch.randint(0, 1 + (num_rows >> 16), (5000,), generator=generator) << 16
    index_N = (high_N + torch.randint(0, 40, (5000,), generator=generator)).clamp_max(num_rows - 1)
    weight_N = torch.randn(5000, generator=generator)
    vectors = torch.zeros(num_rows, requires_grad=True)
    (take_rows(vectors, index_N) * weight_N).sum().backward()
    order_N = torch.argsort(index_N, stable=True)
    counts_U = torch.bincount(index_N, minlength=num_rows)
    assert torch.equal(vectors.grad, torch.segment_reduce(weight_N[order_N], "sum", lengths=counts_U))


def test_rows_and_segments_are_those_of_loops() -> None:
    """Softmax of scores whose plain exp would overflow; the maximum of negative rows, and its gradient where all are
    equal."""
    rows, scores, negative = values(3, 2), values(5) * 300, values(5, 2) - 10
    assert torch.equal(expand_rows(rows, LENGTHS, 5), rows[[0, 0, 2, 2, 2]])
    summed = torch.stack([values(5, 2)[:2].sum(0), torch.zeros(2), values(5, 2)[2:].sum(0)])
    torch.testing.assert_close(segment_sum(values(5, 2), LENGTHS), summed)
    softmax = torch.cat([torch.softmax(scores[:2], 0), torch.softmax(scores[2:], 0)])
    torch.testing.assert_close(segment_softmax(scores, LENGTHS), softmax)
    largest = torch.stack([negative[:2].amax(0), torch.zeros(2), negative[2:].amax(0)])
    torch.testing.assert_close(segment_max(negative, LENGTHS), largest)
    assert torch.autograd.gradcheck(expand_rows, (rows, LENGTHS, 5))
    for function, given in ((segment_sum, values(5, 2)), (segment_softmax, values(5)), (segment_max, values(5, 2))):
        assert torch.autograd.gradcheck(function, (given, LENGTHS))
    equal = torch.ones(5, 1, requires_grad=True)
    segment_max(equal, LENGTHS).sum().backward()
    assert equal.grad is not None
    torch.testing.assert_close(equal.grad.squeeze(1), torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3]))


TWO_IDS = Schema(fields=(Field(name="user", side="user", kind="id"), Field(name="ad", side="ad", kind="id")))


def test_dropout_has_its_share_and_scale_and_every_step_layer_and_seed_drops_others() -> None:
    dropped = PlacedDropout(0.3, StepPlace(place_B=np.arange(1000)), layer=1)(torch.ones(1000, 50))
    assert float((dropped == 0).double().mean()) == pytest.approx(0.3, abs=0.01)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7], abs=1e-4)
    ones, place = torch.ones(20, 20), StepPlace(place_B=np.arange(20))
    usual = PlacedDropout(0.5, place, layer=1)(ones)
    for other, layer in ((replace(place, seed=1), 1), (replace(place, step=1), 1), (place, 2)):
        assert not torch.equal(usual, PlacedDropout(0.5, other, layer=layer)(ones))
    assert torch.equal(usual, PlacedDropout(0.5, replace(place), layer=1)(ones))


def test_layers_start_by_xavier_and_those_of_logistic_regression_as_torchs_do() -> None:
    torch.manual_seed(0)
    layer = build_model(TWO_IDS, ModelConfig(images="none", mlp=[300], id_width=100)).mlp[0]
    assert float(layer.weight.detach().std()) == pytest.approx((2 / (200 + 300)) ** 0.5, rel=0.02)
    assert float(layer.weight.detach().abs().max()) > 200**-0.5, "torch's own would be below"
    assert not layer.bias.detach().any()
    unit = build_model(load_schema(), ModelConfig(base="lr")).aggregators["behavior_image"].channels[0]
    layers = [layer for layer in unit.children() if isinstance(layer, torch.nn.Linear)]
    assert layers, "its attention to images is there"
    for layer in layers:
        assert float(layer.weight.detach().abs().max()) <= layer.in_features**-0.5
        assert layer.bias is None or layer.bias.detach().all()
