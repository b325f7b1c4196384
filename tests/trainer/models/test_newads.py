"""New ads: which they are, whether their pictures count, which IDs are their own, and refusals."""

import numpy as np
import pytest
import torch

from trainer.config import ExactTableConfig, ModelConfig, load_config
from trainer.errors import ConfigError
from trainer.exchange.vectors import FieldVectors
from trainer.models.nets import build_model
from trainer.models.newads import NewAds, build_new_ads, dropped, own_ids_of_ads
from trainer.schema.fields import Field, Schema, load_schema

ITEM = Field(name="ad_item", side="ad", kind="id", table="item")
PICTURES = Field(name="ad_picture_ids", side="ad", kind="multi_id", table="image", column="ad_image")
IMAGE = Field(name="ad_image", side="ad", kind="content", width=3)
SCHEMA = Schema(fields=(ITEM, PICTURES, IMAGE))
START = 1e-4


def _config(**values: object) -> ModelConfig:
    tables = {"item": 9, "image": 9}
    return ModelConfig(**{"images": "ad", "image_dropout": 0.1, "id_init_std": START, "tables": tables, **values})


def _fields(items: list[float], pictures: list[list[float]]) -> dict[str, FieldVectors]:
    """Of each ad the farthest number of its item's row, and of the rows of its pictures."""
    ones = torch.ones(len(items), dtype=torch.int64)
    rows = [row for values in pictures for row in values]
    lengths = torch.tensor([len(values) for values in pictures])
    return {
        "ad_item": FieldVectors(torch.tensor([[0.0, -v] for v in items]), torch.arange(len(items)), ones),
        "ad_picture_ids": FieldVectors(torch.tensor([[v, 0.0] for v in rows]), torch.arange(len(rows)), lengths),
        "ad_image": FieldVectors(torch.randn(2, 3).requires_grad_(), torch.arange(len(items)) % 2, ones),
    }


def test_where_pictures_do_not_count_those_of_ads_without_a_trained_row_are_zero() -> None:
    gate = NewAds([IMAGE], ("ad_item", "ad_picture_ids"), _config()).eval()
    edge, trained = START * 3**0.5, 1e-3
    fields = _fields([edge, trained, edge, 0.0, edge], [[edge, edge], [edge], [edge, trained], [0.0], []])
    before = fields["ad_image"].vectors_UV[fields["ad_image"].index_N]
    is_new = torch.tensor([True, False, False, True, True])
    for counts in (True, False):
        gate.decide(pictures_count=counts)
        given = gate(fields)["ad_image"]
        after = given.vectors_UV[given.index_N]
        assert torch.equal(after[~is_new], before[~is_new])
        torch.testing.assert_close(after[is_new], before[is_new] * counts)
    in_training = gate.train()(fields)["ad_image"].vectors_UV
    assert torch.equal(in_training, fields["ad_image"].vectors_UV), "training sees all that are not dropped"


def test_an_id_crossed_with_the_context_does_not_tell_a_new_ad() -> None:
    """The export of ads' vectors has no rows of it."""
    crossed = Field(name="in_scene", side="ad", kind="id", columns=("ad_item", "ad_scene"), context=True)
    schema = Schema(fields=(*SCHEMA.fields, crossed))
    gate = build_new_ads(schema, schema.fields, _config())
    assert gate is not None
    gate.eval()
    nothing = FieldVectors(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    given = gate(_fields([0.0, 1.0], [[0.0], [0.0]]) | {"in_scene": nothing})
    assert len(given["ad_image"].vectors_UV) == 2


def exact(admit_after: int) -> ExactTableConfig:
    return ExactTableConfig(kind="exact", max_rows=9, admit_after=admit_after)


def test_rows_that_start_far_from_zero_or_late_cannot_tell_new_ads() -> None:
    with pytest.raises(ConfigError, match=r"image_dropout=0.1 .* model.id_init_std=0.05 .* set it to 0.001 or less"):
        load_config(None, ["model.image_dropout=0.1", "model.id_init_std=0.05"])
    with pytest.raises(ConfigError, match=r"=0.1 .* set model.tables.image.admit_after=1, or model.image_dropout=0"):
        build_model(SCHEMA, _config(tables={"item": 9, "image": exact(2)}))


@pytest.mark.parametrize(
    ("admit_after", "values", "has"),
    [(1, {}, True), (2, {"image_dropout": 0.0}, False), (2, {"images": "none"}, False)],
    ids=["in use", "nothing dropped", "no images"],
)
def test_models_that_have_no_use_for_it_have_none(admit_after: int, values: dict[str, object], has: bool) -> None:
    config = _config(tables={"item": 9, "image": exact(admit_after)}, **values)
    assert (build_model(SCHEMA, config).new_ads is not None) == has


def test_own_ids_are_those_that_are_new_with_a_new_ad() -> None:
    assert own_ids_of_ads(load_schema()) == ("ad_item", "ad_image_id")
    others = [
        Field(name="behavior_item", side="user", kind="multi_id", table="item"),
        Field(name="ad_category", side="ad", kind="id"),
    ]
    crossed = [
        Field(name=f"ad_{name}_in_scene", side="ad", kind="id", columns=(f"ad_{name}", "ad_scene"))
        for name in ("item", "image", "category")
    ]
    own = own_ids_of_ads(Schema(fields=(*SCHEMA.fields, *others, *crossed)))
    assert own == ("ad_item", "ad_picture_ids", "ad_item_in_scene", "ad_image_in_scene")


def test_share_of_samples() -> None:
    drawn = np.stack([dropped(3, step, np.arange(1000), 0.3) for step in range(50)])
    assert abs(drawn.mean() - 0.3) < 0.01
    assert abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 0.1
    assert (drawn[0] != dropped(4, 0, np.arange(1000), 0.3)).any()


def test_ranks_drop_what_one_rank_drops() -> None:
    whole = dropped(3, 7, np.arange(100), 0.5)
    for places_B in (np.arange(33), np.arange(0), np.r_[40:60, 90:100, 3]):
        assert dropped(3, 7, places_B, 0.5).tolist() == whole[places_B].tolist()


USER = Field(name="user", side="user", kind="id")
BEHAVIOR = Field(name="behavior_image", side="user", kind="content", width=3)


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ((ITEM, PICTURES, IMAGE, BEHAVIOR), {"images": "none"}),
        ((ITEM, PICTURES, IMAGE, BEHAVIOR), {"images": "behavior"}),
        ((ITEM, PICTURES, IMAGE, BEHAVIOR), {"id_proxy": False}),
        ((USER, IMAGE), {}),
    ],
    ids=["no images", "no images of ads", "unasked", "no ids of ads"],
)
def test_there_is_no_proxy_without_use(fields: tuple[Field, ...], values: dict[str, object]) -> None:
    config = ModelConfig(**{"images": "ad", "id_proxy": True, "id_width": 2, "pooling": "mean", **values})
    assert build_model(Schema(fields=fields), config).id_proxy is None
