"""What an ad's picture says about its IDs, and where it is said."""

import pytest
import torch

from trainer.config.options import ModelConfig
from trainer.exchange.vectors import FieldVectors
from trainer.models.nets import build_model
from trainer.models.newads import build_id_proxy
from trainer.schema import Field, Schema

ITEM = Field(name="ad_item", side="ad", kind="id", table="item")
PICTURES = Field(name="ad_picture_ids", side="ad", kind="multi_id", table="image", column="ad_image")
SCENE = Field(name="ad_scene_item", side="ad", kind="id", columns=("ad_item", "scene"), context=True)
IMAGE = Field(name="ad_image", side="ad", kind="content", width=3)
SCHEMA = Schema(fields=(ITEM, PICTURES, SCENE, IMAGE))


def _config(**values: object) -> ModelConfig:
    return ModelConfig(**{"images": "ad", "id_proxy": True, "id_width": 2, **values})


def _fields(lengths: list[int]) -> dict[str, FieldVectors]:
    """Ads that share two items and two pictures; the IDs of ad m's pictures are `lengths[m]` values."""
    num_ads, num_ids = len(lengths), sum(lengths)
    ones = torch.ones(num_ads, dtype=torch.int64)
    return {
        "ad_item": FieldVectors(torch.randn(2, 2).requires_grad_(), torch.arange(num_ads) % 2, ones),
        "ad_picture_ids": FieldVectors(
            torch.randn(3, 2), torch.arange(num_ids) % 3, torch.tensor(lengths, dtype=torch.int64)
        ),
        "ad_scene_item": FieldVectors(torch.randn(1, 2), torch.zeros(num_ads, dtype=torch.int64), ones),
        "ad_image": FieldVectors(torch.randn(2, 3).requires_grad_(), torch.arange(num_ads) // 2 % 2, ones),
    }


def _rows(field: FieldVectors) -> torch.Tensor:
    return field.vectors_UV[field.index_N]


def test_each_own_id_of_an_ad_gets_what_its_picture_says() -> None:
    proxy = build_id_proxy(SCHEMA, SCHEMA.fields, _config())
    assert proxy is not None and sorted(proxy.nets) == ["ad_item", "ad_picture_ids"]  # not that of the context
    fields = _fields([2, 0, 1, 3])
    given = proxy(fields)
    pictures = _rows(fields["ad_image"])
    torch.testing.assert_close(
        _rows(given["ad_item"]), _rows(fields["ad_item"]) + proxy.nets["ad_item"](pictures), rtol=1e-6, atol=1e-6
    )
    of_ad_N = torch.tensor([0, 0, 2, 3, 3, 3])
    expected = _rows(fields["ad_picture_ids"]) + proxy.nets["ad_picture_ids"](pictures)[of_ad_N]
    torch.testing.assert_close(_rows(given["ad_picture_ids"]), expected, rtol=1e-6, atol=1e-6)
    assert given["ad_scene_item"] is fields["ad_scene_item"] and given["ad_image"] is fields["ad_image"]
    _rows(given["ad_item"]).sum().backward()
    assert all(fields[name].vectors_UV.grad.abs().sum() > 0 for name in ("ad_item", "ad_image"))


def test_a_rank_without_samples() -> None:
    proxy = build_id_proxy(SCHEMA, SCHEMA.fields, _config())
    assert proxy is not None
    fields = {
        name: FieldVectors(field.vectors_UV[:0], field.index_N, field.lengths_M) for name, field in _fields([]).items()
    }
    given = proxy({**fields, "ad_picture_ids": _fields([])["ad_picture_ids"]})
    assert given["ad_item"].vectors_UV.shape == (0, 2) and given["ad_picture_ids"].vectors_UV.shape == (0, 2)
    given["ad_item"].vectors_UV.sum().backward()


@pytest.mark.parametrize("values", [{"images": "none"}, {"images": "behavior"}, {"id_proxy": False}])
def test_there_is_none_without_pictures_of_ads_or_unasked(values: dict[str, object]) -> None:
    images = Field(name="behavior_image", side="user", kind="content", width=3)
    schema = Schema(fields=(*SCHEMA.fields, images))
    assert build_model(schema, _config(pooling="mean", **values)).id_proxy is None


def test_there_is_none_without_ids_of_ads() -> None:
    schema = Schema(fields=(Field(name="user", side="user", kind="id"), IMAGE))
    assert build_model(schema, _config()).id_proxy is None
