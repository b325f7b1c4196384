"""Drawn clothes: shape, colour, pattern, size and background, each chosen without a look at the others.

So a category (the shape) says nothing about colour or pattern: who knows only IDs cannot know them.
"""

import colorsys
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from pipeline.demo.world import Catalogue, standardize

CANVAS_PX = 480  # drawn at twice the size, then reduced: smooth edges
SIDE_PX = 240
JPEG_QUALITY = 90
HUES = {"red": 0, "orange": 30, "yellow": 58, "green": 120, "teal": 175, "blue": 220, "violet": 275, "pink": 325}
PATTERNS = ("plain", "stripes", "dots", "checks", "zigzag")
DUPLICATE_SHARE = 0.03  # sellers reuse photographs

Polygon = tuple[tuple[float, float], ...]
# Outlines on a unit square, x to the right and y down. A shape is the union of its polygons.
SHAPES: dict[str, tuple[Polygon, ...]] = {
    "t-shirt": (
        ((0.30, 0.12), (0.42, 0.17), (0.58, 0.17), (0.70, 0.12), (0.97, 0.32), (0.86, 0.46), (0.74, 0.38),
         (0.74, 0.92), (0.26, 0.92), (0.26, 0.38), (0.14, 0.46), (0.03, 0.32)),
    ),
    "longsleeve": (
        ((0.32, 0.10), (0.43, 0.15), (0.57, 0.15), (0.68, 0.10), (0.83, 0.20), (0.98, 0.78), (0.85, 0.82),
         (0.73, 0.40), (0.73, 0.92), (0.27, 0.92), (0.27, 0.40), (0.15, 0.82), (0.02, 0.78), (0.17, 0.20)),
    ),
    "trousers": (
        ((0.25, 0.06), (0.75, 0.06), (0.84, 0.95), (0.60, 0.95), (0.50, 0.34), (0.40, 0.95), (0.16, 0.95)),
    ),
    "dress": (
        ((0.36, 0.05), (0.42, 0.14), (0.58, 0.14), (0.64, 0.05), (0.70, 0.10), (0.65, 0.42), (0.90, 0.95),
         (0.10, 0.95), (0.35, 0.42), (0.30, 0.10)),
    ),
    "skirt": (((0.30, 0.16), (0.70, 0.16), (0.95, 0.88), (0.05, 0.88)),),
    "hat": (
        ((0.27, 0.60), (0.30, 0.28), (0.40, 0.18), (0.60, 0.18), (0.70, 0.28), (0.73, 0.60)),
        ((0.02, 0.60), (0.98, 0.60), (0.92, 0.74), (0.70, 0.80), (0.30, 0.80), (0.08, 0.74)),
    ),
    "shoe": (
        ((0.06, 0.30), (0.30, 0.30), (0.40, 0.46), (0.62, 0.54), (0.90, 0.60), (0.97, 0.74), (0.97, 0.80),
         (0.06, 0.80)),
    ),
    "bag": (
        ((0.12, 0.40), (0.88, 0.40), (0.95, 0.92), (0.05, 0.92)),
        ((0.30, 0.42), (0.34, 0.14), (0.66, 0.14), (0.70, 0.42), (0.62, 0.42), (0.59, 0.22), (0.41, 0.22),
         (0.38, 0.42)),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Garment:
    """One picture to draw; fractions of 1 unless said otherwise."""

    shape: str
    hue_deg: float
    saturation: float
    value: float
    pattern: str
    pattern_px: float
    size: float
    shift_x: float
    shift_y: float
    background: float  # brightness
    noise_seed: int


def plan_garments(num_items: int, seed: int) -> list[Garment]:
    """Draw `num_items` garments, all properties independent; about 3 % repeat an earlier one exactly."""
    rng = np.random.default_rng([seed, 1])
    shapes, hues = tuple(SHAPES), tuple(HUES.values())
    garments: list[Garment] = []
    for index in range(num_items):
        garment = Garment(
            shape=shapes[rng.integers(len(shapes))],
            hue_deg=float(hues[rng.integers(len(hues))] + rng.uniform(-9, 9)) % 360,
            saturation=float(rng.uniform(0.30, 1.0)),
            value=float(rng.uniform(0.45, 1.0)),
            pattern=PATTERNS[rng.integers(len(PATTERNS))],
            pattern_px=float(rng.uniform(52, 68)),
            size=float(rng.uniform(0.78, 0.96)),
            shift_x=float(rng.uniform(-0.5, 0.5)),
            shift_y=float(rng.uniform(-0.5, 0.5)),
            background=float(rng.uniform(0.80, 1.0)),
            noise_seed=int(rng.integers(2**31)),
        )
        reused = int(rng.integers(max(index, 1)))
        repeat = index > 0 and rng.random() < DUPLICATE_SHARE
        garments.append(garments[reused] if repeat else garment)
    return garments


def draw_garment(garment: Garment) -> bytes:
    """Draw the JPEG of one garment, 240 x 240; equal garments give equal bytes."""
    main, second = _colours(garment)
    covered = pattern_mask(garment.pattern, CANVAS_PX, garment.pattern_px)
    cloth = Image.fromarray(np.where(covered[..., None], second, main).astype(np.uint8))
    rng = np.random.default_rng(garment.noise_seed)
    level = 255 * garment.background
    tint = level - rng.uniform(0, 18, size=3)
    picture = Image.new("RGB", (CANVAS_PX, CANVAS_PX), (int(tint[0]), int(tint[1]), int(tint[2])))
    outline = _outline(garment)
    shadow = outline.filter(ImageFilter.GaussianBlur(8)).point(lambda level: level // 3)
    picture.paste((90, 90, 90), (6, 8), shadow)
    picture.paste(cloth, (0, 0), outline)
    small = np.asarray(picture.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX), dtype=np.float32)
    grain = rng.normal(0, 2.5, size=small.shape[:2])[..., None]
    buffer = io.BytesIO()
    Image.fromarray(np.clip(small + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def catalogue_of(garments: list[Garment]) -> Catalogue:
    """Make the catalogue of drawn garments; looks come from what was drawn."""
    shapes = tuple(SHAPES)
    hue_I = np.deg2rad([garment.hue_deg for garment in garments])
    looks: dict[str, tuple[float, NDArray[np.float64]]] = {  # each with its weight in a taste
        "hue_red_cyan": (2.0, np.cos(hue_I)),
        "hue_yellow_blue": (2.0, np.sin(hue_I)),
        "vivid": (0.4, np.array([garment.saturation for garment in garments])),
        "light": (0.3, np.array([garment.value for garment in garments])),
    }
    for pattern in PATTERNS[1:]:
        looks[pattern] = (0.4, np.array([float(garment.pattern == pattern) for garment in garments]))
    return Catalogue(
        uris=tuple(f"{garment.shape}/item-{index:05d}.jpg" for index, garment in enumerate(garments)),
        category_I=np.array([shapes.index(garment.shape) for garment in garments], dtype=np.int64),
        category_names=shapes,
        look_IK=standardize(np.stack([values for _, values in looks.values()], axis=1)),
        weight_K=np.array([weight for weight, _ in looks.values()]),
        vivid=tuple(looks).index("vivid"),
    )


def _colours(garment: Garment) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give main and pattern colour, 0-255: of the same hue, dark on light cloth and pale on dark cloth."""
    hue = garment.hue_deg / 360
    pale = garment.value < 0.7
    saturation, value = (garment.saturation * 0.35, 1.0) if pale else (garment.saturation, garment.value * 0.35)
    main = np.array(colorsys.hsv_to_rgb(hue, garment.saturation, garment.value)) * 255
    second = np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * 255
    return main, second


def _outline(garment: Garment) -> Image.Image:
    """Draw the mask (mode L) of the garment on the canvas."""
    room_px = (1 - garment.size) * CANVAS_PX
    left_px, top_px = room_px * (0.5 + garment.shift_x), room_px * (0.5 + garment.shift_y)
    scale_px = garment.size * CANVAS_PX
    mask = Image.new("L", (CANVAS_PX, CANVAS_PX), 0)
    pen = ImageDraw.Draw(mask)
    for polygon in SHAPES[garment.shape]:
        pen.polygon([(left_px + x * scale_px, top_px + y * scale_px) for x, y in polygon], fill=255)
    return mask


def pattern_mask(pattern: str, side_px: int, period_px: float) -> NDArray[np.bool_]:
    """Draw where the cloth has its second colour."""
    x, y = np.arange(side_px)[None, :], np.arange(side_px)[:, None]
    mask = np.zeros((side_px, side_px), dtype=np.bool_)
    if pattern == "stripes":
        mask |= y % period_px < period_px / 2
    elif pattern == "dots":
        mask |= (x % period_px - period_px / 2) ** 2 + (y % period_px - period_px / 2) ** 2 < (0.33 * period_px) ** 2
    elif pattern == "checks":
        mask |= (x // (0.75 * period_px) % 2 == 0) ^ (y // (0.75 * period_px) % 2 == 0)
    elif pattern == "zigzag":
        tooth = np.abs(x % (2 * period_px) - period_px)
        mask |= (y + tooth) % (1.2 * period_px) < 0.5 * period_px
    return mask
