"""Every base net: which inputs it takes, how wide they are, a logit for each sample, and what it refuses."""

from typing import get_args

import numpy as np
import pytest
import torch

from trainer.config import BaseNet, ModelConfig, Pooling, SeenImages
from trainer.errors import ConfigError, DataError
from trainer.exchange.vectors import FieldVectors
from trainer.models.layers import width_of
from trainer.models.nets import Din, TwoTower, build_model
from trainer.samples.reader import Batch, Jagged
from trainer.schema.fields import Field, Schema

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
IMAGES = get_args(SeenImages)
IDS_AND_DENSE = 3 + 1 + 4 + 3 + 4 + 3 + 2
LENGTHS = [2, 0, 3]
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
        lengths = torch.tensor(LENGTHS[:rows] if many else [1] * rows, dtype=torch.int64)
        count, width = int(lengths.sum()), width_of(field, settings)
        if field.kind == "dense":
            dense[field.name] = torch.randn(rows, width)
        else:
            vectors = torch.randn(count, width, requires_grad=True)
            fields[field.name] = FieldVectors(vectors, torch.arange(count), lengths)
    return fields, dense, GROUP_OF_SAMPLE[: 0 if empty else 5]


@pytest.mark.parametrize("base", BASES)
class TestEveryBaseNet:
    @pytest.mark.parametrize("images", IMAGES)
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

    @pytest.mark.parametrize("pooling", get_args(Pooling))
    def test_takes_every_aggregator(self, base: str, pooling: str) -> None:
        settings = config(base=base, pooling=pooling)
        model = build_model(SCHEMA, settings)
        assert list(model.aggregators) == ["behavior_image", "behavior_title"]
        assert model(*inputs_of(model, settings)).shape == (5,)

    @pytest.mark.parametrize("images", IMAGES)
    def test_looks_at_every_field(self, base: str, images: str) -> None:
        settings = config(base=base, images=images, pooling="sum")
        model = build_model(SCHEMA, settings)
        if base == "lr":
            torch.nn.init.normal_(model.weight)
        fields, dense, group_of_sample = inputs_of(model, settings)
        before = model(fields, dense, group_of_sample)
        for name in fields:
            assert not torch.equal(model({**fields, name: moved(fields[name])}, dense, group_of_sample), before), name
        for name in dense:
            assert not torch.equal(model(fields, {**dense, name: 1 + dense[name]}, group_of_sample), before), name


def moved(field: FieldVectors) -> FieldVectors:
    return FieldVectors(1 + field.vectors_UV, field.index_N, field.lengths_M)


@pytest.mark.parametrize(
    "settings", [{"base": "lr"}, {"images": "ad"}, {"images": "none"}], ids=["lr", "no behaviour images", "no images"]
)
def test_no_products_where_nothing_is_to_multiply(settings: dict[str, str]) -> None:
    assert not build_model(SCHEMA, config(**settings)).products


def test_din_pairs_fields_by_their_table_and_refuses_lists_of_unequal_length() -> None:
    model = build_model(SCHEMA, config(base="din", images="none"))
    assert isinstance(model, Din)
    assert model.attention.width == 4 + 3
    assert model.input_width == IDS_AND_DENSE - (4 + 3), "attended fields are not summed as well"
    assert model.mlp[0].in_features == IDS_AND_DENSE
    lists = {"behavior_item": np.array([2, 2, 2]), "behavior_shop": np.array([2, 3, 2])}
    fields = {name: Jagged(np.zeros(lengths.sum(), np.int64), lengths) for name, lengths in lists.items()}
    batch = Batch(fields, {}, np.arange(3), np.zeros(3, np.float32), np.zeros(3, np.int64), 3)
    message = "pairs behavior_item and behavior_shop value by value, but a user has 2 of the one and 3 of the other"
    with pytest.raises(DataError, match=message):
        model.check(batch)
    build_model(SCHEMA, config(base="mlp")).check(batch)
    fields["behavior_shop"] = fields["behavior_item"]
    model.check(batch)


USER, BEHAVIORS = SCHEMA.fields[0], SCHEMA.fields[2]
BEHAVIOR_IMAGE = Field(name="behavior_image", side="user", kind="content")
AD_IMAGE = Field(name="ad_image", side="ad", kind="content")


def cover(**names: str) -> Field:
    return Field(**{"side": "ad", "kind": "content", "name": "cover", **names})


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ([USER, BEHAVIORS], {"base": "din", "images": "none"}, r"=din needs a multi_id field .* set model\.base=mlp"),
        ([USER], {"images": "ad"}, r"model\.images=ad needs a field of kind content on side ad"),
        ([BEHAVIOR_IMAGE], {"images": "behavior"}, r"model\.pooling=attentive needs a field on side ad"),
        ([BEHAVIOR_IMAGE, AD_IMAGE], {"pooling": "multi_query"}, r"the ad's IDs too.*model\.pooling=attentive"),
        ([cover(store="items")], {"images": "ad"}, "field cover: store=items cannot name a part .* as my_items"),
        ([cover(store="a.b")], {"images": "ad"}, "store=a.b cannot name a part of the model; .* as my_a_b"),
        ([cover(name="keys")], {"images": "ad"}, "field keys: name=keys cannot name a part of the model"),
        ([SCHEMA.fields[1]], {"images": "none"}, "no field of kind id, multi_id or content"),
    ],
)
def test_refusals(fields: list[Field], settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(Schema(fields=tuple(fields)), config(**settings))


CONTEXT = (
    Field(name="scene", side="ad", kind="id", context=True),
    Field(name="hour", side="ad", kind="dense", width=2, context=True),
)


def towers(*fields: Field, **settings: object) -> tuple[TwoTower, ModelConfig]:
    chosen = config(base="two_tower", tower_width=7, activation="prelu", **settings)
    model = build_model(Schema(fields=fields), chosen)
    assert isinstance(model, TwoTower)
    return model, chosen


def test_context_adds_to_the_logit_of_two_towers_and_is_in_no_vector() -> None:
    model, settings = towers(*SCHEMA.fields, *CONTEXT)
    fields, dense, groups = inputs_of(model, settings)
    before, ads = model(fields, dense, groups), model.ad_vectors(fields, dense)
    fields["scene"], dense["hour"] = moved(fields["scene"]), dense["hour"] + 1
    assert torch.equal(model.ad_vectors(fields, dense), ads)
    assert not torch.isclose(model(fields, dense, groups), before).any()
    assert model.context is not None and model.context.bias is None


def test_the_inner_product_and_the_bias_are_all_there_is_without_context() -> None:
    model, settings = towers(*SCHEMA.fields)
    torch.nn.init.constant_(model.bias, 0.25)
    fields, dense, groups = inputs_of(model, settings)
    users, ads = model.user_vectors(fields, dense), model.ad_vectors(fields, dense)
    products = torch.stack([users[group] @ ads[sample] for sample, group in enumerate(groups)])
    torch.testing.assert_close(model(fields, dense, groups), products + 0.25)


@pytest.mark.parametrize(("side", "kept"), [("user", ("ad_item",)), ("ad", ("user", "scene"))])
def test_towers_without_a_field_or_with_a_row_for_each_sample_are_refused(side: str, kept: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"model\.base=two_tower needs a field of side {side}"):
        towers(*(field for field in (*SCHEMA.fields, *CONTEXT) if field.name in kept), images="none")
    with pytest.raises(ConfigError, match=r"two_tower makes the user's vector once .*set model\.dropout=0"):
        towers(*SCHEMA.fields, dropout=0.1)
