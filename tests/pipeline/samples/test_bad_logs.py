"""Bad rows of logs are kept aside and counted; logs that give no samples are named."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import dask
import pyarrow as pa
import pytest
from distributed import Client, LocalCluster

from featurestore.keys import NO_IMAGE, key_of_uri
from pipeline.cluster.tasks import run_all
from pipeline.errors import ClusterError, SampleError
from pipeline.problems import Problem
from pipeline.samples import logs as pieces_module
from pipeline.samples.build import FEWER_ROWS, build_samples, how_times
from tests.pipeline.samples.rows import DAY_S, START_S, behavior_items, done, quarantine, replaced, shown, table, write
from tests.raised import raises


def test_bad_rows_are_counted_and_kept_aside(build, tmp_path):
    changes = [
        {},
        *({name: None} for name in ("timestamp", "user", "session", "scene", "item", "image", "category", "label")),
        {"image": ""}, {"label": 2}, {"label": -1}, {"timestamp": -1}, {"timestamp": 10**10},
        {"user": None, "label": 5},
    ]  # fmt: skip
    impressions = [shown(100) | {"session": number} | change for number, change in enumerate(changes)]
    behavior_changes = [{}, {"dwell_s": float("nan")}, {"dwell_s": float("inf")}, {"dwell_s": -1.0}, {"dwell_s": None},
                        {"user": None}, {"timestamp": 10**10}]  # fmt: skip
    rows, summary = build(impressions, [done(0) | change for change in behavior_changes])
    kept = {row["session"]: row["ad_image"] for row in rows}
    assert kept == {0: [key_of_uri("5.jpg")], 6: [NO_IMAGE], 9: [NO_IMAGE]}  # an ad without an image is an ad
    named = ("timestamp", "user", "session", "scene", "item", "category", "label")
    reasons = [f"{name} is null" for name in named]
    reasons += ["label is not 0 or 1", "label is not 0 or 1"]
    reasons += ["timestamp is before 1970", "timestamp is in the future", "user is null"]
    bad = ["dwell_s is not finite", "dwell_s is not finite", "dwell_s is negative", "dwell_s is null", "user is null",
           "timestamp is in the future"]  # fmt: skip
    places = [1, 2, 3, 4, 5, 7, 8, *range(10, 15)]
    assert quarantine(tmp_path) == [
        *(("impressions/day=00.parquet", row, reason) for row, reason in zip(places, reasons, strict=True)),
        *(("behaviors/day=00.parquet", row, reason) for row, reason in enumerate(bad, 1)),
    ]
    assert summary["impressions"]["quarantined"] == dict(Counter(reasons))
    assert summary["behaviors"]["quarantined"] == dict(Counter(bad))
    assert summary["impressions"]["rows"] == len(changes)
    assert summary["impressions"]["without_image"] == 2
    assert summary["impressions"]["examples"]["label is not 0 or 1"] == "2"
    assert json.loads((tmp_path / "samples/summary.json").read_text())["impressions"] == summary["impressions"]


def test_row_numbers_in_quarantine_count_from_the_files_first_row(options, client, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces_module, "PIECE_ROWS", 10)
    impressions = [shown(at_s, label=3 if at_s in (0, 15, 39) else 0) for at_s in range(40)]
    write(tmp_path / "logs", [impressions, [shown(50, label=3), shown(51)]], [[done(0)]])
    build_samples(options, client)
    found = [(Path(file).name, row) for file, row, _ in quarantine(tmp_path)]
    assert found == [*(("day=00.parquet", row) for row in (0, 15, 39)), ("day=01.parquet", 0)]


def test_row_from_the_future_does_not_become_the_test_day(build):
    limit = {"latest_s": START_S + 9 * DAY_S}
    rows, summary = build([shown(0), shown(DAY_S), shown(0, timestamp=2 * 10**9)], [done(0)], test_days=1, **limit)
    assert summary["test"]["last_day"] == "2026-01-02"
    assert len(rows) == 2
    _, summary = build([shown(0), shown(9 * DAY_S), shown(9 * DAY_S + 1)], [done(0)], **limit)
    assert summary["impressions"]["quarantined"] == {"timestamp is in the future": 1}  # the limit itself is not


@pytest.mark.parametrize(
    ("which", "name", "value", "kind"),
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
def test_wrong_type_is_named_with_column_and_file(which, name, value, kind, build):
    tables = {"impressions": table([shown(0, user_age=1)]), "behaviors": table([done(0)])}
    tables[which] = replaced(tables[which], name, pa.array([value]))
    where, value = re.compile(f"/{which}/day=00.parquet$"), re.compile(f"^{kind}")
    with raises(SampleError, Problem.WRONG_TYPE, where=where, column=name, value=value):
        build(*tables.values())


FIRST, SECOND = "/day=00.parquet", "/day=01.parquet"
LACKS_USER = {"value": "user", "near": re.compile(r"\bcategory, ")}
OF_USER, TWICE = {"column": "user", "value": "uint64"}, {"value": "user", "count": 2}


@pytest.mark.parametrize(
    ("problem", "file", "values", "tables_of"),
    [
        (Problem.COLUMN_MISSING, SECOND, LACKS_USER, lambda log: [log, log.drop_columns(["user"])]),
        (Problem.WRONG_TYPE, FIRST, OF_USER, lambda log: [replaced(log, "user", pa.array([2**63], pa.uint64()))]),
        (Problem.REPEATED_COLUMN, FIRST, TWICE, lambda log: [log.append_column("user", log["user"])]),
        (Problem.NO_LOG_FILES, "", {}, lambda log: []),
        (Problem.EMPTY_FILES, "", {"count": 1}, lambda log: [log.slice(0, 0)]),
    ],
)
@pytest.mark.parametrize("log", ["impressions", "behaviors"])
def test_log_that_gives_no_samples_is_named(problem, file, values, tables_of, log, options, client, tmp_path):
    logs = {"impressions": [table([shown(0)])], "behaviors": [table([done(0)])]}
    logs[log] = tables_of(logs[log][0])
    write(tmp_path / "logs", *logs.values())
    with raises(SampleError, problem, where=f"{tmp_path}/logs/{log}{file}", **values):
        build_samples(options, client)
    assert not Path(options.samples).exists()


@pytest.mark.parametrize("theirs", ["_delta_log/00000000000000000000.json", "metadata/v1.metadata.json"])
def test_a_table_whose_files_have_removed_rows_is_refused(theirs, build, tmp_path):
    place = tmp_path / "logs/impressions" / theirs
    place.parent.mkdir(parents=True)
    place.touch()
    with raises(SampleError, Problem.TABLE_OF_LAKE, where=tmp_path / "logs/impressions"):
        build([shown(0)], [done(0)])


def test_logs_of_bad_rows_alone(build):
    with raises(SampleError, Problem.ALL_ROWS_BAD, count=2, reasons="label is not 0 or 1: 2, as 4"):
        build([shown(0, label=4), shown(1, label=5)], [done(0)])
    rows, summary = build([shown(100)], [done(0, dwell_s=-1.0)])
    assert behavior_items(rows) == [[]]
    assert summary["behaviors"]["quarantined"] == {"dwell_s is negative": 1}


@pytest.mark.services
def test_worker_that_dies_is_explained():
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(
            n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address=":0", silence_logs=50
        ) as cluster,
        Client(cluster) as processes,
        raises(ClusterError, Problem.DEADLY_TASK, where="make groups", number=1, count=1, advice=FEWER_ROWS),
    ):
        run_all(processes, "make groups", os._exit, [(1,)], FEWER_ROWS)


@pytest.mark.parametrize(
    ("example", "forms"),
    [
        ("'01/03/2026 06:00'", '"%d/%m/%Y %H:%M" or "%m/%d/%Y %H:%M"'),
        ("'01/25/2026 06:00:10'", '"%m/%d/%Y %H:%M:%S"'),
        ("'25.1.2026'", '"%d.%m.%Y"'),
        ("'soon'", '"%d/%m/%Y %H:%M:%S"'),
    ],
)
def test_forms_that_fit_a_time_are_suggested(example, forms):
    assert how_times(example) == Problem.TIME_FORM_NEEDED.of(forms)
