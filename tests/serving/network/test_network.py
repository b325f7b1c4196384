"""Exported networks give the trainer's logits: every base net, aggregator and setting, at any number of anything."""

from pathlib import Path

import numpy as np
import pytest

from serving.network.exporting import PORTABLE, export_network
from serving.network.served import ServedNetwork
from tests.serving.network.drawn import Drawn, config, model_of, schema, trainers_logits

BASES = ["lr", "mlp", "din", "dcn", "finalmlp", "two_tower"]
POOLINGS = ["concat", "max", "sum", "mean", "attentive", "multi_query", "transformer"]
SETTINGS: list[dict] = [
    *({"base": base} for base in BASES),
    *({"pooling": pooling} for pooling in POOLINGS),
    *({"images": images} for images in ("none", "ad", "behavior")),
    *({"base": base, "multi_hot": "sum", "image_products": False} for base in ("mlp", "din", "two_tower")),
    *({"pooling": pooling, "similarity_tiers": 3, "similarity_top_k": 5} for pooling in POOLINGS),
    {"similarity_tiers": 3},
    {"pooling": "transformer", "transformer_length": 1},
    {"pooling": "transformer", "transformer_length": 2, "transformer_layers": 2},
    {"pooling": "transformer", "similarity_top_k": 6, "transformer_length": 3},
    *({"base": base, "activation": "dice", "batch_norm": True, "dropout": 0.5} for base in ("mlp", "din", "finalmlp")),
    {"activation": "prelu"},
    {"base": "dcn", "cross_structure": "stacked"},
    {"base": "finalmlp", "feature_gates": False, "fusion_heads": 2},
    *({"image_holdout": 0.1, "base": base} for base in ("mlp", "two_tower")),
    *({"gallery": gallery, "image_holdout": 0.1, "pooling": pooling} for gallery, pooling in
      (("mean", "attentive"), ("max", "transformer"), ("mean", "concat"), ("max", "max"))),
]  # fmt: skip
USERS: list[tuple[list[int], list[int]]] = [
    *(([candidates], [33]) for candidates in (1, 2, 37, 200, 1000)),
    *(([candidates], [behaviors]) for candidates in (1, 5) for behaviors in (0, 1, 2, 3)),
    ([3, 1, 0, 7], [2, 0, 5, 33]),
    ([0, 0], [1, 0]),
]


def check(network: ServedNetwork, drawn: Drawn) -> None:
    for candidates, behaviors in USERS:
        inputs = drawn(candidates, behaviors)
        logits = network.score(inputs)
        expected = trainers_logits(drawn.model, inputs)
        rounding = 2e-6 * max(1, np.abs(expected).max(initial=0))
        np.testing.assert_allclose(logits, expected, rtol=0, atol=rounding, err_msg=f"{candidates} {behaviors}")
        assert logits.dtype == np.float32
        assert len(logits) < 2 or np.ptp(logits) > 1e-3, "candidates differ"


def drawn_of(settings: dict) -> Drawn:
    given = dict(settings)
    fields, chosen = schema(gallery=given.pop("gallery", None)), config(**given)
    return Drawn(model_of(fields, chosen), chosen)


@pytest.mark.long
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_portable(settings: dict, tmp_path: Path) -> None:
    drawn = drawn_of(settings)
    assert export_network(drawn.model, drawn.settings, tmp_path) == [tmp_path / PORTABLE]
    check(ServedNetwork.load(tmp_path), drawn)
