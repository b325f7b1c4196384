"""Logs that lack columns, and tables that have them: by item, by user, for impressions and behaviours alike."""

import dataclasses
import math
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.keys import NO_IMAGE
from featurestore.keys import key_of_uri as key
from jobs.build_samples import summary_text
from pipeline.errors import SampleError, SampleOptionError
from pipeline.problems import Problem
from pipeline.samples.build import build_samples
from pipeline.samples.requests import with_behaviors
from tests.pipeline.samples.rows import DAY_S, START_S, Row, Shop, all_bytes, missing, read
from tests.raised import raises, told
from trainer.schema.fields import load_schema

MAPPING: dict[str, Any] = {
    "impressions": {
        "files": "shown.csv",
        "columns": {"timestamp": "ts", "user": "uid", "item": "item", "image": "photo", "category": "cat",
                    "label": "clicked"},
        "user": {"age": "dense", "city": "id"},
        "ad": {"price": "dense", "maker": {"kind": "id", "column": "brand"},
               "tags": {"kind": "multi_id", "split": "|"}},
    },
    "behaviors": {
        "files": "done",
        "columns": {"timestamp": "ts", "user": "uid", "item": "item", "image": "photo", "category": "cat"},
        "ad": {"maker": {"kind": "id", "column": "brand"}},
    },
    "join": {"item": {"files": "products.csv", "column": "sku"}, "user": {"files": "users.parquet", "column": "uid"}},
}  # fmt: skip
SHOWN = """ts,uid,item,clicked
1767261600,ann,5,1
1767261601,ann,a6,0
1767261602,ann,9,0
1767261603,bob,8,1
1767261604,bob,7,1
"""
PRODUCTS = """sku;photo;cat;price;brand;tags
5;5.jpg;shoes;1.009,5;Acme;red|blue
a6;;bags;7,0;b;
7;7.jpg;;;b;red
4;4.jpg;bags;2,0;never shown;
"""


@pytest.fixture
def tables(shop: Shop) -> Shop:
    shop.put("shown.csv", SHOWN)
    shop.put("products.csv", PRODUCTS)
    items = pa.array([5, 9, 5], pa.int32())
    shop.put("done/a.parquet", {"ts": [START_S, START_S, START_S + 1], "uid": ["ann", "bob", "bob"], "item": items})
    shop.put("users.parquet", {"uid": ["ann"], "age": [31.5], "city": ["Rome"], "unused": [1]})
    return shop


def by_user(rows: list[Row]) -> dict[int, Row]:
    return {row["user"]: row for row in rows}


def test_columns_of_items_and_users_are_those_of_their_tables(tables: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    found, summary = tables.build(MAPPING)
    ann, bob = (by_user(found)[key(name)] for name in ("ann", "bob"))
    assert ann["ad_image"] == [key("5.jpg"), NO_IMAGE, NO_IMAGE]
    assert ann["ad_category"] == [key("shoes"), key("bags"), -1]
    assert ann["ad_price"][:2] == [1009.5, 7.0] and math.isnan(ann["ad_price"][2])
    assert ann["ad_maker"] == [key("Acme"), key("b"), -1]
    assert ann["ad_tags"] == [[key("red"), key("blue")], [], []]
    assert (ann["age"], ann["city"]) == (31.5, key("Rome"))
    assert ann["behavior_image"] == [key("5.jpg")] and ann["behavior_maker"] == [key("Acme")]
    assert bob["ad_image"] == [NO_IMAGE, key("7.jpg")] and bob["ad_category"] == [-1, -1]
    assert all(map(math.isnan, (bob["age"], *bob["ad_price"]))) and bob["city"] == -1
    assert bob["behavior_image"] == [key("5.jpg"), NO_IMAGE] and bob["behavior_category"] == [key("shoes"), -1]
    assert summary["impressions"]["lacking"] == {"item": 2, "user": 2} and summary["behaviors"]["lacking"]["item"] == 1
    said = summary_text(summary)
    assert "; 2 rows whose item is not in its table" in said and "; 1 row whose item is not in its table" in said
    assert summary["impressions"]["kept"] == 5 and summary["impressions"]["without_image"] == 3
    named = pq.read_table(tables.folder / "samples/images.parquet").to_pylist()
    assert {row["uri"] for row in named} == {"5.jpg", "7.jpg"}
    texts = pq.read_table(tables.folder / "samples/ids.parquet").to_pylist()
    assert [row["id"] for row in texts] == sorted(row["id"] for row in texts)
    assert all(row["id"] == key(row["text"]) for row in texts)
    assert {row["text"] for row in texts} == {"a6", "ann", "bob", "shoes", "bags", "Acme", "b", "red", "blue", "Rome"}
    assert "products.csv: read as CSV with delimiter ;" in " ".join(capsys.readouterr().out.split())


def test_numbers_of_joined_tables_are_filled_and_those_of_the_log_come_first(tables: Shop) -> None:
    tables.put("shown.csv", re.sub(",[987],", ",5,", SHOWN).replace("bob", "ann"))
    tables.build(MAPPING)
    fields = {field.name: field for field in load_schema(tables.folder / "samples/schema.yaml").fields}
    assert (fields["ad_price"].fill, fields["age"].fill) == ("mean", "mean")
    more = (",price", *(f",{n}" for n in range(5)))
    tables.put("shown.csv", "".join(f"{line}{end}\n" for line, end in zip(SHOWN.splitlines(), more, strict=True)))
    found, _ = tables.build(MAPPING)
    assert by_user(found)[key("ann")]["ad_price"] == [0.0, 1.0, 2.0]


def test_equal_rows_of_a_table_are_one_and_those_that_differ_are_refused(tables: Shop) -> None:
    for again in ("a6;6.jpg;bags;7,0;b;", "a6;;bags;7,0;b;red", "a6;;bags;;b;"):
        tables.put("products.csv", f"{PRODUCTS}{again}\n")
        of_a6 = {"where": re.compile("/products.csv$"), "column": "sku", "value": "a6", "others": re.compile("photo")}
        with raises(SampleError, Problem.ROWS_DIFFER, **of_a6):
            tables.build(MAPPING)
    assert not (tables.folder / "samples").exists()
    tables.put("products.csv", PRODUCTS)
    expected, _ = tables.build(MAPPING)
    for again in ("5;5.jpg;shoes;1.009,5;Acme;red|blue", "7;7.jpg;;;b;red"):
        tables.put("products.csv", f"{PRODUCTS}{again}\n")
        assert str(tables.build(MAPPING)[0]) == str(expected)


def test_bad_rows_of_a_table_are_left_out_and_told(tables: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    tables.put("products.csv", PRODUCTS.replace("1.009,5", "much") + "17;17.jpg\n;0.jpg;;;;\n")
    found, summary = tables.build(MAPPING | {"csv": {"decimal": ","}})
    assert "3 rows are left out (" in (text := " ".join(capsys.readouterr().out.split()))
    for reason in ("price is not a number: 1", "2 values instead of 6: 1", "sku is null: 1"):
        assert reason in text
    assert summary["impressions"]["lacking"]["item"] == 3
    assert by_user(found)[key("ann")]["ad_image"] == [NO_IMAGE] * 3


def test_new_days_are_those_of_a_rebuild_and_take_the_table_as_it_is_then(tables: Shop) -> None:
    later = SHOWN.replace("17672616", str(1767261600 + DAY_S)[:-2]).splitlines()[1:]
    tables.build(MAPPING)
    tables.put("shown.csv", SHOWN + "\n".join(later) + "\n")
    tables.add(days="2026-01-02")
    added = all_bytes(tables.options.samples)
    build_samples(dataclasses.replace(tables.options, samples=str(tables.folder / "anew")), tables.client)
    assert added == all_bytes(tables.folder / "anew")
    tables.put("products.csv", PRODUCTS.replace("Acme", "Acme & Sons"))
    tables.add(days="2026-01-02")
    of_ann = [row["ad_maker"][0] for row in read(tables.options.samples) if row["user"] == key("ann")]
    assert of_ann == [key("Acme"), key("Acme & Sons")]


def test_rows_to_score_have_the_columns_of_the_tables(tables: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = tables.build(MAPPING)
    impressions = pa.table({"ts": [1767261600, 1767261604], "uid": ["ann", "bob"], "item": ["5", "7"]})
    behaviors = pa.table({"ts": [START_S], "uid": ["ann"], "item": [5]})
    capsys.readouterr()
    rows = with_behaviors(impressions, behaviors, tables.options.samples).to_pylist()
    assert capsys.readouterr().out == ""  # how its own copy of the rows is written is nobody's business
    ann = by_user(found)[key("ann")]
    for name in ("age", "city", "behavior_image", "behavior_maker"):
        assert rows[0][name] == ann[name]
    for name in ("ad_image", "ad_category", "ad_price", "ad_tags"):
        assert rows[0][name] == ann[name][:1]
    assert rows[1]["ad_image"] == [key("7.jpg")] and rows[1]["city"] == -1


@pytest.mark.parametrize(
    ("join", "message"),
    [
        ({"item": {"files": "nowhere", "column": "sku"}}, told(Problem.NO_MAPPED_FILES, log="join.item")),
        (
            {"item": {"files": "products.csv", "column": "code"}},
            missing(where="products.csv", value="code", setting="join.item.column", near="brand"),
        ),
        ({"item": {"files": "products.csv"}}, missing(where="products.csv", value="item", setting="join.item.column")),
        ({"shop": {"files": "products.csv"}}, "join.shop"),
        ({}, missing(value="photo", setting="impressions.columns.image", near="clicked, item, ts, uid")),
    ],
)
def test_mistakes_are_told(tables: Shop, join: Any, message: str) -> None:
    with pytest.raises(SampleOptionError, match=message):
        tables.build(MAPPING | {"join": join and MAPPING["join"] | join})
    shown = MAPPING["impressions"] | {"user": {"height": "dense"}}
    with pytest.raises(SampleOptionError, match=missing(value="height", setting="impressions.user.height")):
        tables.build(MAPPING | {"impressions": shown})
