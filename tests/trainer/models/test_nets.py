"""Every base net: its inputs, a logit for each sample, what it refuses.

Layers against plain loops, dropout, starts; aggregators of nothing, in every run, and weights.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from explorer.data.impressions.open_runs import OpenedRun
from tests.raised import raises
from trainer.config import BaseNet, ModelConfig, Pooling, SeenImages
from trainer.errors import ConfigError, DataError
from trainer.exchange.vectors import FieldVectors, take_rows
from trainer.models.layers import (
    HiddenLayers,
    PlacedDropout,
    StepPlace,
    expand_rows,
    segment_max,
    segment_softmax,
    segment_sum,
    width_of,
)
from trainer.models.nets import build_model
from trainer.models.pooling import AGGREGATORS, Aggregator
from trainer.problems import Problem
from trainer.samples.reader import Batch, Jagged
from trainer.schema.fields import Field, Schema, load_schema

SCHEMA = Schema(
    fields=(
        Field(name="user", side="user", kind="id"),
        Field(name="age", side="user", kind="dense"),
        Field(name="behavior_item", side="user", kind="multi_id", table="item", width=4),
        Field(name="behavior_shop", side="user", kind="multi_id", table="shop"),
        Field(name="behavior_image", side="user", kind="content"),
        Field(name="behavior_title", side="user", kind="content", store="titles", width=2),
        Field(name="ad_item", side="ad", kind="id", table="item", width=4),
        Field(name="ad_shop", side="ad", kind="id", table="shop"),
        Field(name="price", side="ad", kind="dense", width=2),
        Field(name="ad_image", side="ad", kind="content"),
        Field(name="ad_title", side="ad", kind="content", store="titles", width=2),
    )
)
BASES = [base for base in get_args(BaseNet) if base != "two_tower"]  # which takes no aggregator
POOLINGS = get_args(Pooling)
LENGTHS = torch.tensor([2, 0, 3])
GROUP_OF_SAMPLE = torch.tensor([0, 0, 1, 2, 2])


def config(**settings: object) -> ModelConfig:
    small = {"id_width": 3, "visual_width": 5, "mlp": [6], "attention_hidden": 4, "pooling_length": 2}
    return ModelConfig.model_validate({**small, **settings})


def inputs_of(model: torch.nn.Module, settings: ModelConfig, empty: bool = False) -> tuple:
    """Drawn vectors of all fields of three groups and five samples, or of none."""
    fields, dense = {}, {}
    for field in model.fields:
        rows = 0 if empty else 3 if field.side == "user" else 5
        many = field.kind == "multi_id" or (field.kind == "content" and field.side == "user")
        lengths = LENGTHS[:rows] if many else torch.ones(rows, dtype=torch.int64)
        count, width = int(lengths.sum()), width_of(field, settings)
        if field.kind == "dense":
            dense[field.name] = torch.randn(rows, width)
        else:
            vectors = torch.randn(count, width, requires_grad=True)
            fields[field.name] = FieldVectors(vectors, torch.arange(count), lengths)
    return fields, dense, GROUP_OF_SAMPLE[: 0 if empty else 5]


@pytest.mark.parametrize("base", BASES)
class TestEveryBaseNet:
    @pytest.mark.parametrize("images", get_args(SeenImages))
    @pytest.mark.parametrize("empty", [False, True], ids=["samples", "no sample"])
    def test_a_logit_for_each_sample(self, base: str, images: str, empty: bool) -> None:
        settings = config(base=base, images=images)
        model = build_model(SCHEMA, settings)
        fields, dense, group_of_sample = inputs_of(model, settings, empty)
        logit = model(fields, dense, group_of_sample)
        assert logit.shape == (0 if empty else 5,)
        logit.sum().backward()
        assert all(field.vectors_UV.grad is not None for field in fields.values())
        assert all(parameter.grad is not None for parameter in model.parameters())

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_takes_every_aggregator(self, base: str, pooling: str) -> None:
        settings = config(base=base, pooling=pooling)
        model = build_model(SCHEMA, settings)
        assert list(model.aggregators) == ["behavior_image", "behavior_title"]
        assert model(*inputs_of(model, settings)).shape == (5,)


@pytest.mark.parametrize(
    "settings", [{"base": "lr"}, {"images": "ad"}, {"images": "none"}], ids=["lr", "no behaviour images", "no images"]
)
def test_no_products_where_nothing_is_to_multiply(settings: dict[str, str]) -> None:
    assert not build_model(SCHEMA, config(**settings)).products


def test_din_refuses_lists_of_unequal_length() -> None:
    model = build_model(SCHEMA, config(base="din", images="none"))
    lists = {"behavior_item": np.array([2, 2, 2]), "behavior_shop": np.array([2, 3, 2])}
    fields = {name: Jagged(np.zeros(lengths.sum(), np.int64), lengths) for name, lengths in lists.items()}
    batch = Batch(fields, {}, np.arange(3), np.zeros(3, np.float32), np.zeros(3, np.int64), 3)
    pair = {"where": "behavior_item", "value": 2, "other": "behavior_shop", "other_count": 3}
    with raises(DataError, Problem.UNPAIRED_BEHAVIORS, **pair):
        model.check(batch)
    build_model(SCHEMA, config(base="mlp")).check(batch)
    fields["behavior_shop"] = fields["behavior_item"]
    model.check(batch)


CONTEXT = (
    Field(name="scene", side="ad", kind="id", context=True),
    Field(name="hour", side="ad", kind="dense", width=2, context=True),
)
USER, AGE, BEHAVIORS, _, BEHAVIOR_IMAGE, _, AD_ITEM, *_, AD_IMAGE, _ = SCHEMA.fields


def cover(**names: str) -> Field:
    return Field(**{"side": "ad", "kind": "content", "name": "cover", **names})


NO_PART = Problem.NAME_OF_NO_PART


def named(where: str, setting: str, value: str, better: str) -> dict[str, str]:
    return {"where": where, "setting": setting, "value": value, "better": better}


@pytest.mark.parametrize(
    ("fields", "settings", "problem", "values"),
    [
        ([USER, BEHAVIORS], {"base": "din", "images": "none"}, Problem.NO_PAIRED_FIELDS, {}),
        ([USER], {"images": "ad"}, Problem.NO_CONTENT_FIELD, {"value": "ad", "side": "ad"}),
        ([BEHAVIOR_IMAGE], {"images": "behavior"}, Problem.NO_FIELD_TO_QUERY, {"value": "attentive"}),
        ([BEHAVIOR_IMAGE, AD_IMAGE], {"pooling": "multi_query"}, Problem.NO_IDS_TO_QUERY, {"value": "multi_query"}),
        ([cover(store="items")], {"images": "ad"}, NO_PART, named("cover", "store", "items", "items")),
        ([cover(store="a.b")], {"images": "ad"}, NO_PART, named("cover", "store", "a.b", "a_b")),
        ([cover(name="keys")], {"images": "ad"}, NO_PART, named("keys", "name", "keys", "keys")),
        ([AGE], {"images": "none"}, Problem.NO_FIELD_TO_LEARN, {}),
        ([AD_ITEM], {"base": "two_tower", "images": "none"}, Problem.TOWER_WITHOUT_FIELD, {"side": "user"}),
        ([USER, *CONTEXT], {"base": "two_tower", "images": "none"}, Problem.TOWER_WITHOUT_FIELD, {"side": "ad"}),
        (SCHEMA.fields, {"base": "two_tower", "dropout": 0.1}, Problem.DROPOUT_IN_TOWER, {}),
    ],
)
def test_refusals(fields: Sequence[Field], settings: dict[str, str], problem: Problem, values: dict[str, str]) -> None:
    with raises(ConfigError, problem, **values):
        build_model(Schema(fields=tuple(fields)), config(**settings))


def test_context_adds_to_the_logit_of_two_towers_and_is_in_no_vector() -> None:
    settings = config(base="two_tower", tower_width=7, activation="prelu")
    model = build_model(Schema(fields=(*SCHEMA.fields, *CONTEXT)), settings)
    fields, dense, groups = inputs_of(model, settings)
    before, ads = model(fields, dense, groups), model.ad_vectors(fields, dense)
    scene = fields["scene"]
    fields["scene"] = FieldVectors(1 + scene.vectors_UV, scene.index_N, scene.lengths_M)
    dense["hour"] = dense["hour"] + 1
    assert torch.equal(model.ad_vectors(fields, dense), ads)
    assert not torch.isclose(model(fields, dense, groups), before).any()
    assert model.context is not None and model.context.bias is None


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
OF_GROUPS = [0, 0, 1, 2, 3, 3, 3, 1, 4]


def field_of(groups: list[list[int]], vectors: Tensor) -> FieldVectors:
    flat = [index for group in groups for index in group]
    return FieldVectors(vectors, torch.tensor(flat, dtype=torch.int64), torch.tensor([len(g) for g in groups]).long())


def built(pooling: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(pooling=pooling, attention_hidden=4, pooling_length=LENGTH)
    layers = HiddenLayers(ModelConfig(activation="prelu"), StepPlace())
    return AGGREGATORS[pooling](WIDTH, QUERY_WIDTHS[pooling], config, layers).double()


def arguments(pooling: str, groups: list[list[int]] = GROUPS) -> tuple[Any, ...]:
    samples = torch.tensor(OF_GROUPS) if groups is GROUPS else torch.arange(len(groups))
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
        keys = given[0].vectors_UV[torch.tensor(GROUPS[OF_GROUPS[sample]], dtype=torch.int64)]
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1]).double() * bool(len(keys)))
        summed = (weights.T.unsqueeze(2) * keys).sum(1).flatten()
        torch.testing.assert_close(summed, pooled[sample])


@pytest.mark.parametrize("pooling", POOLINGS)
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

    usual, noted = run(), list[torch.Tensor]()
    trained = SimpleNamespace(engine=SimpleNamespace(model=model))
    opened: Any = SimpleNamespace(trained=trained, logits=lambda batch: noted.extend(run()))
    found = OpenedRun.weights(opened, None)
    assert all(torch.equal(one, other) for one, other in zip(usual, noted, strict=True))
    assert list(found) == (["images"] if weighed else [])
    if found:
        assert torch.equal(found["images"].weight_NC, pool.weights(*given).weight_NC)
    found.clear()
    pool(*given)
    assert not found  # nothing watches any more
