"""Bytes on the wire: the paper's table 2 for 20 ranks, made of what two ranks sent by collective.

A run with images and one without differ in the images alone: the keys asked, the vectors that came, their gradients.
All are counted at the ranks' Comm.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.report import Figure, Section

PAPER_RANKS = 20
_KEY_BYTES = 8
_BF16_BYTES = 2
_PARTS = ("step.keys", "step.vectors", "step.gradients", "step.dense")


def traffic_section(both: Mapping[str, Any], none: Mapping[str, Any], dim: int) -> Section:
    """Make the table of one global batch of 20 ranks. `both`, `none`: reports of runs with images, and of IDs alone.

    An image that a rank asks of another costs our exchange a key, a vector and a gradient. The paper counts keys with
    the IDs, so `image_bytes_reduction` leaves them out on both sides; `..._with_keys` has them on both. Dense gradients
    go around the ranks in a ring, whatever the alternative.
    """
    ranks = int(both["num_ranks"])
    assert ranks == int(none["num_ranks"]) > 1
    with_images, ids = _parts(both), _parts(none)
    images = {part: with_images[part] - ids[part] for part in _PARTS}
    asked = images["step.keys"] / _KEY_BYTES  # of others, over all ranks
    vector_bytes = (images["step.vectors"] + images["step.gradients"]) / asked
    # A rank asks others for (P - 1) / P of its different images, and there are more ranks.
    scale = PAPER_RANKS / ranks * ((PAPER_RANKS - 1) / PAPER_RANKS) / ((ranks - 1) / ranks)
    asked_20, references_20 = asked * scale, both["image_references_per_step"] / ranks * PAPER_RANKS
    feature_bytes = dim * _BF16_BYTES
    id_bytes = scale * sum(ids[part] for part in ("step.keys", "step.vectors", "step.gradients"))
    dense_bytes = with_images["step.dense"] * (PAPER_RANKS - 1) / (ranks - 1)  # a ring: 2 (P - 1) times, over all ranks
    figures: dict[str, Figure] = {
        "image_bytes_reduction": feature_bytes / vector_bytes,
        "image_bytes_reduction_with_keys": (feature_bytes + _KEY_BYTES) / (vector_bytes + _KEY_BYTES),
        "images_asked_of_others_per_rank": asked_20 / PAPER_RANKS,
        "measured_bytes_per_step_2_ranks": sum(with_images.values()),
    }
    grid: dict[str, dict[str, Figure]] = {
        "ours": _row(asked_20 * vector_bytes, asked_20, id_bytes, dense_bytes),
        "store_in_server": _row(asked_20 * feature_bytes, asked_20, id_bytes, dense_bytes),
        "store_in_worker": _row(references_20 * feature_bytes, 0, id_bytes, dense_bytes),
    }
    return Section(f"MB of one global batch of {PAPER_RANKS} ranks", figures, grid, prefix="mb_20_ranks_")


def _row(image_bytes: float, asked: float, id_bytes: float, dense_bytes: float) -> dict[str, Figure]:
    return {
        "images": image_bytes / 1e6,
        "image_keys": asked * _KEY_BYTES / 1e6,
        "ids": id_bytes / 1e6,
        "dense": dense_bytes / 1e6,
        "all": (image_bytes + asked * _KEY_BYTES + id_bytes + dense_bytes) / 1e6,
    }


def _parts(report: Mapping[str, Any]) -> dict[str, float]:
    """Bytes per step by the first two parts of the collectives' names."""
    sums = dict.fromkeys(_PARTS, 0.0)
    for name, sent in report["bytes_by_collective_per_step"].items():
        part = ".".join(name.split(".")[:2])
        if part in sums:
            sums[part] += sent
    return sums
