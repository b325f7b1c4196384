"""Day after day: what each day begins with and is evaluated on, the table, and going on after a stop at any point."""

import json
import re
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from featurestore.published.paths import run_path
from featurestore.store import FeatureStore
from tests.cli import invoke
from tests.raised import raises, told
from tests.ranks import StandingRanks
from tests.trainer.checkpoints import differs, tensors_of
from tests.trainer.conftest import Places, add_a_row, make_days, sample_table
from tests.trainer.whole_runs import alike, assert_same, report_of
from trainer.comm import SoloComm
from trainer.config import load_config, save_config
from trainer.daily import app, plan, run_of_days
from trainer.daily import follow as follow_days
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.evaluation.bootstrap import LEAST_USERS_SHOWN
from trainer.main import train
from trainer.problems import Problem
from trainer.runs.checkpoint import read_state
from trainer.runs.folder import find_checkpoint
from trainer.runs.open import open_run

pytestmark = pytest.mark.long  # they train whole runs

WORKER = Path(__file__).parent / "days.py"
DAYS = [f"2026-01-0{n}" for n in range(1, 5)]
EXACT = {"model__compute_dtype": "float32"}  # of runs whose numbers are compared between numbers of ranks


@pytest.fixture
def days(tmp_path: Path) -> Places:
    return make_days(tmp_path)


def follow(places: Places, name: str, first: str | None = None, last: str | None = None, **changes: Any) -> Path:
    """Follow days by one epoch each; returns the folder of their runs."""
    settings = {"run__name": name, "train__epochs": 1, "data__global_batch_size": 64, **changes}
    config = load_config(settings=places.settings(**settings))
    follow_days(config, SoloComm(), first, last, continues=True)
    return Path(config.run.dir) / name


def table_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "days.json").read_text())


def assert_same_days(found: Path, expected: Path, days: list[str] = DAYS) -> None:
    for day in days:
        assert_same(found / day, expected / day)
    assert [{**row, "warm_start": None} for row in table_of(found)] == [
        {**row, "warm_start": None} for row in table_of(expected)[: len(days)]
    ]


def test_plan(tmp_path: Path) -> None:
    def planned(days: list[str], *given: str | None, warm: bool = False) -> list[tuple[str, list[str], str | None]]:
        found = plan(days, tmp_path, *given, warm=warm, continues=True)
        return [(day.name, [*day.train_days], day.test_day) for day in found]

    one, two, three, four = DAYS
    assert planned(DAYS) == [(three, [one, two, three], four), (four, [four], None)]
    assert planned(DAYS[:1]) == [(one, [one], None)]
    assert planned(DAYS, one, two) == [(one, [one], two), (two, [two], three)]
    assert planned(DAYS, None, two) == [(two, [one, two], three)]
    whole = plan(DAYS, tmp_path, two)
    assert [[*day.train_days] for day in whole] == [[one, two], [one, two, three], DAYS]
    assert planned(DAYS, warm=True) == [(four, [four], None)]
    assert planned(DAYS, three, warm=True) == [(three, [three], four), (four, [four], None)]
    for day, trained in ((two, [one, two]), (four, [four])):
        (tmp_path / day).mkdir()
        save_config(load_config().changed(data={"train_days": trained}), tmp_path / day / "config.yaml")
    # The third day came too late for its own run, and there are days before the first run's.
    after = ["2025-12-31", *DAYS, "2026-01-05"]
    assert planned(after) == [
        (two, [one, two], three),
        (four, [four], "2026-01-05"),
        ("2026-01-05", [three, "2026-01-05"], None),
    ]
    with raises(ConfigError, Problem.FIRST_DAY_AGAIN, value=one, where=tmp_path, first=two):
        planned(after, one)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Days that a run named `whole` has followed to the end."""
    places = make_days(tmp_path_factory.mktemp("followed"))
    follow(places, "whole", DAYS[0], train__checkpoint_every=2)
    return places


def test_each_day_begins_with_the_day_before_and_is_evaluated_on_the_next(followed: Places) -> None:
    folder = followed.folder / "runs/whole"
    rows = table_of(folder)
    days = [(day, [day], after) for day, after in zip(DAYS, [*DAYS[1:], None], strict=True)]
    assert [(row["day"], row["train_days"], row["test_day"]) for row in rows] == days
    assert [row["warm_start"] for row in rows] == [None, *(str(folder / day) for day in DAYS[:3])]
    assert all(0 < row["gauc"] < 1 and row["impressions"] > 100 for row in rows[:3])
    assert rows[3]["gauc"] is rows[3]["impressions"] is None
    # The second day's first step starts at what the first day ended with, ID vectors included.
    second = load_config(folder / DAYS[1] / "config.yaml", ["run.name=second"])
    assert second.run.warm_start == str(folder / DAYS[0])
    run = open_run(second, SoloComm())
    run.close()
    state, ended = run.engine.dense_state() | run.engine.shard_state(), tensors_of(folder / DAYS[0])
    names = [name for name in ended if name.startswith("model.") or name.endswith("/weight")]
    assert len(names) > 20
    assert [name for name in names if not torch.equal(state[name], ended[name])] == []
    for reader, day in ((run.train_reader, DAYS[1]), (run.test_reader, DAYS[2])):
        labels = pq.read_table(followed.folder / "samples" / "train" / f"day={day}.parquet", partitioning=None)["label"]
        assert reader.num_samples == sum(len(each) for each in labels.to_pylist())


@pytest.mark.parametrize(
    ("point", "call"),
    [
        ("trainer.runs.open.claim_folder", 2),
        ("trainer.engine.engine.Engine.train_step", 8),
        ("trainer.loop.summary.write_report", 2),
        ("trainer.daily.write", 2),
    ],
)
def test_killed_anywhere_it_goes_on(followed: Places, monkeypatch: pytest.MonkeyPatch, point: str, call: int) -> None:
    name, days = f"cut-in-{point.rpartition('.')[2]}", DAYS[:2]
    work, calls = resolve_name(point), count(1)

    def killed(*given: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return work(*given, **named)

    monkeypatch.setattr(point, killed)
    with pytest.raises(KeyboardInterrupt):
        follow(followed, name, *days, train__checkpoint_every=2)
    folder = follow(followed, name, *days, train__checkpoint_every=2)
    assert_same_days(folder, followed.folder / "runs/whole", days)


def test_the_first_run_trains_on_all_days_and_later_ones_once_on_their_own(days: Places) -> None:
    newest = days.folder / "samples/test" / f"day={DAYS[3]}.parquet"
    to_come = newest.rename(days.folder / "to come")
    follow(days, "w", train__epochs=3)
    to_come.rename(newest)
    for gone in DAYS[:2]:  # samples of days that were trained may go
        (days.folder / "samples" / "train" / f"day={gone}.parquet").unlink()
    folder = follow(days, "w", train__epochs=3)
    rows = table_of(folder)
    assert [(row["day"], row["train_days"], row["test_day"]) for row in rows] == [
        (DAYS[1], DAYS[:2], DAYS[2]),
        (DAYS[2], [DAYS[2]], DAYS[3]),
        (DAYS[3], [DAYS[3]], None),
    ]
    assert [row["warm_start"] for row in rows] == [None, str(folder / DAYS[1]), str(folder / DAYS[2])]
    assert [load_config(folder / row["day"] / "config.yaml").train.epochs for row in rows] == [3, 1, 1]
    rates = [load_config(folder / row["day"] / "config.yaml").optim for row in rows]
    assert [each.lr for each in rates] == pytest.approx([0.01, 0.003, 0.003])
    assert [each.alpha for each in rates] == pytest.approx([0.012, 0.0018, 0.0018])
    assert run_of_days(folder) == folder / DAYS[2]
    assert run_of_days(folder / DAYS[3]) == folder / DAYS[3]


def test_it_begins_with_another_run(followed: Places, tmp_path: Path) -> None:
    run = followed.folder / "runs/whole" / DAYS[2]
    warm = follow(followed, "warm", run__dir=tmp_path, run__warm_start=run)
    (row,) = table_of(warm)
    assert (row["train_days"], row["warm_start"]) == ([DAYS[3]], str(run))
    assert_same(warm / DAYS[3], followed.folder / "runs/whole" / DAYS[3])
    with raises(ConfigError, Problem.NO_DAY_EVALUATED, where=warm):
        run_of_days(warm)


def test_mistakes(days: Places) -> None:
    def refused(where: str, value: object, **changes: Any) -> None:
        with raises(ConfigError, Problem.SETTING_NOT_FREE, where=where, value=value):
            follow(days, "m", **changes)

    refused("data.test_days", ["2026-01-02"], data__test_days=f"[{DAYS[1]}]")
    refused("run.resume", "latest", run__resume="latest")
    refused("run.warm_parts", "all", run__warm_parts="all")
    refused("data.validation_days", 1, data__validation_days=1)
    refused("train.early_stopping", 2, train__early_stopping=2, train__eval_every=5)
    with raises(DataError, Problem.NO_FILE_OF_A_DAY, where=days.folder / "nothing"):
        follow(days, "m", data__samples=days.folder / "nothing")
    assert not (days.folder / "runs/m").exists() or not list((days.folder / "runs/m").glob("2026*"))
    with raises(ConfigError, Problem.NO_DAY_CHOSEN, first=DAYS[0], last=DAYS[-1]):
        follow(days, "n", "2027-01-01")


def test_settings_are_kept_when_a_day_has_begun_with_them(days: Places) -> None:
    empty = days.folder / "empty" / "train"
    empty.mkdir(parents=True)
    (empty / f"day={DAYS[0]}.parquet").write_bytes(b"no parquet")
    for wrong in (days.folder / "sample", empty.parent):  # a typing error, and what is found no samples when it is read
        with pytest.raises(DataError):
            follow(days, "d", data__samples=wrong)
    nothing = days.folder / "feature"
    with pytest.raises(DataError, match=told(Problem.NO_STORE_AT_SETTING, where="data.store", value=nothing)):
        follow(days, "d", data__store=nothing)
    assert len(table_of(follow(days, "d", last=DAYS[0]))) == 1
    differing = differs("data.samples", str(empty.parent), other=str(days.folder / "samples"), there="there")
    with raises(ConfigError, Problem.DAYS_OF_OTHER_SETTINGS, differing=differing):
        follow(days, "d", data__samples=empty.parent)


def test_days_are_evaluated_when_they_come_and_late_logs_mark(days: Places, capsys: pytest.CaptureFixture[str]) -> None:
    samples, store = days.folder / "samples", FeatureStore.open(days.folder / "features")
    newest, third = samples / "test" / f"day={DAYS[3]}.parquet", samples / "train" / f"day={DAYS[2]}.parquet"
    to_come = newest.rename(days.folder / "to come")
    third.rename(samples / "test" / third.name)  # a run's test split is never empty
    store.delete([1_045, 1_046])  # images of the fourth day alone
    late, timely = (follow(days, name, DAYS[1], data__missing="zeros") for name in ("late", "timely"))
    before, ended, trained = table_of(timely), tensors_of(late / DAYS[2]), report_of(late / DAYS[2])
    assert [row["test_day"] for row in before] == [DAYS[2], None]
    # Rebuilt samples: the day that was the newest one is a day of training now.
    (samples / "test" / third.name).rename(third)
    to_come.rename(newest)
    add_a_row(store)
    follow(days, "timely", DAYS[1], data__missing="zeros")
    expected, times = table_of(timely), {path: path.stat().st_mtime_ns for path in timely.glob("*/report.json")}
    assert expected[:1] == before[:1]
    assert [row["test_day"] for row in expected] == [*DAYS[2:], None]
    assert [row["store_version"] for row in expected] == [2, 2, 3]
    assert [row["samples_changed"] for row in expected] == [False] * 3
    assert all(torch.equal(value, tensors_of(timely / DAYS[2])[name]) for name, value in ended.items())
    follow(days, "timely", DAYS[1], data__missing="zeros")
    assert times == {path: path.stat().st_mtime_ns for path in timely.glob("*/report.json")}
    assert table_of(timely) == expected
    day = pq.read_table(third, partitioning=None)
    more = sample_table(30, 7, items=50, first_serial=10_000)
    pq.write_table(pa.concat_tables([day, more.cast(day.schema)]), third, row_group_size=7)
    capsys.readouterr()
    follow(days, "late", DAYS[1], data__missing="zeros")
    said = capsys.readouterr().out
    assert f"the training samples in {samples} are not, or no longer, those of the checkpoint" in said
    assert f"{DAYS[2]}: its training samples had changed before it was evaluated\n" in said
    assert all(torch.equal(value, tensors_of(late / DAYS[2])[name]) for name, value in ended.items())
    rows = table_of(late)
    assert [row["samples_changed"] for row in rows] == [False, True, False]
    for column in ("day", "train_days", "steps", "test_day", "impressions", "logloss", "auc", "gauc"):
        assert rows[1][column] == expected[1][column], column
    report = report_of(late / DAYS[2])
    assert report["samples"] == trained["samples"] > 0, "what training told is still told"
    assert report["missing_lookups"] == sum(report["missing_by_store"].values()) > trained["missing_lookups"] == 0
    assert report["history"] == [{"step": trained["global_step"], **report["metrics"]}]
    assert rows[2]["warm_start"] == str(late / DAYS[2])


def test_a_trained_day_without_its_checkpoints_or_samples_says_how_to_go_on(days: Places) -> None:
    run = follow(days, "d", last=DAYS[0]) / DAYS[0]
    report, checkpoints, again = report_of(run), days.folder / "checkpoints", rf".*\nTo train 2026-01-01 again, .*{run}"
    (run / "report.json").write_text(json.dumps({**report, "metrics": {}}))
    (run / "checkpoints").rename(checkpoints)
    with pytest.raises(CheckpointError, match=told(Problem.RUN_WITHOUT_CHECKPOINT, run=run) + again):
        follow(days, "d", last=DAYS[0])
    checkpoints.rename(run / "checkpoints")
    (run / "report.json").unlink()
    path = days.folder / "samples" / "train" / f"day={DAYS[0]}.parquet"
    pq.write_table(pq.read_table(path, partitioning=None).slice(1), path)
    differing = differs("data.samples_digest", re.compile(r"'\w+'"))
    with pytest.raises(CheckpointError, match=told(Problem.CHECKPOINT_OF_OTHER_RUN, differing=differing) + again):
        follow(days, "d", last=DAYS[0])


def test_command(days: Places) -> None:
    settings = [*days.settings(run__name="c", train__epochs=1)]
    options = ["--first-day", DAYS[0], "--last-day", DAYS[1]]
    result = invoke(app, *options, "--set", *settings, code=0)
    assert "2026-01-02" in result.stdout and "days.json" in result.stdout
    table = result.stdout[result.stdout.rindex("new ad gauc") :]
    for row in table_of(days.folder / "runs/c"):  # a metric of a few users is written, and not printed
        for name, users in (("gauc", "gauc_users"), ("auc", "users"), ("new_ad_auc", "new_ad_users")):
            assert row[name] is None or (f"{row[name]:.4f}" in table) == (row[users] >= LEAST_USERS_SHOWN)
    second = load_config(days.folder / "runs/c" / DAYS[1] / "config.yaml")
    assert (second.data.train_days, second.run.warm_start, second.train.epochs) == (DAYS[:2], None, 1)
    # It is the run that trainer.main trains on these days.
    alone = days.settings(run__name="alone", train__epochs=1, data__train_days=f"[{DAYS[0]},{DAYS[1]}]")
    train(load_config(settings=[*alone, f"data.test_days=[{DAYS[2]}]"]), SoloComm())
    assert_same(days.folder / "runs/c" / DAYS[1], days.folder / "runs/alone")
    alone_run = days.folder / "runs/alone"
    refused = invoke(app, *options, "--set", *settings, f"run.warm_start={alone_run}", code=2)
    assert re.search(told(Problem.WARM_START_ON_ALL_DAYS, value=alone_run), refused.stderr)
    assert "'monday' does not match" in invoke(app, "--first-day", "monday", code=2).stderr


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, two_ranks: StandingRanks) -> tuple[Places, dict[str, Any]]:
    """What the two ranks of days.py saw."""
    places = make_days(tmp_path_factory.mktemp("job"))
    out = places.folder / "seen.json"
    two_ranks.run(WORKER, out, *places.settings(train__epochs=1, **EXACT))
    return places, json.loads(out.read_text())


@pytest.mark.cluster
class TestTwoRanks:
    def test_stops_evaluations_and_refusals_are_of_both(self, job: tuple[Places, dict[str, Any]]) -> None:
        places, seen = job
        assert seen["days"] == ["done", "done"]
        assert seen["cut"] == [["StoppedError: SIGTERM received"] * 2, ["StoppedError: SIGTERM received"] * 2]
        assert seen["after the cut"] == ["done", "done"]
        assert_same_days(places.folder / "runs/cut", places.folder / "runs/days", DAYS[2:])
        # A day is evaluated when the next one comes.
        assert seen["newest missing"] == seen["newest there, others late"] == ["done", "done"]
        rows, expected = (table_of(places.folder / "runs" / name) for name in ("late", "days"))
        assert [row["samples_changed"] for row in rows] == [True, False]
        for column in ("steps", "test_day", "impressions", "logloss", "auc", "gauc"):
            assert rows[0][column] == expected[0][column], column  # of the same bits
        assert [text.partition(":")[0] for text in seen["other settings"]] == ["ConfigError", "RemoteRankError"]
        assert all("optim.lr is 0.5 here, 0.01 there" in text for text in seen["other settings"])

    def test_equals_one_rank(self, job: tuple[Places, dict[str, Any]]) -> None:
        places, _ = job
        alone = table_of(follow(places, "alone", DAYS[2], data__global_batch_size=32, **EXACT))
        two = table_of(places.folder / "runs/days")
        for mine, theirs in zip(alone, two, strict=True):
            for column in ("steps", "impressions", "logloss", "auc", "gauc"):
                assert mine[column] == alike(column, theirs[column], within=1e-3), column

    def test_early_stopping_is_agreed_on(self, job: tuple[Places, dict[str, Any]]) -> None:
        places, seen = job
        assert seen["early"] == ["done", "done"]
        early = places.folder / "runs/early"
        report = report_of(early)
        history = [(entry["step"], entry["gauc"]) for entry in report["history"]]
        best = max(history, key=lambda entry: entry[1])
        assert history[-1][0] == best[0] + 8 < 9 * 12, "the learning rate is too high to get better for long"
        assert report["global_step"] == best[0] == read_state(find_checkpoint(early)).step


def test_days_on_s3_are_those_of_a_disk(tmp_path: Path, s3_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A second start finds all done."""
    places = make_days(tmp_path)
    far, near = run_path(f"{s3_url}/runs/d"), tmp_path / "runs/d"
    for folder in (far, near, far):
        capsys.readouterr()
        follow(places, "d", DAYS[2], run__dir=folder.parent)
    assert "step 1/" not in capsys.readouterr().out
    days, expected = (json.loads((each / "days.json").read_bytes()) for each in (far, near))
    assert [{**row, "warm_start": None} for row in days] == [{**row, "warm_start": None} for row in expected]
    assert [row["warm_start"] for row in days] == [None, str(far / DAYS[2])]
