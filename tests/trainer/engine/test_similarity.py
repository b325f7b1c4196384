"""Tiers and nearest behaviours against plain loops; what cannot be compared is refused; the model learns from tiers."""

import math

import numpy as np
import pytest

from trainer.config.options import ModelConfig
from trainer.engine.similarity import BITS, WORDS, cosines, pairs_of_fields, similarity
from trainer.errors import ConfigError
from trainer.samples.reader import Batch, Jagged
from trainer.schema import Field

FIELDS = (
    Field(name="behavior_image", side="user", kind="content"),
    Field(name="ad_item", side="ad", kind="id"),
    Field(name="ad_image", side="ad", kind="content"),
)


def words_of(count: int, draw: np.random.Generator, unknown: float = 0.2) -> np.ndarray:
    """Signatures near one of three, some of images without a feature."""
    centres = draw.integers(0, 2**63, (3, WORDS - 1), dtype=np.uint64)
    noise = draw.integers(0, 2**63, (count, WORDS - 1), dtype=np.uint64)
    noise &= draw.integers(0, 2**63, (count, WORDS - 1), dtype=np.uint64)
    words = np.concatenate([centres[draw.integers(0, 3, count)] ^ noise, np.ones((count, 1), np.uint64)], axis=1)
    words[draw.random(count) < unknown] = 0
    return words


def batch_of(lengths_G: list[int], group_of_sample_B: list[int]) -> Batch:
    count = len(group_of_sample_B)
    return Batch(
        fields={
            "behavior_image": Jagged(np.arange(sum(lengths_G)), np.array(lengths_G, np.int32)),
            "ad_image": Jagged(np.arange(count), np.ones(count, np.int32)),
        },
        dense={},
        group_of_sample_B=np.array(group_of_sample_B, np.int64),
        label_B=np.zeros(count, np.float32),
        group_id_B=np.zeros(count, np.int64),
        global_samples=count,
    )


@pytest.mark.parametrize(("tiers", "top_k"), [(8, 0), (1, 3), (0, 2), (5, 100)])
def test_against_a_plain_loop(tiers: int, top_k: int) -> None:
    draw = np.random.default_rng(tiers + top_k)
    lengths, groups = [4, 0, 9, 1], [0, 0, 1, 2, 2, 2, 3]
    words_N, words_B = words_of(sum(lengths), draw), words_of(len(groups), draw)
    found = similarity(batch_of(lengths, groups), "behavior_image", words_B, words_N, tiers, top_k)
    starts = np.cumsum([0, *lengths])
    nearest = []
    for sample, group in enumerate(groups):
        counts, scored = [0] * tiers, []
        for value in range(starts[group], starts[group + 1]):
            if not words_N[value, -1] or not words_B[sample, -1]:
                continue
            differing = sum(
                (int(a) ^ int(b)).bit_count() for a, b in zip(words_N[value, :-1], words_B[sample, :-1], strict=True)
            )
            cosine = math.cos(math.pi * differing / BITS)
            scored.append((-cosine, value))
            if tiers:
                counts[min(int((cosine + 1) / 2 * tiers), tiers - 1)] += 1
        assert found.tiers_BT[sample].tolist() == pytest.approx([math.log1p(count) for count in counts], rel=1e-6)
        assert found.lengths_B[sample] == min(top_k, len(scored))
        nearest += [value for _, value in sorted(scored)[:top_k]]
    assert found.nearest_N.tolist() == nearest


def test_a_batch_without_samples() -> None:
    found = similarity(
        batch_of([], []), "behavior_image", np.zeros((0, WORDS), np.uint64), np.zeros((0, WORDS), np.uint64), 4, 2
    )
    assert found.tiers_BT.shape == (0, 4) and len(found.nearest_N) == len(found.lengths_B) == 0


def test_equal_signatures_are_one_and_opposite_ones_minus_one() -> None:
    words = words_of(1, np.random.default_rng(0), unknown=0)
    opposite = words.copy()
    opposite[:, :-1] = ~opposite[:, :-1]
    assert cosines(words, words)[0] == 1 and cosines(words, opposite)[0] == -1


def test_what_is_compared() -> None:
    tiers = ModelConfig(similarity_tiers=4)
    assert pairs_of_fields(FIELDS, tiers) == {"behavior_image": "ad_image"}
    assert pairs_of_fields(FIELDS, ModelConfig()) == {}
    other = Field(name="ad_image", side="ad", kind="content", store="text")
    for fields in (FIELDS[:2], (*FIELDS[:2], other), (*FIELDS, Field(name="b", side="ad", kind="content"))):
        with pytest.raises(ConfigError, match="compare field behavior_image with one content field"):
            pairs_of_fields(fields, tiers)
    with pytest.raises(ConfigError, match="need behaviour images"):
        pairs_of_fields(FIELDS[1:], tiers)
