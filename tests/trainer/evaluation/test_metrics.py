"""Metrics against torchmetrics, user by user, and the cases without an answer."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from trainer.evaluation.bootstrap import auc, auc_of_groups, grouped_auc, log_loss, measure


def _impressions(seed: int, count: int, users: int, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with many ties (`levels` distinct values), labels, users of very unequal size."""
    random = np.random.default_rng(seed)
    user = np.minimum(random.geometric(2 / users, count), users).astype(np.int64) * 7919 - 5
    return random.integers(0, levels, count) / 4 - 1, (random.random(count) < 0.3).astype(np.float64), user


def _reference(score: np.ndarray, label: np.ndarray) -> float:
    # Scores in (0, 1), so that torchmetrics does not pass them through a sigmoid of its own.
    scaled = (score - score.min()) / (score.max() - score.min() + 1)
    return float(binary_auroc(torch.from_numpy(scaled), torch.from_numpy(label).long()))


@pytest.mark.parametrize("levels", [2, 9, 10_000])
def test_auc_equals_torchmetrics_with_ties(levels: int) -> None:
    score, label, _ = _impressions(levels, 3_000, 50, levels)
    assert auc(score, label) == pytest.approx(_reference(score, label), abs=1e-6)


@pytest.mark.parametrize("levels", [3, 1_000])
def test_gauc_equals_a_loop_over_users(levels: int) -> None:
    score, label, user = _impressions(1, 2_000, 80, levels)
    weighted, impressions = 0.0, 0
    for each in np.unique(user):
        mine = user == each
        if 0 < label[mine].sum() < mine.sum():
            weighted += mine.sum() * _reference(score[mine], label[mine])
            impressions += int(mine.sum())
    assert impressions < len(label), "the case needs users with one class"
    gauc, counted = grouped_auc(score, label, user)
    assert counted == impressions
    assert gauc == pytest.approx(weighted / impressions, abs=1e-6)


def test_values_by_hand() -> None:
    # User 1: the click beats one of two, ties with the other: 0.75. User 2: one class, left out. User 3: 0 of 1 pairs.
    score = np.array([0.5, 0.5, 0.1, 0.9, 0.2, 0.8])
    label = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    user = np.array([1, 1, 1, 2, 3, 3])
    assert grouped_auc(score, label, user) == (pytest.approx((3 * 0.75 + 2 * 0.0) / 5), 5)


def test_order_does_not_matter() -> None:
    score, label, user = _impressions(2, 500, 20, 5)
    shuffled = np.random.default_rng(0).permutation(500)
    assert grouped_auc(score, label, user) == grouped_auc(score[shuffled], label[shuffled], user[shuffled])


def test_log_loss_of_sure_and_wrong_is_not_capped() -> None:
    assert log_loss(np.array([800.0, -800.0]), np.array([0.0, 0.0])) == pytest.approx(400.0)
    assert log_loss(np.array([0.0]), np.array([1.0])) == pytest.approx(np.log(2))


def test_one_class_or_nothing_is_none() -> None:
    clicks = measure(np.array([0.1, 0.2]), np.ones(2), np.array([1, 1]))
    assert (clicks["auc"], clicks["gauc"], clicks["gauc_impressions"]) == (None, None, 0)
    assert clicks["logloss"] is not None
    assert measure(np.zeros(0), np.zeros(0), np.zeros(0, np.int64), "new_ad_") == {
        "new_ad_impressions": 0,
        "new_ad_clicks": 0,
        "new_ad_logloss": None,
        "new_ad_auc": None,
        "new_ad_gauc": None,
        "new_ad_gauc_impressions": 0,
    }


def test_neighbouring_users_with_equal_scores_do_not_share_ranks() -> None:
    group_N = np.array([0, 0, 0, 1, 1])
    tied = auc_of_groups(np.zeros(5), np.array([1, 0, 0, 1, 0]), group_N)
    assert tied.auc_G.tolist() == [0.5, 0.5]
    touching = auc_of_groups(np.array([0.1, 0.2, 0.3, 0.3, 0.4]), np.array([0, 0, 1, 0, 1]), group_N)
    assert touching.auc_G.tolist() == [1, 1]
