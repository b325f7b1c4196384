"""Sample groups against a slow reference that goes row by row, and every bad input."""

import dataclasses
import json
import os
import random
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dask
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster

from featurestore.keys import key_of_uri
from pipeline.cluster.tasks import run_all
from pipeline.errors import ClusterError, SampleError
from pipeline.samples import logs as logs_module
from pipeline.samples.build import FEWER_ROWS, SampleOptions, build_samples
from pipeline.samples.publish import replaced_folder

Row = dict[str, Any]

DAY_S = 86_400
START_S = 1_767_225_600  # 2026-01-01, midnight in UTC
IMPRESSION = {"user": 1, "session": 1, "scene": 0, "item": 5, "image": "5.jpg", "category": 2, "label": 0}
BEHAVIOR = {"user": 1, "item": 6, "image": "6.jpg", "category": 2, "dwell_s": 30.0}
INT_COLUMNS = ("user", "session", "scene", "item", "category", "user_age", "user_gender", "city")


def shown(at_s: float, **changes: Any) -> Row:
    """An impression `at_s` seconds after the log's first midnight."""
    return {"timestamp": START_S + at_s} | IMPRESSION | changes


def done(at_s: float, **changes: Any) -> Row:
    """A behaviour."""
    return {"timestamp": START_S + at_s} | BEHAVIOR | changes


def table(rows: list[Row], seconds: bool = False) -> pa.Table:
    """Rows as a log has them, time as a timestamp or as whole seconds."""
    types = dict.fromkeys(INT_COLUMNS, pa.int64()) | {"label": pa.int8(), "dwell_s": pa.float64()}
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name == "timestamp":
            whole = [None if value is None else round(value * (1 if seconds else 1_000_000)) for value in values]
            columns[name] = pa.array(whole, pa.int64())
            if not seconds:
                columns[name] = columns[name].cast(pa.timestamp("us", "UTC"))
        else:
            columns[name] = pa.array(values, types.get(name))
    return pa.table(columns)


def replaced(log: pa.Table, name: str, values: Any) -> pa.Table:
    return log.set_column(log.schema.get_field_index(name), name, values)


def write(folder: Path, impressions: list[pa.Table], behaviors: list[pa.Table]) -> str:
    for log, tables in (("impressions", impressions), ("behaviors", behaviors)):
        (folder / log).mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(tables):
            pq.write_table(content, folder / log / f"day={number:02d}.parquet", row_group_size=7)
    return str(folder)


@pytest.fixture
def options(tmp_path: Path) -> SampleOptions:
    return SampleOptions(logs=str(tmp_path / "logs"), samples=str(tmp_path / "samples"), test_days=0)


def read(folder: str | Path, split: str = "*") -> list[Row]:
    return [row for path in sorted(Path(folder).glob(f"{split}/*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def build(options: SampleOptions, client: Client, tmp_path: Path):
    def run(impressions: list[Row], behaviors: list[Row], **changes: Any) -> tuple[list[Row], dict[str, Any]]:
        write(tmp_path / "logs", [table(impressions)], [table(behaviors)])
        summary = build_samples(dataclasses.replace(options, **changes), client)
        return read(tmp_path / "samples"), summary

    return run


def behavior_items(rows: list[Row]) -> list[list[int]]:
    return [row["behavior_item"] for row in rows]


# The reference


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
    return sorted((sample(group, behaviors, options) for group in groups), key=sort_key)


def sort_key(row: Row) -> tuple[int, int, int]:
    return row["timestamp"], row["user"], row["session"]


def sample(group: list[Row], behaviors: list[Row], options: SampleOptions) -> Row:
    first = group[0]
    low, high = first["timestamp"] - options.window_days * DAY_S, first["timestamp"]
    history = {
        (row["timestamp"], row["item"], row["image"], row["category"])
        for row in behaviors
        if row["user"] == first["user"] and low <= row["timestamp"] < high and row["dwell_s"] >= options.min_dwell_s
    }
    newest = sorted(history, reverse=True)[: options.max_behaviors]
    return {
        "user": first["user"],
        "session": first["session"],
        "timestamp": int(first["timestamp"]),
        "day": datetime.fromtimestamp(first["timestamp"], UTC).strftime("%Y-%m-%d"),
        "user_age": first["user_age"],
        "behavior_item": [row[1] for row in newest],
        "behavior_image": [row[2] for row in newest],
        "behavior_category": [row[3] for row in newest],
        "ad_item": [row["item"] for row in group],
        "ad_image": [row["image"] for row in group],
        "ad_category": [row["category"] for row in group],
        "ad_scene": [row["scene"] for row in group],
        "label": [row["label"] for row in group],
    }


def random_logs(rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Few users, items and moments (half seconds around some midnights): all ties and repetitions occur."""
    moments = [
        rng.randrange(20) * DAY_S + rng.choice([-1, 1]) * rng.randrange(200) / 2 * rng.choice([1, 60])
        for _ in range(25)
    ]
    age = [rng.randrange(9) for _ in range(6)]

    def row(make: Any, **changes: Any) -> Row:
        image = key_of_uri(f"{rng.randrange(2)}")
        common = {"user": rng.randrange(6), "item": rng.randrange(3), "image": image, "category": rng.randrange(2)}
        return make(rng.choice(moments), **common, **changes)

    impressions = [
        row(shown, session=rng.randrange(2), scene=rng.randrange(2), label=rng.randrange(2)) for _ in range(80)
    ]
    impressions = [row | {"user_age": age[row["user"]]} for row in impressions]
    behaviors = [row(done, dwell_s=rng.choice([0.0, 4.9, 5.0, 60.0])) for _ in range(150)]
    behaviors = [row for row in behaviors if row["user"] != 3]  # one user has none
    return impressions + impressions[:10], behaviors + behaviors[:20]


def in_pieces(rng: random.Random, rows: list[Row]) -> list[pa.Table]:
    """The rows in any order in some files, so that a user's are in many."""
    rows = rng.sample(rows, len(rows))
    edge = rng.randrange(1, len(rows) - 1)
    return [table(rows[:edge]), table(rows[edge:])]


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_those_of_the_reference(seed, options, client, tmp_path, monkeypatch):
    monkeypatch.setattr(logs_module, "PIECE_ROWS", 20)  # several tasks per file
    rng = random.Random(seed)
    impressions, behaviors = random_logs(rng)
    write(tmp_path / "logs", in_pieces(rng, impressions), in_pieces(rng, behaviors))
    options = dataclasses.replace(
        options, partitions=rng.choice([1, 3, 8]), max_behaviors=rng.choice([1, 3, 50]), window_days=rng.choice([1, 14])
    )
    summary = build_samples(options, client)
    rows = read(options.samples, "train")
    expected = reference(impressions, behaviors, options)
    assert rows == expected  # and so in this order
    check_counts(summary, impressions, behaviors, expected)


def check_counts(summary: dict[str, Any], impressions: list[Row], behaviors: list[Row], groups: list[Row]) -> None:
    log = summary["impressions"]
    assert log["rows"] == len(impressions)
    assert log["kept"] == sum(len(row["label"]) for row in groups) == summary["train"]["impressions"]
    assert log["kept"] + log["duplicates"] == log["rows"]
    log = summary["behaviors"]
    assert log["rows"] == len(behaviors) == sum(log[name] for name in ("used", "unused", "short_dwell", "duplicates"))
    assert log["short_dwell"] == sum(row["dwell_s"] < 5 for row in behaviors)
    assert summary["users"] == len({row["user"] for row in impressions})
    assert summary["groups"] == len(groups)
    assert summary["groups_without_behaviors"] == sum(not row["behavior_item"] for row in groups)
    assert summary["behaviors_in_groups"] == sum(len(row["behavior_item"]) for row in groups)
    labels = [label for row in groups for label in row["label"]]
    assert summary["train"]["positive_rate"] == pytest.approx(np.mean(labels))


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
    rows, summary = build(impressions, [done(0)], user_columns=("city",))
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


def test_columns_of_other_encodings(options, client, tmp_path):
    impressions, behaviors = table([shown(100), shown(101)]), table([done(0)])
    for name, kind in {"user": pa.int32(), "category": pa.uint8(), "image": pa.large_string()}.items():
        impressions = replaced(impressions, name, impressions[name].cast(kind))
    behaviors = replaced(behaviors, "image", behaviors["image"].dictionary_encode())
    write(tmp_path / "logs", [impressions], [replaced(behaviors, "dwell_s", pa.array([30], pa.int32()))])
    build_samples(options, client)
    assert read(options.samples)[0]["behavior_image"] == [key_of_uri("6.jpg")]


# The files


def all_bytes(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.parquet")}


def test_equal_logs_give_equal_bytes_whatever_cluster_and_partitions(options, client, tmp_path, monkeypatch):
    rng = random.Random(1)
    impressions, behaviors = random_logs(rng)
    write(tmp_path / "logs", in_pieces(rng, impressions), in_pieces(rng, behaviors))
    options = dataclasses.replace(options, test_days=2, partitions=1)
    build_samples(options, client)
    expected = all_bytes(options.samples)
    assert len(expected) > 10
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=":0") as cluster,
        Client(cluster) as processes,
    ):
        build_samples(dataclasses.replace(options, partitions=7), processes)
    assert all_bytes(options.samples) == expected
    monkeypatch.setattr(logs_module, "PIECE_ROWS", 10)
    for path in tmp_path.glob("logs/*/*"):
        path.unlink()
    write(tmp_path / "logs", in_pieces(rng, impressions), in_pieces(rng, behaviors))  # shuffled anew
    build_samples(dataclasses.replace(options, partitions=3), client)
    assert all_bytes(options.samples) == expected


def test_long_day_becomes_several_sorted_files(options, client, tmp_path):
    impressions = [shown(at_s, user=at_s, session=at_s) for at_s in range(0, DAY_S, 60)]
    write(tmp_path / "logs", [table(impressions)], [table([done(0)])])
    build_samples(dataclasses.replace(options, groups_per_file=500, partitions=5), client)
    files = sorted(path.name for path in (tmp_path / "samples/train").iterdir())
    assert files == [f"day=2026-01-01-00{number}.parquet" for number in range(3)]
    rows = read(options.samples)
    assert [row["user"] for row in rows] == [row["user"] for row in impressions]


def test_row_groups_are_moderate(options, client, tmp_path):
    impressions = [shown(at_s, user=at_s) for at_s in range(5000)]
    write(tmp_path / "logs", [table(impressions)], [table([done(0)])])
    build_samples(options, client)
    metadata = pq.read_metadata(next(tmp_path.glob("samples/train/*")))
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [2048, 2048, 904]


def test_logs_at_another_address_and_in_folders_by_day(options, client, tmp_path):
    memory = fsspec.filesystem("memory")
    for path, rows in {"impressions/day=1/a.parquet": [shown(100)], "behaviors/b.parquet": [done(0)]}.items():
        pq.write_table(table(rows), tmp_path / "one.parquet")
        memory.pipe_file(f"/sample-logs/{path}", (tmp_path / "one.parquet").read_bytes())
    build_samples(dataclasses.replace(options, logs="memory://sample-logs"), client)
    assert behavior_items(read(options.samples)) == [[6]]


# Published as a whole


def test_rerun_replaces_everything(build, tmp_path):
    build([shown(0), shown(5 * DAY_S)], [done(0)])
    rows, _ = build([shown(DAY_S)], [done(0)])
    assert [row["day"] for row in rows] == ["2026-01-02"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "quarantine.parquet", "summary.json", "test", "train",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "samples"]


def test_failed_run_leaves_the_old_samples_and_nothing_else(build, tmp_path, monkeypatch):
    rows, _ = build([shown(0)], [done(0)])
    monkeypatch.setattr("pipeline.samples.build.summarise", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build([shown(DAY_S)], [done(0)])
    assert read(tmp_path / "samples") == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "samples"]


def test_folder_of_something_else_is_not_replaced(build, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.samples.build._shuffle", lambda *_: pytest.fail("worked before it looked"))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "thesis.txt").write_text("years of work")
    with pytest.raises(SampleError, match="samples has files that are no samples"):
        build([shown(0)], [done(0)])
    assert (tmp_path / "samples" / "thesis.txt").read_text() == "years of work"


def test_file_in_place_of_the_folder_is_named(build, tmp_path):
    (tmp_path / "samples").write_text("")
    with pytest.raises(SampleError, match="is a file"):
        build([shown(0)], [done(0)])


def test_samples_at_an_address_are_refused(build):
    with pytest.raises(SampleError, match="samples=s3://shop/samples"):
        build([shown(0)], [done(0)], samples="s3://shop/samples")


def test_remains_of_a_killed_run_go_and_a_running_one_stays(tmp_path):
    target = tmp_path / "samples"
    killed = tmp_path / ".samples.building-1"
    killed.mkdir()
    (killed / ".lock").touch()
    with replaced_folder(target) as running:
        assert not killed.exists()
        with replaced_folder(target) as other:
            assert running.exists()
            (other / "summary.json").write_text("other")
        (running / "summary.json").write_text("running")
    assert (target / "summary.json").read_text() == "running"
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


# Bad input


def quarantine(folder: Path) -> list[tuple[str, int, str]]:
    rows = pq.read_table(folder / "samples" / "quarantine.parquet").to_pylist()
    return [(row["file"], row["row"], row["reason"]) for row in rows]


def test_bad_rows_are_counted_and_kept_aside(options, client, tmp_path):
    changes = [
        {},
        *({name: None} for name in ("timestamp", "user", "session", "scene", "item", "image", "category", "label")),
        {"image": ""}, {"label": 2}, {"label": -1}, {"timestamp": -1}, {"timestamp": 10**10},
        {"user": None, "label": 5},
    ]  # fmt: skip
    impressions = [shown(100) | {"session": number} | change for number, change in enumerate(changes)]
    behavior_changes = [{}, {"dwell_s": float("nan")}, {"dwell_s": float("inf")}, {"dwell_s": -1.0}, {"dwell_s": None},
                        {"user": None}, {"timestamp": 10**10}]  # fmt: skip
    behaviors = [done(0) | change for change in behavior_changes]
    write(tmp_path / "logs", [table(impressions)], [table(behaviors)])
    summary = build_samples(options, client)
    assert [row["session"] for row in read(options.samples)] == [0]
    nulls = ("timestamp", "user", "session", "scene", "item", "image", "category", "label")
    reasons = [f"{name} is null" for name in nulls]
    reasons += ["image is empty", "label is not 0 or 1", "label is not 0 or 1"]
    reasons += ["timestamp is before 1970", "timestamp is in the future", "user is null"]
    bad = ["dwell_s is not finite", "dwell_s is not finite", "dwell_s is negative", "dwell_s is null", "user is null",
           "timestamp is in the future"]  # fmt: skip
    assert quarantine(tmp_path) == [
        *(("impressions/day=00.parquet", row, reason) for row, reason in enumerate(reasons, 1)),
        *(("behaviors/day=00.parquet", row, reason) for row, reason in enumerate(bad, 1)),
    ]
    assert summary["impressions"]["quarantined"] == dict(Counter(reasons))
    assert summary["behaviors"]["quarantined"] == dict(Counter(bad))
    assert summary["impressions"]["rows"] == len(changes)
    assert json.loads((tmp_path / "samples/summary.json").read_text())["impressions"] == summary["impressions"]


def test_row_numbers_in_quarantine_count_from_the_files_first_row(options, client, tmp_path, monkeypatch):
    monkeypatch.setattr(logs_module, "PIECE_ROWS", 10)
    impressions = [shown(at_s, label=3 if at_s in (0, 15, 39) else 0) for at_s in range(40)]
    write(tmp_path / "logs", [table(impressions), table([shown(50, label=3), shown(51)])], [table([done(0)])])
    build_samples(options, client)
    assert [(file[-7:], row) for file, row, _ in quarantine(tmp_path)] == [
        ("parquet", 0), ("parquet", 15), ("parquet", 39), ("parquet", 0),
    ]  # fmt: skip


def test_row_from_the_future_does_not_become_the_test_day(build):
    rows, summary = build([shown(0), shown(DAY_S), shown(0, timestamp=2 * 10**9)], [done(0)], test_days=1,
                          latest_s=START_S + 9 * DAY_S)  # fmt: skip
    assert summary["test"]["last_day"] == "2026-01-02"
    assert len(rows) == 2
    _, summary = build([shown(0), shown(9 * DAY_S), shown(9 * DAY_S + 1)], [done(0)], latest_s=START_S + 9 * DAY_S)
    assert summary["impressions"]["quarantined"] == {"timestamp is in the future": 1}  # the limit itself is not


@pytest.mark.parametrize(("log", "name"), [("impressions", "label"), ("impressions", "user"), ("behaviors", "dwell_s")])
def test_missing_column_is_named_with_its_file(log, name, options, client, tmp_path):
    impressions, behaviors = table([shown(0)]), table([done(0)])
    bad = (impressions if log == "impressions" else behaviors).drop_columns([name])
    write(tmp_path / "logs", [impressions], [behaviors])
    pq.write_table(bad, tmp_path / "logs" / log / "day=77.parquet")
    with pytest.raises(SampleError, match=rf"{log}/day=77.parquet: column '{name}' is missing; there are timestamp"):
        build_samples(options, client)
    assert not Path(options.samples).exists()


@pytest.mark.parametrize(
    ("log", "name", "value", "kind"),
    [
        ("impressions", "user", "u1", "string"),
        ("impressions", "timestamp", "2026-01-01", "string"),
        ("impressions", "timestamp", 1.5, "double"),
        ("impressions", "image", 1.5, "double"),
        ("impressions", "label", "yes", "string"),
        ("impressions", "item", 1.0, "double"),
        ("impressions", "category", [1], "list<"),
        ("impressions", "user_age", "old", "string"),
        ("behaviors", "dwell_s", "long", "string"),
        ("behaviors", "image", True, "bool"),
    ],
)
def test_wrong_type_is_named_with_column_and_file(log, name, value, kind, options, client, tmp_path):
    tables = {"impressions": table([shown(0, user_age=1)]), "behaviors": table([done(0)])}
    tables[log] = replaced(tables[log], name, pa.array([value]))
    write(tmp_path / "logs", [tables["impressions"]], [tables["behaviors"]])
    with pytest.raises(SampleError, match=rf"{log}/day=00.parquet: column '{name}' is {kind}.*, wanted is a"):
        build_samples(options, client)


def test_unsigned_64_bit_user_is_refused(options, client, tmp_path):
    impressions = replaced(table([shown(0)]), "user", pa.array([2**63], pa.uint64()))
    write(tmp_path / "logs", [impressions], [table([done(0)])])
    with pytest.raises(SampleError, match="column 'user' is uint64"):
        build_samples(options, client)


def test_column_that_stands_twice_is_named(options, client, tmp_path):
    impressions = table([shown(0)])
    write(tmp_path / "logs", [impressions.append_column("user", impressions["user"])], [table([done(0)])])
    with pytest.raises(SampleError, match="column 'user' stands 2 times"):
        build_samples(options, client)


@pytest.mark.parametrize(("column", "message"), [("city", "column 'city' is missing"), ("item", "user_columns=item")])
def test_user_column_that_cannot_be_kept_is_named(column, message, build):
    with pytest.raises(SampleError, match=message):
        build([shown(0)], [done(0)], user_columns=(column,))


@pytest.mark.parametrize("log", ["impressions", "behaviors"])
def test_log_that_is_not_there_is_named(log, options, client, tmp_path):
    write(tmp_path / "logs", [table([shown(0)])], [table([done(0)])])
    (tmp_path / "logs" / log / "day=00.parquet").rename(tmp_path / "logs" / log / "day=00.csv")
    with pytest.raises(SampleError, match=rf"logs/{log}: no .parquet files in it"):
        build_samples(options, client)


@pytest.mark.parametrize("log", ["impressions", "behaviors"])
def test_log_without_a_row_is_named(log, options, client, tmp_path):
    tables = {"impressions": table([shown(0)]), "behaviors": table([done(0)])}
    tables[log] = tables[log].slice(0, 0)
    write(tmp_path / "logs", [tables["impressions"]], [tables["behaviors"]])
    with pytest.raises(SampleError, match=rf"logs/{log}: 1 files and not one row"):
        build_samples(options, client)


def test_log_of_bad_rows_alone_is_named(build):
    with pytest.raises(SampleError, match=r"impressions: all 2 rows are bad \(label is not 0 or 1: 2\)"):
        build([shown(0, label=4), shown(1, label=5)], [done(0)])


def test_log_of_bad_behaviors_alone_gives_empty_lists(build):
    rows, summary = build([shown(100)], [done(0, dwell_s=-1.0)])
    assert behavior_items(rows) == [[]]
    assert summary["behaviors"]["quarantined"] == {"dwell_s is negative": 1}


def test_log_of_test_days_alone_is_refused(build):
    with pytest.raises(SampleError, match=r"nothing is left to train on.*--test-days"):
        build([shown(0), shown(DAY_S)], [done(0)], test_days=2)


@pytest.mark.parametrize("damage", ["text", "cut", "flipped"])
def test_damaged_file_is_named(damage, options, client, tmp_path):
    write(tmp_path / "logs", [table([shown(0)])], [table([done(0)])])
    path = tmp_path / "logs/behaviors/day=00.parquet"
    pq.write_table(table([done(at_s) for at_s in range(1000)]), path, write_page_checksum=True, compression="none")
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[500] ^= 1
    path.write_bytes(b"not parquet" if damage == "text" else data[: len(data) // 2] if damage == "cut" else data)
    with pytest.raises(SampleError, match=r"behaviors/day=00\.parquet: "):
        build_samples(options, client)
    assert not Path(options.samples).exists()


def test_worker_that_dies_is_explained():
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(
            n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address=":0", silence_logs=50
        ) as cluster,
        Client(cluster) as processes,
        pytest.raises(ClusterError, match=r"make groups: task 1 of 1 brings the workers down.*; raise --partitions"),
    ):
        run_all(processes, "make groups", os._exit, [(1,)], FEWER_ROWS)
