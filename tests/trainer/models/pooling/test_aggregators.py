"""Aggregators of nothing, in every run, and their weights; their mathematics: equivalence/forward.py."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from explorer.data.impressions.open_runs import noted_weights
from trainer.config import ModelConfig, Pooling
from trainer.exchange.vectors import FieldVectors
from trainer.models.layers import HiddenLayers, StepPlace
from trainer.models.pooling import AGGREGATORS, Aggregator

WIDTH, LENGTH = 3, 4
QUERY_WIDTHS = {
    pooling: {"nothing": [], "images": [2]}.get(aggregator.asks, [2, 5]) for pooling, aggregator in AGGREGATORS.items()
}
GROUPS = [[1, 1], [], [0, 3, 1], [2, 0, 1, 3, 3, 2], [3]]  # rows of vectors_UV; the fourth is longer than LENGTH
GROUP_OF_SAMPLE = [0, 0, 1, 2, 3, 3, 3, 1, 4]
POOLINGS = get_args(Pooling)


def values(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


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
