"""Layers of the networks against plain loops, dropout, starts; aggregators of nothing, in every run, and weights."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from explorer.data.impressions.open_runs import noted_weights
from trainer.config import ModelConfig, Pooling
from trainer.exchange.vectors import FieldVectors, take_rows
from trainer.models.layers import (
    HiddenLayers,
    PlacedDropout,
    StepPlace,
    expand_rows,
    segment_max,
    segment_softmax,
    segment_sum,
)
from trainer.models.nets import build_model
from trainer.models.pooling import AGGREGATORS, Aggregator
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


WIDTH, LENGTH = 3, 4
QUERY_WIDTHS = {
    pooling: {"nothing": [], "images": [2]}.get(aggregator.asks, [2, 5]) for pooling, aggregator in AGGREGATORS.items()
}
GROUPS = [[1, 1], [], [0, 3, 1], [2, 0, 1, 3, 3, 2], [3]]  # rows of vectors_UV; the fourth is longer than LENGTH
GROUP_OF_SAMPLE = [0, 0, 1, 2, 3, 3, 3, 1, 4]
POOLINGS = get_args(Pooling)


def field_of(groups: list[list[int]], vectors: Tensor) -> FieldVectors:
    flat = [index for group in groups for index in group]
    return FieldVectors(vectors, torch.tensor(flat, dtype=torch.int64), torch.tensor([len(g) for g in groups]).long())


def built(pooling: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(pooling=pooling, attention_hidden=4, pooling_length=LENGTH)
    layers = HiddenLayers(ModelConfig(activation="prelu"), StepPlace())
    return AGGREGATORS[pooling](WIDTH, QUERY_WIDTHS[pooling], config, layers).double()


def arguments(pooling: str, groups: list[list[int]] = GROUPS) -> tuple[Any, ...]:
    samples = torch.tensor(GROUP_OF_SAMPLE) if groups is GROUPS else torch.arange(len(groups))
    queries = [values(len(samples), width) for width in QUERY_WIDTHS[pooling]]
    return field_of(groups, values(4, WIDTH)), samples, queries


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("groups", [[], [[], []]], ids=["no group", "no behaviour"])
def test_nothing_to_aggregate(pooling: str, groups: list[list[int]]) -> None:
    pool, given = built(pooling), arguments(pooling, groups)
    pooled = pool(*given)
    assert pooled.shape == (len(groups), pool.width)
    assert not pooled.any()
    pooled.sum().backward()
    vectors = given[0].vectors_UV
    assert vectors.grad is not None and not vectors.grad.any()
    assert all(parameter.grad is not None for parameter in pool.parameters())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_same_bits_in_every_run(pooling: str) -> None:
    def run() -> list[Tensor]:
        pool, generator = built(pooling).float(), torch.Generator().manual_seed(1)
        vectors = torch.randn(50, WIDTH, generator=generator).requires_grad_()
        groups = [torch.randint(0, 50, (n % 40,), generator=generator).tolist() for n in range(200)]
        samples = torch.arange(200).repeat_interleave(4)
        queries = [torch.randn(800, width, generator=generator) for width in QUERY_WIDTHS[pooling]]
        pooled = pool(field_of(groups, vectors), samples, queries)
        pooled.square().sum().backward()
        return [pooled, vectors.grad, *(parameter.grad for parameter in pool.parameters())]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


@pytest.mark.parametrize("pooling", ["attentive", "multi_query"])
def test_attention_is_what_the_sum_is_made_with(pooling: str) -> None:
    pool, given = built(pooling), arguments(pooling)
    pooled, found = pool(*given), pool.weights(*given)
    for sample, weights in enumerate(found.weight_NC.split(found.lengths_B.tolist())):
        keys = given[0].vectors_UV[torch.tensor(GROUPS[GROUP_OF_SAMPLE[sample]], dtype=torch.int64)]
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1]).double() * bool(len(keys)))
        summed = (weights.T.unsqueeze(2) * keys).sum(1).flatten()
        torch.testing.assert_close(summed, pooled[sample])


@pytest.mark.parametrize("pooling", AGGREGATORS)
@pytest.mark.parametrize("groups", [GROUPS, [[], []]], ids=["some", "no behaviour"])
def test_noting_changes_no_bit(pooling: str, groups: list[list[int]]) -> None:
    pool, given = built(pooling), arguments(pooling, groups)
    model: Any = torch.nn.Module()
    model.aggregators = torch.nn.ModuleDict({"images": pool, "others": built("sum")})
    weighed = AGGREGATORS[pooling].weights is not Aggregator.weights

    def run() -> list[torch.Tensor]:
        pooled = pool(*given)
        gradients = torch.autograd.grad(pooled.square().sum(), [given[0].vectors_UV, *pool.parameters()])
        return [pooled, *gradients]

    usual = run()
    with noted_weights(model) as found:
        noted = run()
    assert all(torch.equal(one, other) for one, other in zip(usual, noted, strict=True))
    assert list(found) == (["images"] if weighed else [])
    if found:
        assert torch.equal(found["images"].weight_NC, pool.weights(*given).weight_NC)
    found.clear()
    pool(*given)
    assert not found  # nothing watches any more
