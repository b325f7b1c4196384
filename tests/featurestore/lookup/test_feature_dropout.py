"""Masks of images: by step, network, layer, key and column alone."""

import numpy as np

from featurestore.lookup.feature_dropout import EmbeddingDropout

KEYS = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 300)


def test_share_and_growth() -> None:
    kept_QW, grown = EmbeddingDropout(1).kept("shared/hidden0", KEYS, 1001, 0.3)
    assert kept_QW.shape == (300, 1001)
    assert abs(kept_QW.mean() - (1 - 77 / 256)) < 0.005
    assert grown == 256 / (256 - 77)
    rows, columns = kept_QW.mean(1), kept_QW.mean(0)
    assert max(np.ptp(rows), np.ptp(columns)) < 0.2
    everything, grown = EmbeddingDropout(1).kept("shared/hidden0", KEYS, 10, 0.0)
    assert everything.all()
    assert grown == 1


def test_a_key_has_one_mask_in_any_company() -> None:
    dropout = EmbeddingDropout(1, step=7)
    whole, _ = dropout.kept("shared/hidden0", KEYS, 50, 0.5)
    part, _ = dropout.kept("shared/hidden0", KEYS[[200, 3]], 50, 0.5)
    assert (part == whole[[200, 3]]).all()
    assert dropout.kept("shared/hidden0", KEYS[:0], 50, 0.5)[0].shape == (0, 50)


def test_masks_of_other_steps_layers_seeds_and_neighbouring_keys_are_others() -> None:
    mine, _ = EmbeddingDropout(1, step=7).kept("shared/hidden0", np.arange(300), 50, 0.5)
    others = [
        EmbeddingDropout(1, step=8).kept("shared/hidden0", np.arange(300), 50, 0.5),
        EmbeddingDropout(1, step=7).kept("shared/hidden1", np.arange(300), 50, 0.5),
        EmbeddingDropout(2, step=7).kept("shared/hidden0", np.arange(300), 50, 0.5),
        EmbeddingDropout(1, step=7).kept("shared/hidden0", np.arange(300) + 1, 50, 0.5),
    ]
    assert all(0.45 < (mine == other).mean() < 0.55 for other, _ in others)
    assert abs(np.corrcoef(mine[:-1].ravel(), mine[1:].ravel())[0, 1]) < 0.05
