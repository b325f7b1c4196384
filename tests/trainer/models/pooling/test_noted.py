"""Weights that aggregators give to behaviours: against plain loops, and noting them changes no bit of the pass."""

import math
from typing import Any

import pytest
import torch

from tests.trainer.models.pooling.test_aggregators import (
    GROUP_OF_SAMPLE,
    GROUPS,
    HIDDEN,
    LENGTH,
    QUERY_WIDTHS,
    WIDTH,
    built,
    field_of,
    score,
    values,
)
from trainer.models.nets import noted_weights
from trainer.models.pooling import AGGREGATORS, Aggregator, PairWeights

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


def histories(at_most: int | None = None) -> list[list[int]]:
    return [GROUPS[group][:at_most] for group in GROUP_OF_SAMPLE]


@pytest.mark.parametrize("pooling", WEIGHED)
def test_weights_of_a_sample_sum_to_one(pooling: str) -> None:
    pool = built(pooling)
    found = by_sample(pool.weights(*arguments(pooling)))
    seen = histories(LENGTH if pooling == "transformer" else None)
    assert [len(each) for each in found] == [len(each) for each in seen]
    for each in found:
        assert (each >= 0).all()
        if len(each):
            torch.testing.assert_close(each.sum(0), torch.ones(each.shape[1], dtype=each.dtype))


@pytest.mark.parametrize("pooling", ["attentive", "multi_query"])
def test_attention_is_what_the_sum_is_made_with(pooling: str) -> None:
    pool, given = built(pooling), arguments(pooling)
    field, _, queries = given
    pooled = pool(*given)
    for sample, weights in enumerate(by_sample(pool.weights(*given))):
        keys = field.vectors_UV[torch.tensor(histories()[sample], dtype=torch.int64)]
        for channel, unit in enumerate(pool.channels):
            scores = torch.tensor([score(unit, key, queries[channel][sample]).item() for key in keys])
            torch.testing.assert_close(weights[:, channel], scores.double().softmax(0), rtol=1e-5, atol=1e-6)
        summed = (weights.T.unsqueeze(2) * keys).sum(1).flatten()
        torch.testing.assert_close(summed, pooled[sample])


def test_a_transformer_looks_at_what_its_encoder_looks_at() -> None:
    pool, given = built("transformer"), arguments("transformer")
    field, _, queries = given
    for sample, (rows, found) in enumerate(zip(histories(LENGTH), by_sample(pool.weights(*given)), strict=True)):
        if not rows:
            continue
        of_ad = pool.of_ad.weight @ torch.cat([query[sample] for query in queries]) + pool.of_ad.bias
        tokens = torch.stack(
            [
                pool.of_behavior.weight @ field.vectors_UV[row] + pool.position_LH[k] + of_ad
                for k, row in enumerate(rows)
            ]
        )
        attention = pool.encoder.attention
        query, key, _ = (tokens @ attention.of_tokens.weight.T + attention.of_tokens.bias).chunk(3, dim=1)
        expected = [0.0] * len(rows)
        for head in torch.arange(HIDDEN).chunk(attention.HEADS):
            for asking in range(len(rows)):
                scores = [(query[asking, head] @ key[k, head]).item() / len(head) ** 0.5 for k in range(len(rows))]
                total = sum(math.exp(each) for each in scores)
                for k, each in enumerate(scores):
                    expected[k] += math.exp(each) / total / attention.HEADS / len(rows)
        torch.testing.assert_close(found.squeeze(1), torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)


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
