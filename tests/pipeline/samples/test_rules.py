"""What belongs into a sample group, rule by rule."""

from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.keys import key_of_uri
from pipeline.samples.build import build_samples
from pipeline.samples.mapping import parse_times
from tests.pipeline.samples.rows import DAY_S, START_S, behavior_items, done, read, replaced, shown, table, write

# Rules, one by one


def test_only_the_past_counts_and_a_tie_is_not_past(build):
    first = 3 * DAY_S + 100
    times = [first - 1, first - 0.000001, first, first + 0.000001, first + DAY_S]
    behaviors = [done(at_s, item=item) for item, at_s in enumerate(times)]
    rows, summary = build([shown(first), shown(first + 7200)], behaviors)
    assert behavior_items(rows) == [[1, 0]]  # newest first, also for the second impression of the group
    assert summary["behaviors"]["unused"] == 3


def test_window_reaches_exactly_its_days_back(build):
    first = 20 * DAY_S
    behaviors = [done(first - 14 * DAY_S, item=1), done(first - 14 * DAY_S - 0.000001, item=2)]
    assert behavior_items(build([shown(first)], behaviors)[0]) == [[1]]
    assert behavior_items(build([shown(first)], behaviors, window_days=14.1)[0]) == [[1, 2]]
    assert behavior_items(build([shown(first)], behaviors, window_days=13.9)[0]) == [[]]


def test_newest_behaviors_stay_and_the_others_are_counted(build):
    rows, summary = build([shown(1000)], [done(at_s, item=at_s) for at_s in range(10)], max_behaviors=3)
    assert behavior_items(rows) == [[9, 8, 7]]
    assert summary["behaviors_over_limit"] == 7
    assert summary["behaviors"]["unused"] == 7


def test_ages_are_whole_seconds_before_the_groups_first_impression(build):
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


def test_session_number_used_again_on_another_day_is_another_group(build):
    rows, _ = build([shown(DAY_S - 60), shown(DAY_S + 3541), shown(5 * DAY_S)], [done(0)])
    assert [row["day"] for row in rows] == ["2026-01-01", "2026-01-02", "2026-01-06"]


def test_session_with_a_long_pause_on_one_day_is_one_group(build):
    assert len(build([shown(0), shown(DAY_S - 1)], [done(0)])[0]) == 1


def test_click_wins_among_repeated_impressions(build):
    rows, summary = build([shown(100, label=0), shown(100, label=1), shown(100, label=0)], [done(0), done(0)])
    assert [row["label"] for row in rows] == [[1]]
    assert summary["impressions"]["duplicates"] == 2
    assert summary["behaviors"]["duplicates"] == 1


def test_strings_become_the_stores_keys(build):
    (row,), _ = build([shown(100)], [done(0)])
    assert row["ad_image"] == [key_of_uri("5.jpg")]
    assert row["behavior_image"] == [key_of_uri("6.jpg")]


def test_user_columns_are_kept_and_an_unknown_value_is_minus_one(build):
    impressions = [shown(100, user_age=3, city=7), shown(200, user=2, user_age=None, city=8)]
    rows, _ = build(impressions, [done(0)])
    assert [row["user_age"] for row in rows] == [3, -1]
    assert "city" not in rows[0]
    rows, summary = build(impressions, [done(0)], user_columns="city")
    assert [row["city"] for row in rows] == [7, 8]
    assert "user_age" not in rows[0]
    assert summary["options"]["user_columns"] == ("city",)


def test_last_days_are_for_testing_and_new_ads_are_counted(build, tmp_path):
    impressions = [shown(day * DAY_S, item=item) for day, item in [(0, 1), (1, 2), (3, 1), (3, 9), (3, 9), (3, 8)]]
    impressions = [row | {"session": number, "label": number % 2} for number, row in enumerate(impressions)]
    _, summary = build(impressions, [done(0)], test_days=1)
    assert {row["day"] for row in read(tmp_path / "samples", "test")} == {"2026-01-04"}
    assert {row["day"] for row in read(tmp_path / "samples", "train")} == {"2026-01-01", "2026-01-02"}
    assert summary["new_ads"] == {"ads": 2, "share_of_test_ads": 2 / 3, "share_of_test_impressions": 3 / 4}
    assert summary["train"]["positive_rate"] == 0.5
    _, summary = build(impressions, [done(0)], test_days=3)  # counts days of the calendar: the third has no impression
    assert (summary["train"]["days"], summary["test"]["days"]) == (1, 2)


@pytest.mark.parametrize("dtype", [pa.bool_(), pa.int8(), pa.int64(), pa.float32()])
def test_labels_of_any_type_are_0_and_1(dtype, options, client, tmp_path):
    log = table([shown(100, label=1), shown(200, label=0)])
    write(tmp_path / "logs", [replaced(log, "label", log["label"].cast(dtype))], [table([done(0)])])
    build_samples(options, client)
    samples = pq.read_table(next(tmp_path.glob("samples/train/*")))
    assert samples["label"].to_pylist() == [[1, 0]]
    assert samples.schema.field("label").type == pa.list_(pa.int8())


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns", "seconds", "naive"])
def test_time_in_any_unit(unit, options, client, tmp_path):
    impressions, behaviors = table([shown(100)], seconds=unit == "seconds"), table([done(99), done(100)])
    kind = pa.timestamp("us") if unit == "naive" else pa.timestamp(unit, "UTC") if unit != "seconds" else pa.int64()
    impressions = replaced(impressions, "timestamp", impressions["timestamp"].cast(kind))
    write(tmp_path / "logs", [impressions], [behaviors])
    build_samples(options, client)
    (row,) = read(options.samples)
    assert (row["timestamp"], len(row["behavior_item"])) == (START_S + 100, 1)


def test_digits_are_a_time_of_the_given_format_and_only_otherwise_a_number():
    time_N, wrong_N = parse_times(pa.chunked_array([["20260320", "1767261610", "20261399"]]), "s", "%Y%m%d")
    day_s = int(datetime(2026, 3, 20, tzinfo=UTC).timestamp())
    assert time_N.tolist() == [day_s * 1_000_000, 1767261610_000_000, 20261399_000_000]
    assert not wrong_N.any()


def test_columns_of_other_encodings(options, client, tmp_path):
    impressions, behaviors = table([shown(100), shown(101)]), table([done(0)])
    for name, kind in {"user": pa.int32(), "category": pa.uint8(), "image": pa.large_string()}.items():
        impressions = replaced(impressions, name, impressions[name].cast(kind))
    behaviors = replaced(behaviors, "image", behaviors["image"].dictionary_encode())
    write(tmp_path / "logs", [impressions], [replaced(behaviors, "dwell_s", pa.array([30], pa.int32()))])
    build_samples(options, client)
    assert read(options.samples)[0]["behavior_image"] == [key_of_uri("6.jpg")]
