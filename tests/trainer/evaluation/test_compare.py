"""Two models on the same impressions: the difference, its interval, its p-value; and what cannot be compared.

What is told of test impressions and of training, against loops over the rows; slices hold every impression once.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from featurestore.console.page import ReportPage, recorded
from tests.pages import check_page
from tests.trainer.conftest import write_samples
from trainer.comm import SoloComm
from trainer.errors import DataError, SchemaError
from trainer.evaluation import report
from trainer.evaluation.bootstrap import auc, auc_of_groups, compare, draws, new_to_both, probability
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
from trainer.runs.saved import RunSource
from trainer.samples.index import open_index
from trainer.samples.reader import SampleReader
from trainer.schema.fields import load_schema

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
        with pytest.raises(DataError, match="the other run predicted other impressions"):
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
    assert impressions.label_N.tolist() == [row["label"] for row in test]
    assert impressions.user_N.tolist() == [row["user"] for row in test]
    assert impressions.ad_N.tolist() == [row["ad"] for row in test]
    assert impressions.image_N is not None and impressions.image_N.tolist() == [row["image"] for row in test]
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
    images = [row["image"] for row in test]
    assert names_of(by_image) == ["missing" if i % 3 == 0 else "known" if i in met else "new" for i in images]


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
    with pytest.raises(SchemaError, match="a file: column timestamp is string, expected a timestamp or whole seconds"):
        seconds_of(pa.array(["noon"]), "timestamp", "a file")
