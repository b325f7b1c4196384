"""Two towers against a plain loop over samples: with and without images, with and without fields of context."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.config.options import ModelConfig
from trainer.errors import ConfigError
from trainer.exchange.vectors import FieldVectors
from trainer.models.nets import TwoTower
from trainer.schema import Field, Schema

FIELDS = (
    Field(name="user", side="user", kind="id"),
    Field(name="age", side="user", kind="dense"),
    Field(name="behavior_item", side="user", kind="multi_id"),
    Field(name="behavior_image", side="user", kind="content"),
    Field(name="ad_item", side="ad", kind="id", width=4),
    Field(name="ad_words", side="ad", kind="multi_id"),
    Field(name="scene", side="ad", kind="id", context=True),
    Field(name="hour", side="ad", kind="dense", width=2, context=True),
    Field(name="ad_image", side="ad", kind="content"),
)
GROUPS = torch.tensor([0, 0, 1, 2, 2])
USER_ROWS = {"user": [[4], [0], [4]], "behavior_item": [[1, 1], [], [0, 2, 3]], "behavior_image": [[2, 0], [], [1]]}
AD_ROWS = {"ad_item": [[0], [1], [2], [1], [3]], "ad_words": [[0], [], [1, 2], [3], [0, 0]]}
AD_ROWS |= {"scene": [[0], [1], [0], [1], [1]], "ad_image": [[0], [1], [2], [3], [4]]}
WIDTH = {"ad_item": 4, "behavior_image": 5, "ad_image": 5}


def config(**settings: object) -> ModelConfig:
    values = {
        "base": "two_tower",
        "id_width": 3,
        "visual_width": 5,
        "mlp": [6, 4],
        "tower_width": 7,
        "activation": "prelu",
        **settings,
    }
    return ModelConfig.model_validate(values)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch() -> tuple[dict[str, FieldVectors], dict[str, Tensor]]:
    """Vectors and dense values of three groups and five samples; rows are of uneven length, one is empty."""
    fields = {}
    for seed, (name, rows) in enumerate({**USER_ROWS, **AD_ROWS}.items()):
        index = torch.tensor([value for row in rows for value in row])
        lengths = torch.tensor([len(row) for row in rows])
        fields[name] = FieldVectors(draw(5, WIDTH.get(name, 3), seed=seed).requires_grad_(), index, lengths)
    return fields, {"age": draw(3, 1, seed=50), "hour": draw(5, 2, seed=51)}


def built(schema: Schema, images: str = "both", multi_hot: str = "mean") -> TwoTower:
    torch.manual_seed(0)
    model = TwoTower(schema, config(images=images, multi_hot=multi_hot)).double()
    with torch.no_grad():
        model.bias.fill_(0.25)
    return model


def tower(layers: Any, x: Tensor) -> Tensor:
    """Linear, PReLU, linear, PReLU, linear, written out."""
    for at in range(0, len(layers), 2):
        x = layers[at].weight @ x + layers[at].bias
        if at + 1 < len(layers):
            x = torch.where(x > 0, x, layers[at + 1].weight * x)
    return x


def plain(model: TwoTower, images: str, multi_hot: str) -> list[Tensor]:
    """Logits, sample by sample, from nothing but rows."""
    fields, dense = batch()

    def pooled(name: str, row: list[int]) -> Tensor:
        vectors = fields[name].vectors_UV
        total = sum((vectors[place] for place in row), torch.zeros(vectors.shape[1], dtype=torch.float64))
        return total / max(len(row), 1) if multi_hot == "mean" and not name.endswith("image") else total

    logits = []
    for sample, group in enumerate(GROUPS.tolist()):
        user = [pooled("user", USER_ROWS["user"][group]), dense["age"][group]]
        user.append(pooled("behavior_item", USER_ROWS["behavior_item"][group]))
        if images in ("behavior", "both"):
            user.append(pooled("behavior_image", USER_ROWS["behavior_image"][group]))
        ad = [pooled(name, AD_ROWS[name][sample]) for name in ("ad_item", "ad_words")]
        if images in ("ad", "both"):
            ad.append(pooled("ad_image", AD_ROWS["ad_image"][sample]))
        logit = tower(model.user_tower, torch.cat(user)) @ tower(model.ad_tower, torch.cat(ad)) + 0.25
        assert model.context is not None
        logit = logit + model.context.weight[0] @ torch.cat(
            [pooled("scene", AD_ROWS["scene"][sample]), dense["hour"][sample]]
        )
        logits.append(logit)
    return logits


@pytest.mark.parametrize("images", ["none", "ad", "behavior", "both"])
@pytest.mark.parametrize("multi_hot", ["mean", "sum"])
def test_logits_of_a_plain_loop(images: str, multi_hot: str) -> None:
    model = built(Schema(fields=FIELDS), images, multi_hot)
    fields, dense = batch()
    torch.testing.assert_close(model(fields, dense, GROUPS), torch.stack(plain(model, images, multi_hot)))


@pytest.mark.parametrize("setting", [{"dropout": 0.1}, {"batch_norm": True}])
def test_layers_that_need_a_row_for_each_sample_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"two_tower makes the user's vector once .*set model\.dropout=0"):
        TwoTower(Schema(fields=FIELDS), config(**setting))


def test_both_towers_have_the_same_width_and_the_user_s_runs_once_a_group() -> None:
    model = built(Schema(fields=FIELDS))
    rows: list[tuple[int, ...]] = []
    model.user_tower.register_forward_hook(lambda module, inputs, output: rows.append(tuple(output.shape)))
    model.ad_tower.register_forward_hook(lambda module, inputs, output: rows.append(tuple(output.shape)))
    model(*batch(), GROUPS)
    assert rows == [(3, 7), (5, 7)]


def test_context_adds_to_the_logit_and_is_in_no_vector() -> None:
    model = built(Schema(fields=FIELDS))
    fields, dense = batch()
    before, ads = model(fields, dense, GROUPS), model.ad_vectors(fields, dense)
    fields["scene"].index_N = 1 - fields["scene"].index_N
    dense["hour"] = dense["hour"] + 1
    assert torch.equal(model.ad_vectors(fields, dense), ads)
    assert not torch.isclose(model(fields, dense, GROUPS), before).any()
    assert model.context is not None and model.context.bias is None


def test_the_inner_product_and_the_bias_are_all_there_is_without_context() -> None:
    model = built(Schema(fields=tuple(field for field in FIELDS if not field.context)))
    fields, dense = batch()
    users, ads = model.user_vectors(fields, dense), model.ad_vectors(fields, dense)
    products = torch.stack([users[group] @ ads[sample] for sample, group in enumerate(GROUPS)])
    torch.testing.assert_close(model(fields, dense, GROUPS), products + 0.25)


def test_every_parameter_and_vector_gets_a_gradient() -> None:
    model = built(Schema(fields=FIELDS))
    fields, dense = batch()
    model(fields, dense, GROUPS).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert all(field.vectors_UV.grad is not None and field.vectors_UV.grad.any() for field in fields.values())


def test_a_rank_without_samples() -> None:
    model = built(Schema(fields=FIELDS))
    none = torch.zeros(0, dtype=torch.int64)
    fields = {
        name: FieldVectors(torch.zeros(0, WIDTH.get(name, 3), dtype=torch.float64, requires_grad=True), none, none)
        for name in (*USER_ROWS, *AD_ROWS)
    }
    dense = {"age": torch.zeros(0, 1, dtype=torch.float64), "hour": torch.zeros(0, 2, dtype=torch.float64)}
    logits = model(fields, dense, none)
    assert logits.shape == (0,)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(field.vectors_UV.grad is not None for field in fields.values())


@pytest.mark.parametrize(("side", "kept"), [("user", ("ad_item",)), ("ad", ("user", "scene"))])
def test_a_side_without_a_field_is_refused(side: str, kept: tuple[str, ...]) -> None:
    schema = Schema(fields=tuple(field for field in FIELDS if field.name in kept))
    with pytest.raises(ConfigError, match=rf"model\.base=two_tower needs a field of side {side}"):
        TwoTower(schema, config(images="none"))
