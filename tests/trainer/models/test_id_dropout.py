"""ID dropout: which fields, which samples, and that a run of several ranks drops what one rank drops."""

import numpy as np
import torch

from trainer.exchange.vectors import FieldVectors
from trainer.models.newads import IdDropout, dropped, own_ids_of_ads
from trainer.samples.reader import Batch
from trainer.schema import Field, Schema, load_schema

SCHEMA = Schema(
    fields=(
        Field(name="ad_item", side="ad", kind="id", table="item"),
        Field(name="behavior_item", side="user", kind="multi_id", table="item"),
        Field(name="ad_picture_ids", side="ad", kind="multi_id", table="image", column="ad_image"),
        Field(name="ad_image", side="ad", kind="content"),
        Field(name="ad_category", side="ad", kind="id"),
    )
)


def _batch(samples: int, first_place: int = 0) -> Batch:
    none = np.zeros(0)
    places_B = np.arange(first_place, first_place + samples)
    return Batch({}, {}, none, np.zeros(samples, np.float32), none, 100, place_B=places_B)


def _field(values: list[list[int]], rows: int = 5) -> FieldVectors:
    vectors_UV = torch.arange(1.0, 1 + 2 * rows).reshape(rows, 2).requires_grad_()
    lengths_M = torch.tensor([len(row) for row in values], dtype=torch.int64)
    return FieldVectors(vectors_UV, torch.tensor([v for row in values for v in row], dtype=torch.int64), lengths_M)


def test_own_ids_are_those_that_are_new_with_a_new_ad() -> None:
    assert own_ids_of_ads(load_schema()) == ("ad_item", "ad_image_id")
    assert own_ids_of_ads(SCHEMA) == ("ad_item", "ad_picture_ids")
    crossed = [
        Field(name=f"ad_{name}_in_scene", side="ad", kind="id", columns=(f"ad_{name}", "ad_scene"))
        for name in ("item", "image", "category")
    ]
    assert own_ids_of_ads(Schema(fields=(*SCHEMA.fields, *crossed)))[2:] == ("ad_item_in_scene", "ad_image_in_scene")


def test_share_of_samples() -> None:
    drawn = np.stack([dropped(3, step, np.arange(1000), 0.3) for step in range(50)])
    assert abs(drawn.mean() - 0.3) < 0.01
    assert abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 0.1
    assert (drawn[0] != dropped(4, 0, np.arange(1000), 0.3)).any()
    assert dropped(3, 0, np.arange(0), 0.3).shape == (0,)


def test_ranks_drop_what_one_rank_drops() -> None:
    whole = dropped(3, 7, np.arange(100), 0.5)
    for places_B in (np.arange(33), np.arange(0), np.r_[40:60, 90:100, 3]):
        assert dropped(3, 7, places_B, 0.5).tolist() == whole[places_B].tolist()


def test_vectors_of_dropped_samples_are_zero_and_get_no_gradient() -> None:
    dropout = IdDropout(SCHEMA, 0.5, seed=1)
    items = [[0], [1], [2], [3], [4], [0]]
    pictures = [[0, 1], [], [2], [3, 3, 4], [], [1]]
    vectors = {"ad_item": _field(items), "ad_picture_ids": _field(pictures), "ad_category": _field(items)}
    given = dropout(vectors, _batch(6, first_place=10), step=4)
    gone = dropped(1, 4, np.arange(10, 16), 0.5)
    assert 0 < gone.sum() < 6
    assert given["ad_category"] is vectors["ad_category"]
    for name, rows in (("ad_item", items), ("ad_picture_ids", pictures)):
        taken = given[name].vectors_UV[given[name].index_N]
        before = vectors[name].vectors_UV[vectors[name].index_N]
        keep = torch.tensor([not g for g, row in zip(gone, rows, strict=True) for _ in row], dtype=torch.bool)
        assert torch.equal(taken[keep], before[keep])
        assert (taken[~keep] == 0).all()
        taken.sum().backward()
        counts = torch.bincount(vectors[name].index_N[keep], minlength=5).float()
        assert torch.equal(vectors[name].vectors_UV.grad, counts.unsqueeze(1).expand(5, 2))


def test_pictures_are_dropped_by_a_draw_of_their_own() -> None:
    vectors = {"ad_item": _field([[0]] * 400), "ad_image": _field([[1]] * 400), "seen_image": _field([[2]] * 400)}
    given = IdDropout(SCHEMA, 0.5, seed=1, image_rate=0.25)(vectors, _batch(400, first_place=10), step=4)
    places_B = np.arange(10, 410)
    gone = {"ad_item": dropped(1, 4, places_B, 0.5), "ad_image": dropped(1, 4, places_B, 0.25, "image_dropout")}
    assert 0.15 < gone["ad_image"].mean() < 0.35
    assert 0 < (gone["ad_item"] & gone["ad_image"]).sum() < gone["ad_image"].sum()
    for name, gone_B in gone.items():
        taken = given[name].vectors_UV[given[name].index_N]
        assert ((taken == 0).all(1).numpy() == gone_B).all()
    assert given["seen_image"] is vectors["seen_image"]


def test_none_dropped_at_zero() -> None:
    vectors = {"ad_item": _field([[0], [1]])}
    assert IdDropout(SCHEMA, 0.0, seed=1)(vectors, _batch(2), 0) == vectors


def test_a_rank_without_samples() -> None:
    given = IdDropout(SCHEMA, 0.5, seed=1)({"ad_item": _field([])}, _batch(0), 0)
    assert given["ad_item"].index_N.shape == (0,)
