"""Two towers: what the inner product of their vectors is worth, with and without fields of context, and refusals."""

import pytest
import torch
from torch import Tensor

from trainer.config import ModelConfig
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


def test_layers_that_need_a_row_for_each_sample_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"two_tower makes the user's vector once .*set model\.dropout=0"):
        TwoTower(Schema(fields=FIELDS), config(dropout=0.1))


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


@pytest.mark.parametrize(("side", "kept"), [("user", ("ad_item",)), ("ad", ("user", "scene"))])
def test_a_side_without_a_field_is_refused(side: str, kept: tuple[str, ...]) -> None:
    schema = Schema(fields=tuple(field for field in FIELDS if field.name in kept))
    with pytest.raises(ConfigError, match=rf"model\.base=two_tower needs a field of side {side}"):
        TwoTower(schema, config(images="none"))
