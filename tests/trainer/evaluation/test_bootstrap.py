"""Metrics of resamples against torchmetrics and loops over repeated impressions; intervals and their coverage."""

import numpy as np
import pytest
import torch

from trainer.evaluation.bootstrap import (
    LEAST_USERS_SHOWN,
    METRICS,
    Estimate,
    MetricSums,
    auc_of_groups,
    bins_of,
    bootstrap,
    draws,
    interval,
    log_loss,
    measure,
    probability,
    shown,
)

Scored = tuple[np.ndarray, np.ndarray, np.ndarray]


def scored(seed: int = 0, count: int = 1_500, users: int = 60, levels: int = 40) -> Scored:
    """Logits with many ties, labels, users 0 to `users` - 1 of unequal size, some with one class only."""
    random = np.random.default_rng(seed)
    user_N = np.r_[np.arange(users), np.minimum(random.geometric(3 / users, count - users), users) - 1]
    logit_N = random.integers(0, levels, count) / levels * 3 - 2
    return logit_N, (random.random(count) < probability(logit_N)).astype(np.float64), user_N


def auroc(logit_N: np.ndarray, label_N: np.ndarray) -> float:
    from torchmetrics.functional.classification import binary_auroc  # brings all of scipy.signal: not to each process

    # In (0, 1), so that torchmetrics makes no sigmoid of them, which could tell equal numbers apart by their last bit.
    scaled_N = (logit_N - logit_N.min()) / (logit_N.max() - logit_N.min() + 1)
    return float(binary_auroc(torch.from_numpy(scaled_N), torch.from_numpy(label_N).long()))


def plain(logit_N: np.ndarray, label_N: np.ndarray, user_N: np.ndarray) -> list[float]:
    """The METRICS, in their order, by loops."""
    p_N = 1 / (1 + np.exp(-logit_N))
    loss = -np.mean(label_N * np.log(p_N) + (1 - label_N) * np.log(1 - p_N))
    weighted, counted = 0.0, 0
    for user in np.unique(user_N):
        mine = user_N == user
        if 0 < label_N[mine].sum() < mine.sum():
            weighted += mine.sum() * auroc(logit_N[mine], label_N[mine])
            counted += int(mine.sum())
    values = [auroc(logit_N, label_N), weighted / counted, loss, p_N.sum() / label_N.sum()]
    return [float(value) for value in values]


@pytest.mark.parametrize("levels", [3, 40, 100_000])
def test_metrics_equal_torchmetrics_and_loops(levels: int) -> None:
    logit_N, label_N, user_N = scored(levels=levels)
    found = MetricSums(logit_N, label_N, user_N).at(np.ones((1, 60)))[0, : len(METRICS)]
    assert found == pytest.approx(plain(logit_N, label_N, user_N), abs=1e-6)


def test_resamples_equal_really_repeated_impressions() -> None:
    logit_N, label_N, user_N = scored()
    sums = MetricSums(logit_N, label_N, user_N)
    for weight_U in next(draws(60, 3, seed=4)):
        assert weight_U.max() >= 2
        assert weight_U.min() == 0
        drawn = np.repeat(np.arange(60), weight_U.astype(int))
        rows = np.concatenate([np.flatnonzero(user_N == user) for user in drawn])
        # A user drawn twice is two users to GAUC.
        again_N = np.concatenate([np.full((user_N == user).sum(), at) for at, user in enumerate(drawn)])
        expected = plain(logit_N[rows], label_N[rows], again_N)
        assert sums.at(weight_U[None])[0, : len(METRICS)] == pytest.approx(expected, abs=1e-6)


def test_a_set_of_some_users_follows_the_draws_of_all() -> None:
    logit_N, label_N, user_N = scored()
    some = user_N >= 30
    weight_BU = next(draws(60, 5, seed=1))
    found = MetricSums(logit_N[some], label_N[some], user_N[some]).at(weight_BU)
    alone = MetricSums(logit_N[some], label_N[some], user_N[some] - 30).at(weight_BU[:, 30:])
    assert found == pytest.approx(alone, nan_ok=True)


def test_bins_are_of_equally_many_impressions_and_equal_predictions_stay_together() -> None:
    assert np.bincount(bins_of(np.random.default_rng(0).random(5_000))).tolist() == [500] * 10
    assert np.bincount(bins_of(np.random.default_rng(0).random(350))).tolist() == [117, 116, 117]
    assert set(bins_of(np.full(5_000, 0.1))) == {0}
    assert len(bins_of(np.empty(0))) == 0


def test_reliability_equals_a_loop_over_bins() -> None:
    logit_N, label_N, user_N = scored(levels=100_000)
    p_N, bin_N = probability(logit_N), bins_of(logit_N)
    sums = MetricSums(logit_N, label_N, user_N)
    found = sums.at(np.ones((1, 60)))[0, len(METRICS) :]
    each_bin = range(10)
    assert found[:10] == pytest.approx([p_N[bin_N == each].mean() for each in each_bin])
    assert found[10:] == pytest.approx([label_N[bin_N == each].mean() for each in each_bin])
    assert sums.count_K.tolist() == [150] * 10
    assert sums.users_K.tolist() == [len(np.unique(user_N[bin_N == each])) for each in each_bin]


def test_draws_hang_on_the_seed_alone() -> None:
    whole = np.concatenate(list(draws(37, 100, seed=5)))
    assert whole.shape == (100, 37)
    assert (whole.sum(axis=1) == 37).all()
    assert (np.concatenate(list(draws(37, 100, seed=5))) == whole).all()
    assert not (np.concatenate(list(draws(37, 100, seed=6))) == whole).all()
    # Each user about once: 3,700 draws of one in 37.
    assert np.abs(whole.mean(axis=0) - 1).max() < 0.4


@pytest.mark.parametrize(("by_user", "at_least", "at_most"), [(True, 0.91, 0.99), (False, 0.0, 0.88)])
def test_intervals_over_users_hold_the_truth_as_often_as_they_say(
    by_user: bool, at_least: float, at_most: float
) -> None:
    """That of predicted / clicked, which is 1, in 60 worlds; those over impressions would not."""
    held, at = 0, METRICS.index("calibration")
    for world in range(60):
        random = np.random.default_rng(world)
        # A user's mood is not in the predictions: clicks of one user go together.
        user_N = np.repeat(np.arange(80), 10)
        p_N = np.clip(0.3 + np.repeat(random.uniform(-0.25, 0.25, 80), 10), 0, 1)
        label_N = (random.random(800) < p_N).astype(np.float64)
        unit_N = user_N if by_user else np.arange(800)
        count = unit_N.max() + 1
        found = bootstrap([MetricSums(np.full(800, np.log(0.3 / 0.7)), label_N, unit_N)], count, 200, seed=world)[0]
        estimate = interval(found.value_M[at], found.draws_RM[:, at], users=count)
        assert estimate.low is not None and estimate.high is not None
        held += estimate.low <= 1 <= estimate.high
    assert at_least <= held / 60 <= at_most


def test_an_interval_is_the_middle_of_the_resamples_where_there_are_users_and_defined_ones() -> None:
    draws_R = np.arange(1_001) / 1_000
    assert interval(0.4, draws_R, users=50) == Estimate(0.4, pytest.approx(0.025), pytest.approx(0.975))
    assert interval(0.4, draws_R, users=9) == Estimate(0.4, None, None)
    assert interval(float("nan"), draws_R, users=50) == Estimate(None, None, None)
    assert interval(0.4, np.empty(0), users=50) == Estimate(0.4, None, None)
    for defined, has_interval in ((500, False), (501, True)):
        half_R = np.where(np.arange(1_001) < defined, draws_R, np.nan)
        assert (interval(0.1, half_R, users=50).low is not None) == has_interval


def test_a_measurement_is_that_of_the_sample_itself() -> None:
    logit_N, label_N, user_N = scored()
    auc, gauc, loss, *_ = plain(logit_N, label_N, user_N)
    shuffled = np.random.default_rng(0).permutation(len(logit_N))
    for order in (slice(None), shuffled):
        found = measure(logit_N[order], label_N[order], user_N[order] * 7919 - 5)
        assert (found["logloss"], found["auc"], found["gauc"]) == pytest.approx((loss, auc, gauc), abs=1e-6)
        both = [user for user in range(60) if 0 < label_N[user_N == user].mean() < 1]
        assert found["gauc_impressions"] == np.isin(user_N, both).sum() < len(user_N) == found["impressions"]
        assert found["gauc_users"] == len(both)


@pytest.mark.parametrize("prefix", ["", "new_ad_"])
def test_a_metric_of_a_few_users_is_not_shown(prefix: str) -> None:
    logit_N, label_N, user_N = np.array([0.1, 0.2] * 40), np.array([0.0, 1.0] * 40), np.arange(80) // 2
    for users, is_shown in ((LEAST_USERS_SHOWN - 1, False), (LEAST_USERS_SHOWN, True)):
        found = measure(logit_N[: 2 * users], label_N[: 2 * users], user_N[: 2 * users], prefix)
        for name in ("logloss", "auc", "gauc"):
            assert found[prefix + name] is not None
            assert shown(found, prefix + name) == (found[prefix + name] if is_shown else None)
        assert shown(found, f"{prefix}impressions") == 2 * users
    without_clicks = measure(logit_N, label_N * (user_N < LEAST_USERS_SHOWN - 1), user_N, prefix)
    assert shown(without_clicks, f"{prefix}auc") and shown(without_clicks, f"{prefix}gauc") is None


def test_log_loss_of_sure_and_wrong_is_not_capped() -> None:
    assert log_loss(np.array([800.0, -800.0]), np.array([0.0, 0.0])) == pytest.approx(400.0)


def test_one_class_or_nothing_is_none() -> None:
    all_clicked, none_clicked = (
        MetricSums(np.zeros(30), np.full(30, label), np.arange(30) // 2).at(np.ones((1, 15)))[0] for label in (1.0, 0.0)
    )
    assert np.isnan(all_clicked[[0, 1]]).all() and np.isnan(none_clicked[[0, 1, 3]]).all()
    assert none_clicked[2] == pytest.approx(np.log(2))
    clicks = measure(np.array([0.1, 0.2]), np.ones(2), np.array([1, 1]))
    assert (clicks["auc"], clicks["gauc"], clicks["gauc_impressions"]) == (None, None, 0)
    nothing = measure(np.zeros(0), np.zeros(0), np.zeros(0, np.int64), "new_ad_")
    assert nothing == {f"new_ad_{name}": None for name in ("logloss", "auc", "gauc")} | {
        f"new_ad_{name}": 0 for name in ("impressions", "clicks", "users", "gauc_impressions", "gauc_users")
    }


def test_neighbouring_users_with_equal_scores_do_not_share_ranks() -> None:
    group_N = np.array([0, 0, 0, 1, 1])
    assert auc_of_groups(np.zeros(5), np.array([1, 0, 0, 1, 0]), group_N).auc_G.tolist() == [0.5, 0.5]
    score_N = np.array([0.1, 0.2, 0.3, 0.3, 0.4])
    assert auc_of_groups(score_N, np.array([0, 0, 1, 0, 1]), group_N).auc_G.tolist() == [1, 1]
