"""One table of events: which rows are impressions and behaviours, and which clicks label which impressions."""

import dataclasses
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import SampleError, SampleOptionError
from pipeline.problems import Problem
from pipeline.samples.build import build_samples
from pipeline.samples.groups import label_impressions
from pipeline.samples.logs import CLICK, MICROSECONDS
from pipeline.samples.requests import with_behaviors
from tests.pipeline.samples.rows import DAY_S, START_S, Shop, all_bytes, missing, quarantine, read
from tests.raised import told

MAPPING: dict[str, Any] = {
    "impressions": {
        "files": "events.csv",
        "columns": {"timestamp": "ts", "user": "uid", "item": "sku", "image": None},
        "where": {"column": "event", "value": ["view", "impression"], "clicked": "click", "within_s": 60},
        "ad": {"price": "dense"},
    },
    "behaviors": "clicks",
}
EVENTS = """ts,uid,sku,event,price
1767225600,1,5,view,1
1767225610,1,5,view,1
1767225620,1,5,click,
1767225630,1,6,impression,1
1767225691,1,6,click,
1767225700,1,7,click,
1767225701,2,7,view,1
1767225702,2,8,purchase,1
1767225703,2,8,,1
1767225800,1,9,view,1
1767225801,1,9,view,much
1767225802,,9,click,1
"""


def test_clicks_label_impressions_and_are_behaviours_where_others_are_not(shop: Shop) -> None:
    shop.put("events.csv", EVENTS)
    found, summary = shop.build(MAPPING)
    ads = [(at["user"], item, label) for at in found for item, label in zip(at["ad_item"], at["label"], strict=True)]
    assert sorted(ads) == [(1, 5, 0), (1, 5, 1), (1, 6, 0), (1, 9, 0), (2, 7, 0)]
    shown, done = summary["impressions"], summary["behaviors"]
    assert (shown["rows"], shown["kept"], shown["clicks"], shown["duplicates"]) == (10, 5, 3, 0)
    assert shown["clicks_without_impression"] == 2 and shown["other_events"] == {"None": 1, "purchase": 1}
    assert done["rows"] == 4 and sum(done["quarantined"].values()) == 1
    assert [row[1:] for row in quarantine(shop.folder)] == [
        (10, "price is not a number"), (11, "user is null"), (11, "user is null"),
    ]  # fmt: skip
    shown = pa.table({"ts": [START_S + DAY_S] * 2, "uid": [1, 2], "sku": [5, 6], "price": [1.0, 2.0]})
    done = pa.table({"ts": [START_S] * 2, "uid": [1, 1], "sku": [5, 6]})
    rows = with_behaviors(shown, done, shop.options.samples).to_pylist()
    assert [row["behavior_item"] for row in rows] == [[6, 5], []]
    rows = with_behaviors(shown, done.append_column("event", pa.array(["view", "click"])), shop.options.samples)
    assert rows.column("behavior_item").to_pylist() == [[6], []]
    later = f"{START_S + 3 * DAY_S},1,5,view,1\n"
    shop.put("events.csv", EVENTS + later)
    last = shop.build(MAPPING)[0][-1]
    assert last["behavior_item"] == [7, 6, 5]
    columns = MAPPING["impressions"]["columns"]
    done = {"files": "events.csv", "columns": columns, "where": {"column": "event", "value": ["purchase", "view"]}}
    last = shop.build(MAPPING | {"behaviors": done})[0][-1]
    assert last["behavior_item"] == [9, 9, 5, 5]
    done = {"files": "events.csv", "where": {"column": "event", "value": "view", "clicked": "click"}}
    with pytest.raises(SampleOptionError, match=told(Problem.CLICKED_BEHAVIORS)):
        shop.build(MAPPING | {"behaviors": done})


@pytest.mark.parametrize("kind", ["text", "dictionary", "whole", "boolean"])
def test_the_column_of_events_has_any_type(shop: Shop, kind: str) -> None:
    events = {"text": ["v", "c", "x"], "whole": [1, 2, 3], "boolean": [True, False, None]}
    values = pa.array(events["text"]).dictionary_encode() if kind == "dictionary" else pa.array(events[kind])
    view, click = {"whole": (1, 2), "boolean": (True, False)}.get(kind, ("v", "c"))
    shop.put("events.csv/a.parquet", {"ts": [0, 1, 2], "uid": [1, 1, 1], "sku": [5, 5, 5], "event": values})
    events = where(value=view, clicked=click) | {"ad": {}}
    found, summary = shop.build(MAPPING | {"impressions": MAPPING["impressions"] | events})
    assert [row["label"] for row in found] == [[1]] and summary["impressions"]["rows"] == 2


def labelled_plainly(rows: list[tuple[int, int, int, int]], within: int) -> tuple[list[tuple[int, ...]], int]:
    """Label by loops; rows are user, item, time, label."""
    shown = sorted(row[:3] for row in rows if row[3] != CLICK)
    clicked: dict[tuple[int, ...], int] = {}
    unmatched = 0
    for user, item, at, label in rows:
        if label == CLICK:
            before = [row for row in shown if row[:2] == (user, item) and at - within <= row[2] <= at]
            if before:
                clicked[max(before)] = max(at, clicked.get(max(before), 0))
            unmatched += not before
    return sorted((*row, int(row in clicked), clicked.get(row, row[2])) for row in shown), unmatched


@pytest.mark.parametrize("seed", range(30))
def test_labels_are_those_of_plain_loops(seed: int) -> None:
    rng = random.Random(seed)
    within_s = rng.choice([1, 3, 10])
    rows = [
        (rng.randrange(2), rng.randrange(2), rng.randrange(30) * MICROSECONDS, rng.choice([0, CLICK]))
        for _ in range(rng.randrange(40))
    ]
    names = ("user", "item", "timestamp", "label")
    columns = {name: np.array([row[n] for row in rows], np.int64) for n, name in enumerate(names)}
    found, unmatched = label_impressions(columns, within_s)
    table = sorted(zip(*(found[name].tolist() for name in (*names, "clicked_at")), strict=True))
    assert (table, unmatched) == labelled_plainly(rows, within_s * MICROSECONDS)


@pytest.mark.parametrize("seed", range(4))
def test_days_with_clicks_have_the_bytes_of_a_rebuild(shop: Shop, tmp_path: Path, seed: int) -> None:
    """Clicks come up to a day after what they label, so long after the pause of a session over midnight."""
    rng = random.Random(seed)
    within_s = (300, 20_000, 86_400)[seed % 3]
    rows = []
    for _ in range(60):
        at, user, item = rng.randrange(8) * DAY_S - rng.randrange(9_000), rng.randrange(9), rng.randrange(3)
        rows.append((max(at, 0), user, item, "view"))
        if rng.random() < 0.7:
            rows.append((max(at, 0) + rng.randrange(1, 2 * within_s), user, item, "click"))
    rows = [row for row in rows if row[0] < 8 * DAY_S]

    def write_until(day: int) -> None:
        known = [row for row in rows if row[0] < day * DAY_S]
        lines = [f"{START_S + at},{user},{item},{event}\n" for at, user, item, event in rng.sample(known, len(known))]
        shop.put("events.csv", "ts,uid,sku,event\n" + "".join(lines))

    shown = MAPPING["impressions"] | {"where": MAPPING["impressions"]["where"] | {"within_s": within_s}, "ad": {}}
    write_until(2)
    shop.build(MAPPING | {"impressions": shown}, window_days=2, midnight_pause_s=600)
    for day in range(2, 8):
        write_until(day + 1)
        shop.add(since="2026-01-01")
        if any(at // DAY_S == day and event == "view" for at, _, _, event in rows):
            shop.add(days=f"2026-01-{day + 1:02}")
    anew = dataclasses.replace(shop.options, samples=str(tmp_path / "anew"), window_days=2, midnight_pause_s=600)
    build_samples(anew, shop.client)
    assert all_bytes(shop.options.samples) == all_bytes(anew.samples)
    assert any(1 in row["label"] for row in read(anew.samples))


def where(**changes: Any) -> dict[str, Any]:
    return {"where": {"column": "event", "value": "view", "clicked": "click"} | changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (where(value="shown"), told(Problem.NO_ROW_OF_WHERE, value=re.compile("view.*?"))),
        (where(column="kind"), missing(where="events.csv", value="kind", setting="impressions.where.column")),
        (
            {"ad": {"kind": {"kind": "dense", "column": "event"}}},
            told(Problem.NO_ROW_OF_WHERE, hint=re.compile("; 7 .*kind is not a number: 6, as 'view'")),
        ),
        (where(value=[]), "impressions.where.value"),
        (where(clicked="view"), told(Problem.VALUE_OF_BOTH, value="view")),
        (where(value="x", clicked="y"), told(Problem.NO_ROW_OF_WHERE)),
        (where(within_s=0), "impressions.where.within_s"),
        ({"columns": MAPPING["impressions"]["columns"] | {"label": "price"}}, told(Problem.LABEL_AND_CLICKED)),
    ],
)
def test_mistakes_are_told(shop: Shop, change: Any, message: str) -> None:
    shop.put("events.csv", EVENTS)
    done = {"files": "events.csv", "columns": MAPPING["impressions"]["columns"]}
    with pytest.raises(SampleError, match=message):
        shop.build({"impressions": MAPPING["impressions"] | change, "behaviors": done})


def test_days_are_added_where_clicks_of_labels_are_the_behaviours(shop: Shop) -> None:
    columns = MAPPING["impressions"]["columns"] | {"label": "clicked"}
    rows = [f"{START_S + at},1,5,1\n" for at in (DAY_S - 1, DAY_S, 2 * DAY_S)]
    shop.put("a.csv", "ts,uid,sku,clicked\n" + rows[0])
    shop.build({"impressions": {"files": "a.csv", "columns": columns}, "behaviors": "clicks"})
    shop.put("a.csv", "ts,uid,sku,clicked\n" + "".join(rows))
    shop.add(since="2026-01-01")
    assert [row["behavior_item"] for row in read(shop.options.samples)] == [[], [5, 5]]
