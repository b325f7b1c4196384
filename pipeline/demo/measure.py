"""The look of own photographs, measured from their pixels.

Looks are standardised over the catalogue, so a taste is for "redder than most", whatever the photographs are.
"""

import csv
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featurestore.storage.local import open_regular
from pipeline.demo.world import Catalogue, FloatArray, standardize
from pipeline.errors import BadImageError, DemoError
from pipeline.images.decode import decode
from pipeline.images.imagetable import ImageRef
from pipeline.images.source import list_images, read_image

SIDE_PX = 96  # measured on a small copy: quick, and blind to the grain of the camera
CENTRE = slice(SIDE_PX // 5, SIDE_PX - SIDE_PX // 5)
THREADS = 4
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
    with ThreadPoolExecutor(THREADS) as pool:
        looks = list(pool.map(_try_measure, refs))
    good = [(ref, look) for ref, look in zip(refs, looks, strict=True) if not isinstance(look, str)]
    unreadable = [(ref.uri, look) for ref, look in zip(refs, looks, strict=True) if isinstance(look, str)]
    if not good:
        raise DemoError(f"none of the {len(refs)} images in {images} can be read; the first: {unreadable[0][1]}")
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


def measure(image: Image.Image) -> FloatArray:
    """Measure the attributes of one RGB image, (K,) in the order of ATTRIBUTES.

    Opponent colours are means over the centre, 0-255 apart; vivid is the colourfulness of Hasler and Suesstrunk
    (2003); contrast the deviation of brightness; texture the logarithm of the mean step between neighbours.
    """
    small = image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
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


def _try_measure(ref: ImageRef) -> FloatArray | str:
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
        raise DemoError(f"cannot read the labels {path}: {error}") from error
    raise DemoError(f"{path} needs the columns image and label; it has {', '.join(names) or 'none'}")


def _label(uri: str, label_of: dict[str, str]) -> str:
    path = Path(uri)
    names = (uri, path.with_suffix("").as_posix(), path.name, path.stem)
    return next((label_of[name] for name in names if name in label_of), NO_LABEL)
