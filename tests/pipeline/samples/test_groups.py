"""What belongs into a sample group, rule by rule, against a slow reference, and in rows to score."""

import dataclasses
import random
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.errors import UserError
from featurestore.keys import key_of_uri
from pipeline.errors import SampleError, SampleOptionError
from pipeline.options import SampleOptions
from pipeline.problems import Problem
from pipeline.samples import logs as pieces_module
from pipeline.samples.build import build_samples
from pipeline.samples.mapping import parse_times, unit_of
from pipeline.samples.requests import with_behaviors
from tests.pipeline.samples.rows import (
    DAY_S,
    START_S,
    Row,
    behavior_items,
    done,
    random_logs,
    read,
    replaced,
    shown,
    table,
    write_in_pieces,
)
from tests.raised import raises


def test_window_reaches_exactly_its_days_back_and_ages_are_whole_seconds(build):
    first = 20 * DAY_S
    behaviors = [done(first - 14 * DAY_S, item=1), done(first - 14 * DAY_S - 0.000001, item=2)]
    assert behavior_items(build([shown(first)], behaviors)[0]) == [[1]]
    assert behavior_items(build([shown(first)], behaviors, window_days=14.1)[0]) == [[1, 2]]
    assert behavior_items(build([shown(first)], behaviors, window_days=13.9)[0]) == [[]]
    first = 3 * DAY_S
    behaviors = [done(first - age, item=item) for item, age in enumerate([0.5, 60, 90.25, 2 * DAY_S])]
    shows = [shown(first), shown(first + 3600)]
    rows, _ = build(shows, behaviors, behavior_age=True, max_behaviors=3)
    assert behavior_items(rows) == [[0, 1, 2]]
    assert [row["behavior_age"] for row in rows] == [[0, 60, 90]]
    assert "behavior_age" not in build(shows, behaviors)[0][0]


def test_session_over_midnight_is_one_group_of_its_first_day(build):
    rows, _ = build([shown(DAY_S - 60), shown(DAY_S + 60), shown(DAY_S + 3000)], [done(0)])
    assert [(row["day"], len(row["label"])) for row in rows] == [("2026-01-01", 3)]
    rows, _ = build([shown(DAY_S - 60), shown(DAY_S + 3540)], [done(0)])  # a pause of exactly midnight_pause_s
    assert [(row["day"], len(row["label"])) for row in rows] == [("2026-01-01", 2)]


def test_columns_of_users_and_of_other_encodings_are_kept_and_an_unknown_value_is_minus_one(build):
    impressions = [shown(100, user_age=3, city=7), shown(200, user=2, user_age=None, city=8)]
    rows, _ = build(impressions, [done(0)])
    assert [row["user_age"] for row in rows] == [3, -1]
    assert "city" not in rows[0]
    impressions, behaviors = table([shown(100), shown(101)]), table([done(0)])
    for name, kind in {"user": pa.int32(), "category": pa.uint8(), "image": pa.large_string()}.items():
        impressions = replaced(impressions, name, impressions[name].cast(kind))
    behaviors = replaced(behaviors, "image", behaviors["image"].dictionary_encode())
    rows, _ = build(impressions, replaced(behaviors, "dwell_s", pa.array([30], pa.int32())))
    assert rows[0]["behavior_image"] == [key_of_uri("6.jpg")]


@pytest.mark.parametrize(
    ("changes", "days"),
    [
        ({"test_days": 2}, [4, 5]),
        ({"test_from": "2026-01-03"}, [3, 4, 5]),
        ({"test_share": 0.25}, [5]),
        ({"test_share": 0.26}, [4, 5]),
        ({"test_share": 0.5}, [4, 5]),
    ],
)
def test_days_for_testing_are_named_or_counted_or_a_share_of_the_groups(build, tmp_path, changes, days):
    """Days of 1, 2, 1, 2 and 2 groups."""
    users_of_day = (1, 2, 1, 2, 2)
    rows = [shown(day * DAY_S, user=user) for day, count in enumerate(users_of_day) for user in range(count)]
    _, summary = build(rows, [done(0)], **{"test_days": 1} | changes)
    assert {row["day"] for row in read(tmp_path / "samples", "test")} == {f"2026-01-0{day}" for day in days}
    assert summary["train"]["days"] == 5 - len(days)


def test_last_days_are_those_of_the_calendar_also_where_one_has_no_impression(build):
    _, summary = build([shown(day * DAY_S) for day in (0, 1, 3)], [done(0)], test_days=3)
    assert (summary["train"]["days"], summary["test"]["days"]) == (1, 2)


@pytest.mark.parametrize("changes", [{"test_from": "2026-01-01"}, {"test_share": 0.9}, {"test_days": 10}])
def test_days_for_testing_leave_some_to_train_on(build, changes):
    with raises(SampleError, Problem.NOTHING_TO_TRAIN_ON):
        build([shown(0), shown(9 * DAY_S, user=2)], [done(0)], **{"test_days": 1} | changes)


@pytest.mark.parametrize(
    ("changes", "problem", "values"),
    [
        ({"test_share": 0.1, "test_days": 2}, Problem.GIVE_ONE, {"where": "--test-days and --test-share"}),
        ({"test_share": 0.1, "test_from": "2026-01-02"}, Problem.GIVE_ONE, {"where": "--test-from and --test-share"}),
        ({"test_from": "2026-13-01"}, Problem.NOT_A_DAY, {"where": "--test-from", "value": "2026-13-01"}),
    ],
)
def test_options_of_days_for_testing_are_checked_before_the_logs_are_read(
    options, client, tmp_path, changes, problem, values
):
    nowhere = dataclasses.replace(options, logs=str(tmp_path / "nowhere"), **{"test_days": 1} | changes)
    with raises(SampleOptionError, problem, **values):
        build_samples(nowhere, client)


@pytest.mark.parametrize("dtype", [pa.bool_(), pa.int8(), pa.int64(), pa.float32()])
def test_labels_of_any_type_are_0_and_1(dtype, build, tmp_path):
    log = table([shown(100, label=1), shown(200, label=0)])
    build(replaced(log, "label", log["label"].cast(dtype)), [done(0)])
    samples = pq.read_table(next(tmp_path.glob("samples/train/*")))
    assert samples["label"].to_pylist() == [[1, 0]]
    assert samples.schema.field("label").type == pa.list_(pa.int8())


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns", "seconds", "naive"])
def test_time_in_any_unit(unit, build):
    impressions = table([shown(100)], seconds=unit == "seconds")
    kind = pa.timestamp("us") if unit == "naive" else pa.timestamp(unit, "UTC") if unit != "seconds" else pa.int64()
    impressions = replaced(impressions, "timestamp", impressions["timestamp"].cast(kind))
    ((row,), _) = build(impressions, [done(99), done(100)])
    assert (row["timestamp"], len(row["behavior_item"])) == (START_S + 100, 1)


def test_digits_are_a_time_of_the_given_format_and_only_otherwise_a_number():
    time_N, wrong_N = parse_times(pa.chunked_array([["20260320", "1767261610", "20261399"]]), "s", "%Y%m%d")
    day_s = int(datetime(2026, 3, 20, tzinfo=UTC).timestamp())
    assert time_N.tolist() == [day_s * 1_000_000, 1767261610_000_000, 20261399_000_000]
    assert not wrong_N.any()
    written = ["1767261610000000123", "1767261610123456.5"]
    assert parse_times(pa.chunked_array([written]), "ns")[0].tolist() == [1767261610_000_000, 1767261610_123]
    assert unit_of(written[:1]) == "ns" and unit_of(["1767261610.25"]) == "s"
    assert parse_times(pa.chunked_array([["1767261610.25"]]), "s")[0].tolist() == [1767261610_250_000]


def reference(impressions: list[Row], behaviors: list[Row], options: SampleOptions) -> list[Row]:
    """Groups by the words of the documentation, one row at a time, of good rows."""
    clicks: dict[tuple[Any, ...], Row] = {}
    for row in impressions:
        same = tuple(row[name] for name in ("user", "session", "timestamp", "scene", "item", "image", "category"))
        kept = clicks.setdefault(same, dict(row))
        kept["label"] = max(kept["label"], row["label"])
    groups: list[list[Row]] = []
    for row in [clicks[same] for same in sorted(clicks)]:
        last = groups[-1][-1] if groups else None
        is_same = last is not None and (last["user"], last["session"]) == (row["user"], row["session"])
        if is_same:
            other_day = last["timestamp"] // DAY_S != row["timestamp"] // DAY_S
            is_same = not (other_day and row["timestamp"] - last["timestamp"] > options.midnight_pause_s)
        if is_same:
            groups[-1].append(row)
        else:
            groups.append([row])
    samples = (sample(group, behaviors, options) for group in groups)
    return sorted(samples, key=lambda row: (row["timestamp"], row["user"], row["session"]))


def sample(group: list[Row], behaviors: list[Row], options: SampleOptions) -> Row:
    first = group[0]
    low, high = first["timestamp"] - options.window_days * DAY_S, first["timestamp"]
    history = {
        (row["timestamp"], row["item"], row["image"], row["category"])
        for row in behaviors
        if row["user"] == first["user"] and low <= row["timestamp"] < high and row["dwell_s"] >= options.min_dwell_s
    }
    newest = sorted(history, reverse=True)[: options.max_behaviors]
    day = datetime.fromtimestamp(first["timestamp"], UTC).strftime("%Y-%m-%d")
    made = {name: first[name] for name in ("user", "session", "user_age")} | {"timestamp": int(high), "day": day}
    made |= {f"behavior_{name}": [row[n] for row in newest] for n, name in enumerate(("item", "image", "category"), 1)}
    made |= {f"ad_{name}": [row[name] for row in group] for name in ("item", "image", "category", "scene")}
    return made | {"label": [row["label"] for row in group], "history": newest}


@pytest.mark.parametrize("seed", [1, 2, 3, 5, 10, 11])  # each number of partitions and behaviours twice, each window
def test_groups_are_those_of_the_reference(seed, options, client, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces_module, "PIECE_ROWS", 20)  # several tasks per file
    rng = random.Random(seed)
    impressions, behaviors = random_logs(rng)
    write_in_pieces(tmp_path / "logs", rng, impressions, behaviors)
    drawn = {"partitions": rng.choice([1, 3, 8]), "max_behaviors": rng.choice([1, 3, 50])}
    options = dataclasses.replace(options, **drawn, window_days=rng.choice([1, 14]))
    summary = build_samples(options, client)
    groups = reference(impressions, behaviors, options)
    used = {(row["user"], *behavior) for row in groups for behavior in row.pop("history")}
    assert read(options.samples, "train") == groups  # and so in this order
    labels = [label for row in groups for label in row["label"]]
    log = summary["impressions"]
    assert (log["rows"], log["kept"], log["kept"] + log["duplicates"]) == (len(impressions), len(labels), log["rows"])
    log = summary["behaviors"]
    assert log["rows"] == len(behaviors) == sum(log[name] for name in ("used", "unused", "short_dwell", "duplicates"))
    assert log["used"] == len(used)
    assert log["short_dwell"] == sum(row["dwell_s"] < 5 for row in behaviors)
    expected = {
        "users": len({row["user"] for row in impressions}), "groups": len(groups),
        "groups_without_behaviors": sum(not row["behavior_item"] for row in groups),
        "behaviors_in_groups": sum(len(row["behavior_item"]) for row in groups),
    }  # fmt: skip
    assert {name: summary[name] for name in expected} == expected
    split = summary["train"]
    assert (split["impressions"], split["positive_rate"]) == (len(labels), pytest.approx(np.mean(labels)))


@pytest.mark.services
def test_rows_to_score_have_the_history_of_their_group_and_bad_ones_are_errors(build, tmp_path):
    """Where each impression is a session of its own, its row is that of the samples."""
    impressions, behaviors = random_logs(random.Random(3))
    impressions = [row | {"session": place} for place, row in enumerate(impressions[:60])]
    samples, _ = build(impressions, behaviors, max_behaviors=4, window_days=5)
    asked = table([{name: value for name, value in row.items() if name != "label"} for row in impressions])
    rows = with_behaviors(asked, table(behaviors), str(tmp_path / "samples")).to_pylist()
    wanted = {row["session"]: row for row in samples}
    assert [row["ad_item"] for row in rows] == [[row["item"]] for row in impressions]
    for row in rows:
        assert row | {"label": wanted[row["session"]]["label"]} == wanted[row["session"]]
    build([shown(100)], [done(50)])
    samples = str(tmp_path / "samples")
    bad = table([shown(100), shown(200, user=None)])
    with raises(SampleError, Problem.BAD_ROW, where=1, log="impressions", reason="user is null"):
        with_behaviors(bad, table([done(50)]), samples)
    none = table([done(50)]).slice(0, 0)
    assert with_behaviors(table([shown(100)]), none, samples)["behavior_item"].to_pylist() == [[]]
    short = table([done(50, dwell_s=1.0)])
    assert with_behaviors(table([shown(100)]), short, samples)["behavior_item"].to_pylist() == [[]]
    with raises(UserError, Problem.NOT_OUR_SAMPLES, where=tmp_path):
        with_behaviors(table([shown(100)]), none, str(tmp_path))
