"""Metrics of resamples against torchmetrics and loops over repeated impressions; intervals and their coverage.

Two models on the same impressions: the difference, its interval, its p-value; and what cannot be compared. What is told
of test impressions and of training, against loops over the rows; slices hold every impression once.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from featurestore.console.page import ReportPage, recorded
from tests.pages import check_page
from tests.raised import raises
from tests.trainer.conftest import write_samples
from trainer.comm import SoloComm
from trainer.errors import DataError, SchemaError
from trainer.evaluation import report
from trainer.evaluation.bootstrap import (
    LEAST_USERS_SHOWN,
    METRICS,
    Estimate,
    MetricSums,
    auc,
    auc_of_groups,
    bins_of,
    bootstrap,
    compare,
    draws,
    interval,
    log_loss,
    measure,
    new_to_both,
    probability,
    shown,
)
from trainer.evaluation.predict import (
    Impressions,
    Predictions,
    SeenInTraining,
    Slicing,
    gathered,
    seconds_of,
    seen_in_training,
    slicings,
    slicings_by,
)
from trainer.evaluation.report import compare_runs, number, range_of
from trainer.problems import Problem
from trainer.runs.saved import RunSource
from trainer.samples.index import open_index
from trainer.samples.reader import SampleReader
from trainer.schema.fields import load_schema

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


def test_resamples_equal_really_repeated_impressions_and_some_users_follow_the_draws_of_all() -> None:
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
    some = user_N >= 30
    weight_BU = next(draws(60, 5, seed=1))
    found = MetricSums(logit_N[some], label_N[some], user_N[some]).at(weight_BU)
    alone = MetricSums(logit_N[some], label_N[some], user_N[some] - 30).at(weight_BU[:, 30:])
    assert found == pytest.approx(alone, nan_ok=True)


def test_bins_are_of_equally_many_impressions_and_reliability_equals_a_loop_over_them() -> None:
    """Equal predictions stay together."""
    assert np.bincount(bins_of(np.random.default_rng(0).random(5_000))).tolist() == [500] * 10
    assert np.bincount(bins_of(np.random.default_rng(0).random(350))).tolist() == [117, 116, 117]
    assert set(bins_of(np.full(5_000, 0.1))) == {0}
    assert len(bins_of(np.empty(0))) == 0
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
    whole, same, other = (np.concatenate(list(draws(37, 100, seed=seed))) for seed in (5, 5, 6))
    assert whole.shape == (100, 37)
    assert (whole.sum(axis=1) == 37).all()
    assert (same == whole).all() and not (other == whole).all()
    # Each user about once: 3,700 draws of one in 37.
    assert np.abs(whole.mean(axis=0) - 1).max() < 0.4


@pytest.mark.parametrize(("by_user", "at_least", "at_most"), [(True, 0.91, 0.99), (False, 0.0, 0.88)])
def test_intervals_hold_the_truth_as_often_as_they_say(by_user: bool, at_least: float, at_most: float) -> None:
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
    for order in (slice(None), np.random.default_rng(0).permutation(len(logit_N))):
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


USERS, EACH = 120, 8
FOUND = ("label_N", "user_N", "ad_N")


def predictions(world: int, *noises: tuple[int, float]) -> list[Predictions]:
    """Models that see the true logit through noise: of one seed each, and of a standard deviation each."""
    random = np.random.default_rng(world)
    truth_N = random.normal(size=USERS * EACH)
    impressions = Impressions(
        label_N=(random.random(USERS * EACH) < probability(truth_N)).astype(np.float32),
        user_N=np.repeat(np.arange(USERS), EACH),
        ad_N=random.integers(0, 40, USERS * EACH),
    )
    return [
        Predictions(truth_N + np.random.default_rng([world, seed]).normal(size=len(truth_N)) * scale, impressions)
        for seed, scale in noises
    ]


def test_values_are_those_of_each_side() -> None:
    good, bad = predictions(0, (1, 0.2), (2, 2.0))
    found, back = (compare(*sides, resamples=200) for sides in ((good, bad), (bad, good)))
    label_N, user_N = good.impressions.label_N.astype(np.float64), good.impressions.user_N
    assert found["auc"].ours == pytest.approx(auc(good.logit_N, label_N))
    assert found["gauc"].baseline == pytest.approx(auc_of_groups(bad.logit_N, label_N, user_N).mean)
    for each in found.values():
        assert each.value == pytest.approx(each.ours - each.baseline)
        assert 0 < each.low < each.value < each.high
        other = back[each.metric]
        assert (other.value, other.low, other.high) == pytest.approx((-each.value, -each.high, -each.low))
        assert each.p_value == other.p_value == pytest.approx(1 / 201)


def test_pairing_makes_the_interval_narrow_and_equal_models_do_not_differ() -> None:
    one, two = predictions(0, (1, 0.5), (1, 0.55))
    found = compare(one, dataclasses.replace(one, logit_N=one.logit_N * 3), resamples=100)["gauc"]
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    paired = compare(one, two, resamples=400)["auc"]
    ones = [compare(each, dataclasses.replace(each, logit_N=np.zeros(USERS * EACH)))["auc"] for each in (one, two)]
    # Against a constant (AUC 0.5 in every resample) the width is that of one model's own AUC.
    assert paired.high - paired.low < 0.3 * min(each.high - each.low for each in ones)


def test_a_slice_is_measured_on_the_resamples_of_all_users() -> None:
    one, two = predictions(0, (1, 0.2), (2, 2.0))
    only_N = one.impressions.ad_N < 5
    found = compare(one, two, metrics=("auc",), resamples=50, seed=3, only_N=only_N)["auc"]
    label_N, user_N = one.impressions.label_N[only_N].astype(np.float64), one.impressions.user_N[only_N]
    ours, baseline = (auc(each.logit_N[only_N], label_N) for each in (one, two))
    assert (found.ours, found.baseline) == pytest.approx((ours, baseline))
    drawn = []
    for weight_BU in draws(USERS, 50, 3):
        for weight_U in weight_BU:
            at = np.repeat(np.flatnonzero(only_N), weight_U[user_N].astype(int))
            label = one.impressions.label_N[at].astype(np.float64)
            drawn.append(auc(one.logit_N[at], label) - auc(two.logit_N[at], label))
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
    nothing = compare(one, two, resamples=20, only_N=only_N & False)["auc"]
    assert (nothing.value, nothing.low) == (None, None)


def new_from(each: Predictions, ad: int) -> Predictions:
    """The same predictions of a run that was trained on the ads below `ad`."""
    return dataclasses.replace(each, is_new_ad_N=each.impressions.ad_N >= ad)


def test_an_ad_is_new_where_no_run_was_trained_on_it() -> None:
    one, two = predictions(0, (1, 0.2), (2, 2.0))
    assert (new_to_both(new_from(one, 20), new_from(two, 30)) == (one.impressions.ad_N >= 30)).all()
    for unknown in (two, new_from(two, 40)):  # nothing is known of its training, and it knows all
        assert not new_to_both(new_from(one, 20), unknown).any()
        assert not new_to_both(unknown, new_from(one, 20)).any()


@pytest.mark.parametrize("first_new", [30, 40])
def test_the_command_shows_new_ads_in_its_table_its_json_and_its_page(
    first_new: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = dict(zip("ab", (new_from(each, first_new) for each in predictions(0, (1, 0.2), (2, 2.0))), strict=True))
    monkeypatch.setattr(report, "predict_source", lambda source, comm: runs[source.folder.name])
    with recorded(ReportPage(tmp_path / "page.html", "T", [])):
        source = RunSource(tmp_path / "a", None)
        compare_runs(source, tmp_path / "b", SoloComm(), resamples=50, out=tmp_path)
    said, read = capsys.readouterr().out, check_page((tmp_path / "page.html").read_text())
    is_new_N = runs["a"].impressions.ad_N >= first_new
    expected = compare(*runs.values(), resamples=50, only_N=is_new_N) if is_new_N.any() else {}
    found = json.loads((tmp_path / "comparison.json").read_text())["new_ads"]
    assert found["impressions"] == is_new_N.sum()
    assert found["differences"] == {name: dataclasses.asdict(each) for name, each in expected.items()}
    assert f"{is_new_N.sum():,} impressions are of new ads" in said
    assert len(found["differences"]) == (2 if first_new == 30 else 0) == said.count(", new ads ")
    for title, each in zip(("GAUC", "AUC"), expected.values(), strict=False):
        value, span = number(each.value), range_of(each)
        assert read.value(f"{title}, new ads")[2:4] == [value, span]
        assert value in said and span in said


@pytest.mark.long
def test_p_values_of_equally_good_models_are_seldom_small() -> None:
    pairs = [predictions(world, (1, 1.0), (2, 1.0)) for world in range(100)]
    p_values = np.array([compare(one, two, resamples=200)["gauc"].p_value for one, two in pairs])
    assert 0 < (p_values < 0.1).mean() < 0.2
    assert 0.3 < p_values.mean() < 0.7


def test_other_impressions_are_refused() -> None:
    (one,), (other,) = predictions(0, (1, 0.5)), predictions(1, (1, 0.5))
    shorter = dataclasses.replace(one.impressions, **{name: getattr(one.impressions, name)[:-1] for name in FOUND})
    for changed in (other.impressions, shorter):
        with raises(DataError, Problem.OTHER_IMPRESSIONS, where="the other run", other="one run"):
            compare(one, Predictions(one.logit_N, changed))


def rows(tables: list[pa.Table]) -> list[dict[str, Any]]:
    """One dict for each impression, in order."""
    return [
        {"user": group["user"], "history": group["behavior_image"]} | {"ad": ad, "image": image, "label": label}
        for table in tables
        for group in table.to_pylist()
        for ad, image, label in zip(group["ad_item"], group["ad_image"], group["label"], strict=True)
    ]


def names_of(slicing: Slicing) -> list[str]:
    return [slicing.names[at] for at in slicing.slice_N]


def test_impressions_training_and_slices_equal_a_loop(tmp_path: Path) -> None:
    """Of three training files and a test file, of several row groups each."""
    train = rows(write_samples(tmp_path / "train", [6, 4, 20], items=30))
    test = rows(write_samples(tmp_path / "test", [40], seed=50, items=45))
    comm, schema = SoloComm(), load_schema()
    reader = SampleReader(open_index(comm, str(tmp_path), "test", schema), schema, batch_size=16)
    predicted = ((batch, np.zeros(batch.num_samples)) for batch in reader.batches())
    _, impressions = gathered(comm, predicted, schema, by=())
    seen = seen_in_training(comm, open_index(comm, str(tmp_path), "train", schema), schema, impressions)
    for name in ("label", "user", "ad", "image"):
        assert getattr(impressions, f"{name}_N").tolist() == [row[name] for row in test]
    assert impressions.history_N is not None and impressions.history_N.tolist() == [len(r["history"]) for r in test]
    shown = [sum(row["ad"] == ad for row in train) for ad in seen.ad_A.tolist()]
    assert seen.impressions_A.tolist() == shown and min(shown) == 0 < max(shown)
    met = {row["image"] for row in train} | {image for row in train for image in row["history"]}
    assert seen.met_I.tolist() == [image in met for image in seen.image_I]
    assert 0 < seen.met_I.sum() < len(seen.met_I)
    by_count, by_history, by_image = slicings(impressions, seen, seen.image_I % 3 != 0)
    assert set(names_of(slicings(impressions, seen, None)[-1])) == {"known", "new"}, "without a store none is missing"
    counts = [sum(row["ad"] == each["ad"] for row in train) for each in test]
    assert names_of(by_count) == ["0" if n == 0 else "1 to 9" if n < 10 else "10 to 29" for n in counts]
    assert names_of(by_history) == ["1 to 5" if row["history"] else "0" for row in test]
    expected = ["missing" if i % 3 == 0 else "known" if i in met else "new" for i in (row["image"] for row in test)]
    assert names_of(by_image) == expected


def test_limits_of_the_ranges() -> None:
    counts_A = np.array([0, 1, 9, 10, 29, 30, 100, 299, 300, 999, 1_000])
    history_N = np.array([0, 1, 5, 6, 10, 11, 20, 21, 50, 51, 90])
    impressions = Impressions(np.zeros(11, np.float32), np.arange(11), np.arange(11), history_N=history_N)
    seen = SeenInTraining(np.arange(11), counts_A, np.empty(0, np.int64), np.empty(0, np.bool_))
    by_count, by_history = slicings(impressions, seen, None)
    assert ",".join(names_of(by_count)) == (
        "0,1 to 9,1 to 9,10 to 29,10 to 29,30 to 99,100 to 299,100 to 299,300 to 999,300 to 999,1,000 or more"
    )
    assert ",".join(names_of(by_history)) == (
        "0,1 to 5,1 to 5,6 to 10,6 to 10,11 to 20,11 to 20,21 to 50,21 to 50,51 or more,51 or more"
    )
    label_N, id_N = np.zeros(3, np.float32), np.array([-1, 7, -1])
    by = slicings_by(Impressions(label_N, id_N, id_N, by={"maker": id_N}), {})
    assert names_of(by[0]) == ["(none)", "7", "(none)"]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_of_any_unit(unit: str) -> None:
    seconds = [-1, 0, 1_700_000_000]
    times = pa.array(seconds, pa.timestamp("s")).cast(pa.timestamp(unit, tz="UTC"))
    assert seconds_of(times, "timestamp", "a file").to_pylist() == seconds
    assert seconds_of(pa.array(seconds), "timestamp", "a file").to_pylist() == seconds
    with raises(SchemaError, Problem.NOT_A_TIME, where="a file", column="timestamp", value="string"):
        seconds_of(pa.array(["noon"]), "timestamp", "a file")
