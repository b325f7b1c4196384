"""Aggregators of nothing, in every run, and their weights; their mathematics: equivalence/forward.py."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from explorer.data.impressions.open_runs import noted_weights
from trainer.config import ModelConfig, Pooling
from trainer.exchange.vectors import FieldVectors
from trainer.models.layers import HiddenLayers, StepPlace
from trainer.models.pooling import (
    AGGREGATORS,
    Aggregator,
    PairWeights,
)

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


@pytest.fixture(params=POOLINGS)
def pooling(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def layers() -> HiddenLayers:
    return HiddenLayers(ModelConfig(activation="prelu"), StepPlace())


def built(pooling: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(pooling=pooling, attention_hidden=4, pooling_length=LENGTH)
    return AGGREGATORS[pooling](WIDTH, QUERY_WIDTHS[pooling], config, layers()).double()


class TestAggregators:
    @pytest.mark.parametrize("groups", [[], [[], []]], ids=["no group", "no behaviour"])
    def test_nothing_to_aggregate(self, pooling: str, groups: list[list[int]]) -> None:
        pool, vectors = built(pooling), values(4, WIDTH)
        samples = torch.arange(len(groups))
        queries = [values(len(samples), width) for width in QUERY_WIDTHS[pooling]]
        pooled = pool(field_of(groups, vectors), samples, queries)
        assert pooled.shape == (len(groups), pool.width)
        assert not pooled.any()
        pooled.sum().backward()
        assert vectors.grad is not None and not vectors.grad.any()
        assert all(parameter.grad is not None for parameter in pool.parameters())

    def test_same_bits_in_every_run(self, pooling: str) -> None:
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


SAMPLES = torch.tensor(GROUP_OF_SAMPLE)
WEIGHED = [name for name, each in AGGREGATORS.items() if each.weights is not Aggregator.weights]


class Model(torch.nn.Module):
    """A model as far as its aggregators go."""

    def __init__(self, **aggregators: torch.nn.Module) -> None:
        super().__init__()
        self.aggregators = torch.nn.ModuleDict(aggregators)


def arguments(pooling: str, groups: list[list[int]] = GROUPS) -> tuple[Any, ...]:
    samples = SAMPLES if groups is GROUPS else torch.arange(len(groups))
    queries = [values(len(samples), width) for width in QUERY_WIDTHS[pooling]]
    return field_of(groups, values(4, WIDTH)), samples, queries


def by_sample(found: PairWeights) -> list[torch.Tensor]:
    """The weights of each sample, (behaviours, channels)."""
    return list(found.weight_NC.split(found.lengths_B.tolist()))


def histories() -> list[list[int]]:
    return [GROUPS[group] for group in GROUP_OF_SAMPLE]


@pytest.mark.parametrize("pooling", ["attentive", "multi_query"])
def test_attention_is_what_the_sum_is_made_with(pooling: str) -> None:
    pool, given = built(pooling), arguments(pooling)
    field = given[0]
    pooled = pool(*given)
    for sample, weights in enumerate(by_sample(pool.weights(*given))):
        keys = field.vectors_UV[torch.tensor(histories()[sample], dtype=torch.int64)]
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1]).double() * bool(len(keys)))
        summed = (weights.T.unsqueeze(2) * keys).sum(1).flatten()
        torch.testing.assert_close(summed, pooled[sample])


@pytest.mark.parametrize("pooling", AGGREGATORS)
@pytest.mark.parametrize("groups", [GROUPS, [[], []]], ids=["some", "no behaviour"])
def test_noting_changes_no_bit(pooling: str, groups: list[list[int]]) -> None:
    pool, given = built(pooling), arguments(pooling, groups)
    model: Any = Model(images=pool, others=built("sum"))

    def run() -> list[torch.Tensor]:
        pooled = pool(*given)
        gradients = torch.autograd.grad(pooled.square().sum(), [given[0].vectors_UV, *pool.parameters()])
        return [pooled, *gradients]

    usual = run()
    with noted_weights(model) as found:
        noted = run()
    assert all(torch.equal(one, other) for one, other in zip(usual, noted, strict=True))
    assert list(found) == (["images"] if pooling in WEIGHED else [])
    if found:
        assert torch.equal(found["images"].weight_NC, pool.weights(*given).weight_NC)
    found.clear()
    pool(*given)
    assert not found  # nothing watches any more
