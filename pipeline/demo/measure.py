"""What the demo's ceilings are: the truth, and observers of parts of it.

Looks are standardised over the catalogue, so a taste is for "redder than most", whatever the photographs are.
"""

import csv
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featurestore.storage.local import open_regular
from pipeline.demo import world as truth
from pipeline.demo.world import Catalogue, FloatArray, IntArray, World, standardize
from pipeline.errors import BadImageError, DemoError
from pipeline.images.decode import decode
from pipeline.images.imagetable import ImageRef
from pipeline.images.source import bytes_of, list_images

SIDE_PX = 96  # measured on a small copy: quick, and blind to the grain of the camera
CENTRE = slice(SIDE_PX // 5, SIDE_PX - SIDE_PX // 5)
THREADS = 4
NO_LABEL = "unlabelled"
# How much each attribute counts in a taste: colour first, as in the drawn clothes.
ATTRIBUTES = {"red_green": 1.0, "yellow_blue": 1.0, "light": 1.0, "vivid": 0.6, "contrast": 0.4, "texture": 0.4}


class MeasuredFolder(NamedTuple):
    """The catalogue of a folder, and what is not in it."""

    catalogue: Catalogue
    unreadable: list[tuple[str, str]]  # uri, reason
    num_unlabelled: int


def measure_folder(images: Path, labels: Path | None) -> MeasuredFolder:
    """Measure each readable image below `images` as an item; its category is from `labels` (image, label).

    The uri is the path below `images`; `image` in the table is that path, or the file's name, with or without its
    extension. Raises SourceError (no images) and DemoError (none readable, a table without the columns).
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
        look_names=tuple(ATTRIBUTES),
        weight_K=np.array(list(ATTRIBUTES.values())),
        vivid=tuple(ATTRIBUTES).index("vivid"),
    )
    return MeasuredFolder(catalogue, unreadable, labels_I.count(NO_LABEL) if labels else 0)


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
        return measure(decode(bytes_of(ref))[0])
    except BadImageError as error:
        return str(error)


def _read_labels(path: Path) -> dict[str, str]:
    """Read the label of each value of the column `image`."""
    with _opened(path) as rows:
        if not {"image", "label"} <= set(rows.fieldnames or ()):
            found = ", ".join(rows.fieldnames or ()) or "none"
            raise DemoError(f"{path} needs the columns image and label; it has {found}")
        return {row["image"]: row["label"] for row in rows if row["image"] and row["label"]}


@contextmanager
def _opened(path: Path) -> Iterator["csv.DictReader[str]"]:
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
            yield csv.DictReader(file, strict=True)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DemoError(f"cannot read the labels {path}: {error}") from error


def _label(uri: str, label_of: dict[str, str]) -> str:
    path = Path(uri)
    names = (uri, path.with_suffix("").as_posix(), path.name, path.stem)
    return next((label_of[name] for name in names if name in label_of), NO_LABEL)


# The trainer has an AUC and a GAUC too (evaluation/metrics.py), but this package may import its schema alone.
_SHORT_S = 5  # behaviours that took less were accidents


def auc(score_N: FloatArray, label_N: IntArray) -> float:
    """Compute the area under the ROC curve, ties counted half (Mann-Whitney); NaN where one class is missing."""
    num_clicks = int(label_N.sum())
    num_others = len(label_N) - num_clicks
    if num_clicks == 0 or num_others == 0:
        return float("nan")
    _, inverse_N, count = np.unique(score_N, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(count) - (count - 1) / 2
    rank_sum = float(middle_rank[inverse_N][label_N == 1].sum())
    return (rank_sum - num_clicks * (num_clicks + 1) / 2) / (num_clicks * num_others)


def gauc(score_N: FloatArray, label_N: IntArray, user_N: IntArray) -> float:
    """Average the AUC of each user, weighted by the user's rows; users with one class are left out."""
    order = np.argsort(user_N, kind="stable")
    total, weight = 0.0, 0
    for rows in np.split(order, np.flatnonzero(np.diff(user_N[order])) + 1):
        value = auc(score_N[rows], label_N[rows])
        if not np.isnan(value):
            total += value * len(rows)
            weight += len(rows)
    return total / weight if weight else float("nan")


def ceilings(world: World) -> dict[str, dict[str, float]]:
    """Compute AUC, GAUC and new-ad AUC on the test day, for those who know different parts of the truth.

    `everything` knows the logit but for its noise; `without_pixels` only the parts that IDs carry;
    `ids_and_memory` in addition remembers, for each item that is not new, how its look does with the average user;
    `behavior_pictures` in addition reads tastes and moods from the pictures that the user looked at in the 14 days
    before (the best linear reading of their mean look), and knows by their IDs the looks of ads that are not new.
    """
    test_T = np.flatnonzero(world.shown.day_N == world.num_days - 1)
    new_T = world.launch_day_I[world.shown.item_N[test_T]] == world.num_days - 1
    clicks = world.clicks
    remembered_N = clicks.logit(*truth.ID_PARTS) + np.where(
        world.launch_day_I[world.shown.item_N] < world.num_days - 1, _mean_by_item(world, clicks.parts["trend"]), 0.0
    )
    known = {
        "everything": clicks.logit(*truth.PIXEL_PARTS, *truth.ID_PARTS),
        "without_pixels": clicks.logit(*truth.ID_PARTS),
        "ids_and_memory": remembered_N,
        "behavior_pictures": remembered_N + read_from_pictures(world),
    }
    label_T, user_T = clicks.label_N[test_T], world.shown.user_N[test_T]
    return {
        name: {
            "auc": auc(score_N[test_T], label_T),
            "gauc": gauc(score_N[test_T], label_T, user_T),
            "new_ad_auc": auc(score_N[test_T][new_T], label_T[new_T]),
        }
        for name, score_N in known.items()
    }


def variance_shares(world: World) -> dict[str, float]:
    """Compute the share of the logit's variance of each part; they add up to 1 but for chance correlations."""
    variance = {name: float(np.var(part_N)) for name, part_N in world.clicks.parts.items()}
    total = sum(variance.values())
    return {name: value / total if total else 0.0 for name, value in variance.items()}


def read_from_pictures(world: World) -> FloatArray:
    """Read match and mood from the pictures of users' behaviours, (N,): least squares on the days before.

    Inputs: for each attribute of a look its mean over the behaviours times that of the ad, and the mean vividness.
    Behaviours are those of 14 days before the impression that were no accidents. Of ads new on the last day the looks
    are not known.
    """
    mean_NK = mean_looks(world)
    is_known_N = world.launch_day_I[world.shown.item_N] < world.num_days - 1
    meeting_NK = mean_NK * world.catalogue.look_IK[world.shown.item_N] * is_known_N[:, None]
    vivid_N1 = mean_NK[:, world.catalogue.vivid, None]
    inputs_NW = np.concatenate([meeting_NK, vivid_N1, np.ones_like(vivid_N1)], axis=1)
    wanted_N = world.clicks.parts["match"] + world.clicks.parts["mood"]
    train_N = world.shown.day_N < world.num_days - 1
    weight_W = np.linalg.lstsq(inputs_NW[train_N], wanted_N[train_N], rcond=None)[0]
    read_N: FloatArray = inputs_NW @ weight_W
    return read_N


def mean_looks(world: World) -> FloatArray:
    """Average the looks that each impression's user saw for a while in the 14 days before, (N, K); 0: nothing."""
    done, shown = world.behaviors, world.shown
    long_M = np.flatnonzero(done.dwell_s_N >= _SHORT_S)
    # One number for user and time: the users' behaviours lie one after the other, each user's in order of time.
    begin_s = world.start_s - truth.HISTORY_DAYS * truth.DAY_S
    span_s = 2 * (truth.HISTORY_DAYS + world.num_days) * truth.DAY_S
    key_M = done.user_N[long_M] * span_s + done.time_N[long_M] - begin_s
    order_M = np.argsort(key_M, kind="stable")
    look_MK = world.catalogue.look_IK[done.item_N[long_M[order_M]]]
    total_MK = np.concatenate([np.zeros((1, look_MK.shape[1])), np.cumsum(look_MK, axis=0)])
    end_N = shown.user_N * span_s + shown.time_N - begin_s
    first_N = np.maximum(end_N - truth.HISTORY_DAYS * truth.DAY_S, shown.user_N * span_s)
    low_N, high_N = (np.searchsorted(key_M[order_M], each) for each in (first_N, end_N))
    mean_NK: FloatArray = (total_MK[high_N] - total_MK[low_N]) / np.maximum(high_N - low_N, 1)[:, None]
    return mean_NK


def _mean_by_item(world: World, value_N: NDArray[Any]) -> FloatArray:
    """Average `value_N` over all rows of the item of each row (N,)."""
    item_N, num_items = world.shown.item_N, world.catalogue.num_items
    sum_I = np.bincount(item_N, weights=value_N, minlength=num_items)
    mean_I: FloatArray = sum_I / np.maximum(np.bincount(item_N, minlength=num_items), 1)
    return mean_I[item_N]
