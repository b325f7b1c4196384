"""The items of a demo: drawn clothes, or own photographs, and how both look.

Shape, colour, pattern, size and background of drawn clothes are each chosen without a look at the others. So a category
(the shape) says nothing about colour or pattern: who knows only IDs cannot know them. The look of photographs is
measured from their pixels. Looks are standardised over the catalogue, so a taste is for "redder than most", whatever
the pictures are.
"""

import colorsys
import csv
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from featurestore.keys import BoolArray, Float64Array
from featurestore.storage.local import open_regular
from pipeline.demo.world import Catalogue, standardize
from pipeline.errors import BadImageError, DemoError
from pipeline.images.decode import decode
from pipeline.images.source import ImageRef, list_images, read_image
from pipeline.problems import Problem

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
    looks: dict[str, tuple[float, Float64Array]] = {  # each with its weight in a taste
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


def _colours(garment: Garment) -> tuple[Float64Array, Float64Array]:
    """Return main and pattern colour, 0-255: of the same hue, dark on light cloth and pale on dark cloth."""
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


def pattern_mask(pattern: str, side_px: int, period_px: float) -> BoolArray:
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


MEASURED_PX = 96  # measured on a small copy: quick, and blind to the grain of the camera
CENTRE = slice(MEASURED_PX // 5, MEASURED_PX - MEASURED_PX // 5)
MEASURE_THREADS = 4
NO_LABEL = "unlabelled"
MAX_LISTED = 20  # unreadable photographs in demo.json
# How much each attribute counts in a taste: colour first, as in the drawn clothes.
ATTRIBUTES = {"red_green": 1.0, "yellow_blue": 1.0, "light": 1.0, "vivid": 0.6, "contrast": 0.4, "texture": 0.4}


def measure_folder(images: Path, labels: Path | None) -> tuple[Catalogue, dict[str, Any]]:
    """Measure each readable image below `images` as an item; its category is from `labels` (image, label).

    The uri is the path below `images`; `image` in the table is that path, or the file's name, with or without its
    extension. Returns the catalogue, and what demo.json has of images that are not in it. Raises SourceError (no
    images) and DemoError (none readable, a table without the columns).
    """
    refs = list_images(str(images)).images
    label_of = _read_labels(labels) if labels else {}
    with ThreadPoolExecutor(MEASURE_THREADS) as pool:
        looks = list(pool.map(_try_measure, refs))
    good = [(ref, look) for ref, look in zip(refs, looks, strict=True) if not isinstance(look, str)]
    unreadable = [(ref.uri, look) for ref, look in zip(refs, looks, strict=True) if isinstance(look, str)]
    if not good:
        raise DemoError(Problem.NO_READABLE_IMAGE, len(refs), images, unreadable[0][1])
    labels_I = [_label(ref.uri, label_of) for ref, _ in good]
    names = sorted(set(labels_I))
    catalogue = Catalogue(
        uris=tuple(ref.uri for ref, _ in good),
        category_I=np.array([names.index(label) for label in labels_I], dtype=np.int64),
        category_names=tuple(names),
        look_IK=standardize(np.stack([look for _, look in good])),
        weight_K=np.array(list(ATTRIBUTES.values())),
        vivid=tuple(ATTRIBUTES).index("vivid"),
    )
    listed, num_unlabelled = dict(unreadable[:MAX_LISTED]), labels_I.count(NO_LABEL) if labels else 0
    return catalogue, {"unreadable": listed, "num_unreadable": len(unreadable), "num_unlabelled": num_unlabelled}


def measure(image: Image.Image) -> Float64Array:
    """Measure the attributes of one RGB image, (K,) in the order of ATTRIBUTES.

    Opponent colours are means over the centre, 0-255 apart; vivid is the colourfulness of Hasler and Suesstrunk
    (2003); contrast the deviation of brightness; texture the logarithm of the mean step between neighbours.
    """
    small = image.resize((MEASURED_PX, MEASURED_PX), Image.Resampling.BOX)
    red, green, blue = np.moveaxis(np.asarray(small, dtype=np.float64), -1, 0)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    middle_rg, middle_yb = red_green[CENTRE, CENTRE], yellow_blue[CENTRE, CENTRE]
    spread = np.hypot(middle_rg.std(), middle_yb.std())
    steps = np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()
    return np.array(
        [
            middle_rg.mean(),
            middle_yb.mean(),
            grey[CENTRE, CENTRE].mean(),
            spread + 0.3 * np.hypot(middle_rg.mean(), middle_yb.mean()),
            grey.std(),
            np.log1p(steps),
        ]
    )


def _try_measure(ref: ImageRef) -> Float64Array | str:
    """Measure the look, or give the reason why there is none."""
    try:
        return measure(decode(read_image(ref.location))[0])
    except BadImageError as error:
        return str(error)


def _read_labels(path: Path) -> dict[str, str]:
    """Read the label of each value of the column `image`."""
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            names = rows.fieldnames or ()
            if {"image", "label"} <= set(names):
                return {row["image"]: row["label"] for row in rows if row["image"] and row["label"]}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DemoError(Problem.REFUSED, "read", path, error) from error
    raise DemoError(Problem.NO_LABEL_COLUMNS, path, ", ".join(names) or "none")


def _label(uri: str, label_of: dict[str, str]) -> str:
    path = Path(uri)
    names = (uri, path.with_suffix("").as_posix(), path.name, path.stem)
    return next((label_of[name] for name in names if name in label_of), NO_LABEL)
