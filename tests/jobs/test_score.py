"""Scores as a file: a row for each test impression that joins back, the trainer's own logits, and two ranks as one."""

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.score import app
from tests.cli import invoke, printed
from tests.ranks import StandingRanks
from tests.trainer.conftest import Places, make_places
from tests.trainer.samples.reading import replaced, written
from tests.trainer.whole_runs import run_alone
from trainer.evaluation.predict import predict_run
from trainer.samples.survey import write_part

pytestmark = pytest.mark.long
WORDY = ("user", "ad_item", "behavior_item")
done = partial(printed, app)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A run on samples of two test files, the second with texts in the place of numbers."""
    places = make_places(tmp_path_factory.mktemp("places"))
    run_alone(places, run__name="both", train__max_steps=2, data__missing="zeros", model__compute_dtype="float32")
    test = places.folder / "samples" / "test"
    table = pq.read_table(test / "day=2026-01-01.parquet", partitioning=None)
    pq.write_table(table.slice(40), test / "day=2026-01-02.parquet", row_group_size=7)
    pq.write_table(table.slice(0, 40), test / "day=2026-01-01.parquet", row_group_size=7)
    return places


@pytest.fixture(scope="module")
def run(places: Places) -> Path:
    return places.folder / "runs" / "both"


def impressions(folder: Path) -> list[dict[str, Any]]:
    """What the rows have to be, in plain loops over the files."""
    found = []
    for path in sorted((folder / "test").glob("*.parquet")):
        for row, group in enumerate(pq.read_table(path, partitioning=None).to_pylist()):
            for place, (ad, label) in enumerate(zip(group["ad_item"], group["label"], strict=True)):
                where = {"file": f"test/{path.name}", "row": row, "place": place}
                found.append({"user": group["user"], "ad": ad, "time": group["timestamp"], "label": label, **where})
    return found


def test_every_impression_has_its_score(places: Places, run: Path, tmp_path: Path) -> None:
    train = places.folder / "samples" / "train"
    away = train.rename(tmp_path / "train")
    try:  # training samples are not needed
        text = done("--run", run, "--out", tmp_path / "scores.parquet")
    finally:
        away.rename(train)
    scores = pq.read_table(tmp_path / "scores.parquet")
    logit_N = scores["logit"].to_numpy()
    assert scores.drop_columns(["logit", "probability"]).to_pylist() == impressions(places.folder / "samples")
    np.testing.assert_array_equal(logit_N, predict_run(run).logit_N.astype(np.float32))
    assert np.ptp(logit_N) > 0.01
    np.testing.assert_allclose(scores["probability"].to_numpy(), 1 / (1 + np.exp(-logit_N)), rtol=1e-6)
    about = json.loads(scores.schema.metadata[b"scores"])
    assert (about["run"], about["checkpoint"], about["missing"]) == (str(run), "step-00000002", "zeros")
    assert about["stores"]["images"]["version"] == 1
    assert f"{len(scores):,} impressions" in text and f"written to   {tmp_path / 'scores.parquet'}" in text


def test_two_ranks_write_the_same_rows(run: Path, tmp_path: Path, two_ranks_of_each: StandingRanks) -> None:
    done("--run", run, "--out", tmp_path / "one.parquet")
    assert " on 2 ranks" in two_ranks_of_each.run("-m", "jobs.score", "--run", run, "--out", tmp_path / "two.parquet")
    one, two = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("one", "two"))
    assert two.schema.equals(one.schema, check_metadata=True)
    scored = ["logit", "probability"]
    assert two.drop_columns(scored).equals(one.drop_columns(scored))
    np.testing.assert_allclose(two["logit"].to_numpy(), one["logit"].to_numpy(), rtol=0, atol=1e-6)


def test_texts_stay_texts_and_those_of_ids_come_from_the_dictionary(run: Path, tmp_path: Path) -> None:
    """Where one file has texts, the numbers of the other are written as texts too."""
    places = make_places(tmp_path / "wordy")
    test = places.folder / "samples" / "test"
    table = pq.read_table(test / "day=2026-01-01.parquet", partitioning=None)
    wordy = replaced(table, WORDY, pa.string(), written).drop_columns(["timestamp"])
    pq.write_table(wordy, test / "day=2026-01-02.parquet")
    done("--run", run, "--samples", places.folder / "samples", "--out", tmp_path / "scores.parquet")
    scores = pq.read_table(tmp_path / "scores.parquet")
    half = len(scores) // 2
    numbers, words = scores.slice(0, half), scores.slice(half)
    assert words["user"].to_pylist() == [f"user ü{user}" for user in numbers["user"].to_pylist()]
    assert words["ad"].to_pylist() == [f"item ü{ad}" for ad in numbers["ad"].to_pylist()]
    assert words["time"].null_count == half and numbers["time"].null_count == 0
    places = make_places(tmp_path / "numbers")
    wanted = impressions(places.folder / "samples")
    users, ads = ({each[name] for each in wanted} for name in ("user", "ad"))
    texts = {ad: f"SKU-{ad}" for ad in sorted(ads - users)[1:]}
    write_part(places.folder / "samples" / "ids.parquet", texts)
    done("--run", run, "--samples", places.folder / "samples", "--out", tmp_path / "scores.parquet")
    scores = pq.read_table(tmp_path / "scores.parquet")
    assert texts and scores["user"].to_pylist() == [each["user"] for each in wanted], "users have no texts: numbers"
    assert scores["ad"].to_pylist() == [texts.get(each["ad"], str(each["ad"])) for each in wanted]


def test_a_failed_score_leaves_the_file_as_it_was(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done("--run", run, "--out", tmp_path / "scores.parquet")
    before = (tmp_path / "scores.parquet").read_bytes()
    monkeypatch.setattr("trainer.evaluation.predict.ScoreFile.add", Mock(side_effect=OSError("the disk is gone")))
    invoke(app, "--run", run, "--out", tmp_path / "scores.parquet", code=1)
    assert (tmp_path / "scores.parquet").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]
