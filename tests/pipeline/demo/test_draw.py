"""Drawn clothes: equal seeds give equal bytes, the look is in the pixels, and the category does not tell it."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.demo.items import PATTERNS, SHAPES, SIDE_PX, Garment, catalogue_of, draw_garment, plan_garments
from pipeline.demo.world import standardize


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)), dtype=np.float64)


def _garment(**changes: object) -> Garment:
    fields = {
        "shape": "t-shirt",
        "hue_deg": 0.0,
        "saturation": 0.9,
        "value": 0.9,
        "pattern": "plain",
        "pattern_px": 60.0,
        "size": 0.9,
        "shift_x": 0.0,
        "shift_y": 0.0,
        "background": 0.95,
        "noise_seed": 1,
    }
    return Garment(**(fields | changes))  # type: ignore[arg-type]


def test_equal_seeds_draw_equal_bytes() -> None:
    first, again, other = (plan_garments(12, seed) for seed in (3, 3, 4))
    assert [draw_garment(garment) for garment in first] == [draw_garment(garment) for garment in again]
    assert [draw_garment(garment) for garment in first] != [draw_garment(garment) for garment in other]


def test_a_drawing_is_a_jpeg_of_the_promised_size() -> None:
    image = Image.open(io.BytesIO(draw_garment(_garment())))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIDE_PX, SIDE_PX))


def test_a_few_items_share_their_picture() -> None:
    garments = plan_garments(1000, 0)
    repeats = len(garments) - len(set(garments))
    assert 10 <= repeats <= 60
    catalogue = catalogue_of(garments)
    assert len(set(catalogue.uris)) == 1000, "each item has its own file all the same"


def test_the_category_says_nothing_about_the_look() -> None:
    catalogue = catalogue_of(plan_garments(4000, 0))
    of_category = np.eye(len(SHAPES))[catalogue.category_I]
    correlation = standardize(of_category).T @ catalogue.look_IK / catalogue.num_items
    assert np.abs(correlation).max() < 0.07, "4,000 independent items: a standard error of 0.016"


@pytest.mark.parametrize(("hue_deg", "strongest"), [(0, 0), (120, 1), (240, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_colour_is_in_the_pixels(shape: str, hue_deg: float, strongest: int) -> None:
    cloth = _pixels(draw_garment(_garment(shape=shape, hue_deg=hue_deg))).min(axis=2) < 80
    mean = _pixels(draw_garment(_garment(shape=shape, hue_deg=hue_deg)))[cloth].mean(axis=0)
    assert mean.argmax() == strongest
    assert cloth.mean() > 0.15, "the cloth fills a good part of the picture"


def test_every_pattern_is_seen_and_differs_from_the_others() -> None:
    pictures = {pattern: _pixels(draw_garment(_garment(pattern=pattern))) for pattern in PATTERNS}
    for one in PATTERNS:
        for other in PATTERNS:
            distance = np.abs(pictures[one] - pictures[other]).mean()
            assert distance == 0 if one == other else distance > 3


def test_every_shape_differs_from_the_others() -> None:
    pictures = [_pixels(draw_garment(_garment(shape=shape))) for shape in SHAPES]
    for index, one in enumerate(pictures):
        assert all(np.abs(one - other).mean() > 3 for other in pictures[:index])


def test_looks_are_standardised_and_follow_the_drawing() -> None:
    garments = plan_garments(500, 1)
    catalogue = catalogue_of(garments)
    np.testing.assert_allclose(catalogue.look_IK.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(catalogue.look_IK.std(axis=0), 1, atol=1e-9)
    saturation = [garment.saturation for garment in garments]
    assert np.corrcoef(saturation, catalogue.look_IK[:, catalogue.vivid])[0, 1] == pytest.approx(1)


def test_a_column_without_variation_becomes_zero() -> None:
    table = standardize(np.array([[1e6, 1.0], [1e6, 3.0]]))
    np.testing.assert_allclose(table, [[0, -1], [0, 1]])
