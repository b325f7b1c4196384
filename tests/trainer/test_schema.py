"""Schema files and their mistakes, what crossmedia schema suggests and finds, and its counts of values."""

import functools
import io
import re
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pyarrow import csv

from tests.cli import invoke
from tests.raised import raises, told
from tests.trainer.conftest import change_column, values_of
from trainer.errors import SchemaError
from trainer.problems import Problem
from trainer.schema.__main__ import app
from trainer.schema.fields import (
    DEFAULT_SCHEMA,
    IDS_LR_ALONE,
    DistinctCount,
    Schema,
    load_schema,
    schema_text,
    settings_text,
    table_rows,
)
from trainer.schema.suggest import match_columns

OWN = """
new_ad_field: ad
fields:
  - {name: user, side: user, kind: id}
  - {name: ad, side: ad, kind: id, column: ad_number}
  - {name: picture, side: ad, kind: content, store: covers}
"""
BACK = "store: covers}\n  - {name: back, side: ad, kind: content, store: covers, width: 4}"
TWO_WIDTHS = told(Problem.TWO_WIDTHS, where="picture", name="back", what="store covers", value=None, wanted=4)
IDS = "kinds id and multi_id"


def of_kinds(kinds: str, setting: str, value: str, kind: str, where: str = "price") -> str:
    """How it is told that a setting is for fields of these kinds."""
    return told(Problem.SETTING_OF_OTHER_KIND, where=where, setting=setting, value=value, kinds=kinds, kind=kind)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("side: user", "sied: user", r"fields\.0\.sied is unknown; did you mean fields\.0\.side\?"),
        ("kind: content", "kind: image", r"fields\.2\.kind='image'"),
        ("fields:", "field:", r"field is unknown; did you mean fields\?"),
        ("new_ad_field: ad", "new_ad_field: adx", told(Problem.WRONG_NEW_AD, value="adx", hint="did you mean ad?")),
        ("new_ad_field: ad", "new_ad_field: user", told(Problem.WRONG_NEW_AD, value="user")),
        ("column: ad_number", "buckets: 4", told(Problem.WRONG_NEW_AD, value="ad")),
        ("name: ad,", "name: user,", told(Problem.FIELD_TWICE, where="user")),
        ("store: covers", "table: covers", of_kinds(IDS, "table", "covers", "content", "picture")),
        ("store: covers}", BACK, TWO_WIDTHS),
        (OWN, "- a", "schema.yaml"),
        (OWN, "", "schema.yaml"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "schema.yaml"
    for missing, below in ((path, ""), (f"{tmp_path.name}.yaml", f" below {Path.cwd()}")):
        with raises(SchemaError, Problem.NO_FILE_OF_SETTINGS, where=f"data.schema_file={missing}", below=below):
            load_schema(missing)
    check_refused(path, OWN.replace(old, new), message)


def check_refused(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(SchemaError) as caught:
        load_schema(path)
    assert re.search(message, str(caught.value)) and str(path) in str(caught.value)


of_price = functools.partial(told, where="price")
ALSO_COLUMNS = {"other": "columns=['a', 'b']"}
ONE_OF_TWO = of_price(Problem.STATISTIC_WIDTH, setting="mean", width=2)
UNUSED_MEAN, UNUSED_STD = (of_price(Problem.UNUSED_STATISTIC, setting=name) for name in ("mean", "std"))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("kind: id, transform: log1p", of_kinds("kind dense", "transform", "log1p", "id")),
        ("kind: dense, transform: log", "transform='log': it should be 'standardize', 'log1p' or 'log_standardize'"),
        ("kind: dense, buckets: 4", of_kinds(IDS, "buckets", "4", "dense")),
        ("kind: id, buckets: 1", "buckets"),
        ("kind: id, buckets: log10", "buckets"),
        ("kind: id, boundaries: [1, 1]", told(Problem.NOT_ASCENDING)),
        ("kind: id, boundaries: [1, .nan]", told(Problem.NOT_ASCENDING)),
        ("kind: id, buckets: 4, weights: w", of_price(Problem.TWO_OF_A_FIELD, one="buckets", other="weights=w")),
        ("kind: dense, weights: w", of_kinds(IDS, "weights", "w", "dense")),
        ("kind: dense, width: 2, transform: standardize, mean: [1]", ONE_OF_TWO),
        ("kind: dense, transform: standardize, mean: [1], std: [0]", "std"),
        ("kind: dense, mean: [1], std: [2]", UNUSED_MEAN),
        ("kind: dense, transform: log1p, fill: mean, mean: [1], std: [2]", UNUSED_STD),
        ("kind: id, buckets: 4, fill: mean", of_price(Problem.FILL_OF_OTHER_KIND)),
        ("kind: dense, fill: bucket", of_price(Problem.FILL_OF_OTHER_KIND)),
        ("kind: id, fill: 0", of_price(Problem.FILL_WITHOUT_NUMBERS, value=0.0)),
        ("kind: content, context: true", of_price(Problem.CONTEXT_OF_NO_AD, its_kind="content", its_side="ad")),
        ("side: user, kind: id, context: true", of_price(Problem.CONTEXT_OF_NO_AD, its_kind="id", its_side="user")),
        ("side: user, kind: multi_id, beside: ad", of_price(Problem.WRONG_BESIDE, value="ad", known="items")),
        ("side: user, kind: multi_id, beside: gone", of_price(Problem.WRONG_BESIDE, value="gone", known="items")),
        ("side: user, kind: id, beside: items", of_price(Problem.WRONG_BESIDE, value="items")),
        ("kind: multi_id, beside: items", of_price(Problem.WRONG_BESIDE, value="items")),
        ("kind: dense, columns: [a, b]", of_kinds(IDS, "columns", "('a', 'b')", "dense")),
        ("kind: id, columns: [a]", of_price(Problem.TOO_FEW_COLUMNS, value=["a"])),
        ("kind: id, columns: [a, a]", of_price(Problem.TOO_FEW_COLUMNS, value=["a", "a"])),
        ("kind: id, columns: [a, b], buckets: 4", of_price(Problem.TWO_OF_A_FIELD, one="buckets", **ALSO_COLUMNS)),
        ("kind: id, columns: [a, b], column: c", of_price(Problem.TWO_OF_A_FIELD, one="column=c", **ALSO_COLUMNS)),
    ],
)
def test_mistakes_of_a_field_are_named(tmp_path: Path, field: str, message: str) -> None:
    side = "" if field.startswith("side:") else "side: ad, "
    others = "  - {name: ad, side: ad, kind: id}\n  - {name: items, side: user, kind: multi_id}\n"
    text = f"new_ad_field: ad\nfields:\n{others}  - {{name: price, {side}{field}}}\n"
    check_refused(tmp_path / "schema.yaml", text, message)


def called(*args, code=0):
    return invoke(app, *args, code=code).output


def by_name(schema: Schema):
    return {field.name: field.model_dump(exclude_defaults=True) for field in schema.fields}


def test_a_schema_of_samples_is_the_packaged_one_without_the_ids_of_images(places, tmp_path):
    """Each item has an image of its own."""
    called("inspect", places.folder / "samples", "--out", tmp_path / "schema.yaml")
    found, packaged = load_schema(tmp_path / "schema.yaml"), load_schema()
    mine, theirs = by_name(found), by_name(packaged)
    assert mine.pop("ad_serial")["kind"] == "id"  # the tests' own column
    assert mine == {name: theirs[name] for name in theirs if not name.endswith("image_id")}
    assert (found.label, found.group, found.new_ad_field) == ("label", "user", "ad_item")
    text = (tmp_path / "schema.yaml").read_text()
    assert "#   item: {kind: exact, max_rows: 4096}\n" in text
    assert "#   session: int64, kept for people" in text
    items = {*values_of(places.folder / "samples", "ad_item")}
    assert f"ad_item, side: ad, kind: id, table: item}}  # list<element: int64>, {len(items)} different" in text
    assert "fit the schema" in called("check", tmp_path / "schema.yaml", places.folder / "samples")
    samples = shutil.copytree(places.folder / "samples", tmp_path / "samples")
    pq.write_table(pa.table({"log": ["impressions"], "file": ["a"], "row": [1]}), samples / "quarantine.parquet")
    with_bad_rows = called("inspect", samples).replace(str(samples), str(places.folder / "samples"))
    assert with_bad_rows == called("inspect", places.folder / "samples"), "bad rows beside samples are no samples"


def test_sides_kinds_and_widths_come_from_the_values(tmp_path):
    columns = {
        "user": [1, 2], "age": [1.5, 2.5], "vector": [[1.0, 2.0], [3.0, 4.0]], "tags": [[1], [2, 3]],
        "brand": [[7, 8], [9]], "words": [[[1], [2, 3]], [[]]], "price": [[0.5, 1.5], [2.5]],
        "place": [[[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0]]], "ragged": [[1.0], [1.0, 2.0]], "name": ["a", "b"],
        "gone": [None, 1], "same": [4, 4], "clicked": [[1, 0], [0]], "made": [b"a", b"b"],
    }  # fmt: skip
    (tmp_path / "train").mkdir()
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    pq.write_table(table, tmp_path / "train/a.parquet")
    text = called("inspect", tmp_path, "--label", "clicked")
    (tmp_path / "schema.yaml").write_text(text)
    fields = load_schema(tmp_path / "schema.yaml").fields
    assert {field.name: (field.side, field.kind, field.width) for field in fields} == {
        "user": ("user", "id", None), "age": ("user", "dense", None), "vector": ("user", "dense", 2),
        "tags": ("user", "multi_id", None), "brand": ("ad", "id", None), "words": ("ad", "multi_id", None),
        "price": ("ad", "dense", None), "place": ("ad", "dense", 2), "name": ("user", "id", None),
    }  # fmt: skip
    for line in ("ragged: list<element: double> of 1 to 2 numbers", "made: binary; a field reads numbers and texts",
                 "gone: 1 of 2 rows are null", "same: one value in all rows"):  # fmt: skip
        assert f"#   {line}" in text


def test_check_says_what_does_not_fit(places, tmp_path):
    samples, wrong = shutil.copytree(places.folder / "samples", tmp_path / "samples"), tmp_path / "wrong.yaml"
    wrong.write_text(DEFAULT_SCHEMA.read_text().replace("ad_scene, side: ad", "ad_scen, side: ad"))
    missing = told(Problem.COLUMN_MISSING, column="ad_scen", wanted="list<integer> (or list<string>)")
    assert re.search(missing, called("check", wrong, samples, code=2))
    file = "test/day=2026-01-01.parquet"
    change_column(samples / file, "label", lambda rows: [[2] * len(row) for row in rows])
    output = called("check", DEFAULT_SCHEMA, samples, code=1)
    assert "train  " in output
    where = samples / f"{file}, row 0"
    assert re.search(told(Problem.NOT_A_LABEL, where=where, column="label", value=2), output)


def test_mistakes_are_one_message(places, tmp_path):
    samples = places.folder / "samples"
    unfit = told(Problem.UNFIT_COLUMN, where=samples, column="click", value=re.compile("not among user, session.*"))
    assert re.search(unfit, called("inspect", samples, "--label", "click", code=2))
    mine, log, hint = tmp_path / "mine.yaml", tmp_path / "logs/a.csv", ", or add the line of names"
    mine.touch()
    assert re.search(told(Problem.OUT_EXISTS, where=mine), called("inspect", samples, "--out", mine, code=2))
    log.parent.mkdir()
    for text, message in (
        ("user,label\n", told(Problem.TABLE_WITHOUT_ROWS, where=log, files="1 file")),
        ("user,label,user\n1,0,1\n", told(Problem.COLUMN_TWICE, where=log, value="user", hint=hint)),
    ):
        log.write_text(text)
        assert re.search(message, called("inspect", log.parent, code=1))
    log.write_text("user,label\n1,0\n")
    (tmp_path / "logs/b.csv").write_text("user,label,more\n1,0,more\n")
    two = told(Problem.TWO_TABLES_OF_A_KIND, where=log.parent, tables="a.csv (impressions), b.csv (impressions)")
    assert re.search(two, called("inspect", log.parent, code=1))
    log.with_suffix(".parquet").write_bytes(b"no parquet")
    unreadable = told(Problem.REFUSED, action="read", where=log.with_suffix(".parquet"))
    assert re.search(unreadable, called("inspect", log.parent, code=1))


def test_columns_are_known_by_their_usual_names():
    names = ["clk", "time_stamp", "user", "adgroup_id", "pid", "nonclk", "cate_id", "img_url"]
    assert match_columns(names, "impressions") == {
        "label": "clk", "timestamp": "time_stamp", "user": "user", "item": "adgroup_id", "scene": "pid",
        "category": "cate_id", "image": "img_url",
    }  # fmt: skip
    assert match_columns(["item", "item_id"], "impressions") == {"item": "item"}


def test_times_images_labels_and_lists_are_known_by_their_values(tmp_path):
    start_ms, count = 1_760_000_000_000, 40
    shown = {
        "when": [start_ms + 1000 * at for at in range(count)], "uid": [at % 4 for at in range(count)],
        "movieId": [at % 7 for at in range(count)], "motiv": [f"m/{at % 7}.jpg" for at in range(count)],
        "gut": [at % 3 == 0 for at in range(count)], "bis": [datetime(2026, 3, 1 + at % 9) for at in range(count)],
        "genres": ["Action|Comedy", "Drama", "Comedy|Drama", "Action|Drama|Kids", "Kids|Drama"] * (count // 5),
    }  # fmt: skip
    (tmp_path / "logs/shown").mkdir(parents=True)
    for name in "ab":
        pq.write_table(pa.table(shown), tmp_path / f"logs/shown/{name}.parquet")
    pq.write_table(pa.table({"sku": [1], "title": ["x"]}), tmp_path / "logs/products.parquet")
    columns = {"timestamp": "when", "user": "uid", "item": "movieId", "image": "motiv", "label": "gut"}
    for place in (tmp_path / "logs", tmp_path / "logs/shown"):
        text = called("inspect", place)
        found = yaml.safe_load(text)
        assert found["impressions"]["columns"] == columns and found["impressions"]["files"] == "shown"
        assert found["impressions"]["ad"] == {"genres": {"kind": "multi_id", "split": "|"}}
        assert "gut is the only column of 0 and 1 in shown, so it is taken for the label" in text
        assert f"crossmedia samples --logs {tmp_path / 'logs'} --mapping mapping.yaml" in text
    assert "# not used: products.parquet, which has no times or no users" in called("inspect", tmp_path / "logs")
    said = called("inspect", tmp_path / "logs", "--label", "no", code=1)
    assert re.search(told(Problem.NO_SUCH_LABEL, value="no", labels="0 and 1, or yes and no"), said)


@pytest.mark.parametrize("ending", ["parquet", "csv", "one csv"])
@pytest.mark.parametrize(
    ("early", "late", "kind", "noted"),
    [
        ([1, 2], ["u300", "7"], "id", "string, 4 different, as '1'"),
        (["u300", "7"], [7, 8], "id", "string, 3 different, as 'u300'"),
        ([1, 2], [1.5, 2.0], "dense", "double, 3 different, 1 to 2"),
        ([1.5, 2.0], [1, 2], "dense", "double, 3 different, 1 to 2"),
        ([None, None], [3, 4], "id", "int64, 2 different, 2,000 of 4,000 null"),
        ([3, 4], [None, None], "id", "int64, 2 different, 2,000 of 4,000 null"),
        ([True, False], [datetime(2026, 3, 1)] * 2, None, "not used: more (bool and timestamp["),
    ],
)
def test_a_column_has_the_type_that_all_parts_have_in_common(tmp_path, monkeypatch, ending, early, late, kind, noted):
    """Of days, and of the blocks of one file."""
    parts, count = [], 1000
    for more in (early, late):
        shown = {"user": ["a", "b"], "item": [3, 4], "image": ["a.jpg"] * 2, "click": [0, 1], "more": more}
        parts.append(pa.table({"ts": range(2 * count)} | {name: values * count for name, values in shown.items()}))
    (tmp_path / "shown").mkdir()
    if ending == "one csv":
        file, before = tmp_path / "shown/a.csv", io.BytesIO()
        csv.write_csv(parts[0], file)
        csv.write_csv(parts[1], before, csv.WriteOptions(include_header=False))
        block = file.stat().st_size
        file.write_bytes(file.read_bytes() + before.getvalue())
        options = functools.partial(csv.ReadOptions, block_size=block)
        monkeypatch.setattr("trainer.schema.profile.csv.ReadOptions", options)
    for name, part in zip("ab", parts, strict=True) if ending != "one csv" else ():
        (csv.write_csv if ending == "csv" else pq.write_table)(part, tmp_path / f"shown/{name}.{ending}")
    text = called("inspect", tmp_path)
    shown = yaml.safe_load(text)["impressions"]
    assert (shown.get("user", {}) | shown.get("ad", {})).get("more") == kind
    assert noted in text
    if ending == "parquet":
        pq.write_table(parts[0].append_column("tags", pa.array([[1]] * 2 * count)), tmp_path / "shown/a.parquet")
        pq.write_table(parts[1].append_column("tags", pa.array([1] * 2 * count)), tmp_path / "shown/b.parquet")
        said = called("inspect", tmp_path, code=1)
        assert re.search(told(Problem.DIFFERENT_TYPES, where="tags", value="list<element: int64>", other="int64"), said)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize("those", [(1, 2), (0,)])
def test_columns_that_some_days_lack_are_left_out_and_named(tmp_path, ending, those):
    """Those that came later, and those that went."""
    (tmp_path / "logs/shown").mkdir(parents=True)
    for day in range(3):
        shown = {"ts": [0, 60], "user": [1, 1], "item": [3, 4], "image": ["a.jpg"] * 2, "click": [0, 1], "age": [1, 2]}
        shown |= {"device": [1, 2], "member_nr": [1, 2]} if day in those else {}
        write = csv.write_csv if ending == "csv" else pq.write_table
        write(pa.table(shown), tmp_path / f"logs/shown/{day}.{ending}")
    assert "left out: device" in called("inspect", tmp_path / "logs/shown")
    said = called("inspect", tmp_path / "logs", "--out", tmp_path / "first.yaml")
    lack = "1 file: shown/0" if 1 in those else f"2 files: shown/1.{ending}, shown/2"
    for name in ("device", "member_nr"):
        assert f"warning      left out: {name}, missing in {lack}.{ending}" in said
    shown = yaml.safe_load((tmp_path / "first.yaml").read_text())["impressions"]
    assert shown["columns"]["user"] == "user" and {*shown.get("user", {}), *shown.get("ad", {})} == {"age"}
    if ending == "csv":
        (tmp_path / "logs/shown/1.csv").write_text("7,2,3,b.jpg,0,4\n8,2,4,b.jpg,1,5\n")
        said = called("inspect", tmp_path / "logs", code=1)
        both = re.compile(r".*shown/1\.csv \(7, 2, 3, b\.jpg, 0, 4\) and .*")
        assert re.search(told(Problem.NO_COMMON_COLUMN, where=both), said)


def test_ids_that_are_real_numbers_are_a_warning_with_the_way_out(tmp_path):
    """As pandas has them after a join."""
    shown = {"ts": [0, 60], "visitor": [1.0, 2.0], "item": [3, 4], "image": ["a.jpg"] * 2, "click": [0, 1]}
    pq.write_table(pa.table(shown), tmp_path / "shown.parquet")
    said = called("inspect", tmp_path, "--out", tmp_path / "first.yaml")
    assert said.count("warning") == 1 and "warning      to do: user: visitor is double, which no id is; write" in said
    assert yaml.safe_load((tmp_path / "first.yaml").read_text())["impressions"]["columns"]["user"] == "visitor"


@pytest.mark.parametrize(
    ("texts", "kind", "told"),
    [
        (["['sale', 'classic']", "['sale', 'new']", "[]"], None, "texts such as \"['sale', 'classic']\" are lists: "),
        (["(1, 2)", "(2, 3)", "(1, 3)"], None, "write the table as Parquet, or join the values by one separator"),
        (["{'a': 1, 'b': 2}", "{'a': 2}", "{'b': 2}"], None, "warning      left out: more, texts such as"),
        (["{1F2A-77}", "{2F2A-77}", "{1F2A-78}"], "id", None),
        (["a,b", "b,c", "a,c,b", "c"], {"kind": "multi_id", "split": ","}, None),
        (["3,17", "3,5", "17", "5,17"], {"kind": "multi_id", "split": ","}, None),
        (["666,00", "7.016,40", "666,40", "on demand"], None, "texts such as '666,00' are numbers: write them as"),
        (["666,00", "7.016,40", "666,40", "12"], "dense", None),
    ],
)
def test_lists_and_prices_that_are_texts_are_no_ids(tmp_path, texts, kind, told):
    """Numbers with a comma are numbers where semicolons are between the columns."""
    rows = [f"{at}|{at % 5}|{at % 7}|a.jpg|{at % 2}|" + f'"{text}"' for at, text in enumerate(texts * 10)]
    file, mark = tmp_path / "a.csv", ";" if kind == "dense" else ","
    file.write_text("\n".join(["ts|user|item|image|click|more", *rows, ""]).replace("|", mark))
    said = called("inspect", tmp_path, "--out", tmp_path / "first.yaml")
    assert yaml.safe_load((tmp_path / "first.yaml").read_text())["impressions"].get("ad", {}).get("more") == kind
    assert (told in said) if told else "warning" not in said
    if kind == "dense":
        file.write_text(file.read_text().replace("a.jpg", "5.5"))
        assert "image: image  # string, 1 different" in called("inspect", tmp_path), "samples read no number there"


def test_a_label_of_yes_and_no_is_known_by_its_name_alone_and_a_click_before_it(tmp_path):
    shown = {"ts": [0, 60, 120], "user": [1, 1, 2], "item": [3, 4, 3], "image": ["a.jpg"] * 3}
    said = ["yes", "no", "No"]
    for more, label, options in (
        ({"liked": said}, "liked", ()),
        ({"liked": [0, 1, 1], "clicked": said}, "clicked", ()),
        ({"member": said, "gut": [0, 1, 1]}, "gut", ()),
        ({"member": said}, "member", ("--label", "member")),
    ):
        pq.write_table(pa.table(shown | more), tmp_path / "shown.parquet")
        assert yaml.safe_load(called("inspect", tmp_path, *options))["impressions"]["columns"]["label"] == label
    assert "There is no table of impressions here" in called("inspect", tmp_path)
    pq.write_table(pa.table(shown), tmp_path / "more.parquet")
    names = "label, click, clicked, clk, is_click, liked, target or y"
    assert re.search(told(Problem.TWO_TABLES_OF_A_KIND, called=names), called("inspect", tmp_path, code=1))


def shop_of(folder, **columns):
    """A log of ids and a table of products, and one of users."""
    count = 40
    shown = {"ts": [1_760_000_000 + at for at in range(count)], "user_id": [at % 8 for at in range(count)],
             "item": [str(at % 7) for at in range(count)]}  # fmt: skip
    shown |= {name: values * (count // 4) for name, values in columns.items()}
    users = {"id": range(8), "created_at": [1_700_000_000] * 8, "age": [1.5] * 8}
    products = "".join(f"{n},thing {n},{n}.jpg,c,{n}.5,b{n % 2}\n" for n in range(9))
    folder.mkdir()
    pq.write_table(pa.table(shown), folder / "log.parquet")
    (folder / "products.csv").write_text("code,title,photo,cat,price,brand\n" + products)
    pq.write_table(pa.table(users), folder / "users.parquet")
    return folder


def test_tables_of_products_and_users_are_joined_by_the_ids_of_the_log(tmp_path):
    text = called("inspect", shop_of(tmp_path / "logs", clicked=[0, 0, 1, 0]))
    found = yaml.safe_load(text)
    assert found["join"] == {
        "item": {"files": "products.csv", "column": "code"}, "user": {"files": "users.parquet", "column": "id"},
    }  # fmt: skip
    shown = found["impressions"]
    assert shown["columns"] == {
        "timestamp": "ts", "user": "user_id", "item": "item", "image": "photo", "category": "cat", "label": "clicked",
    }  # fmt: skip
    assert shown["ad"] == {"price": "dense", "brand": "id"} and shown["user"]["age"] == "dense"
    assert "not used: title, with another value in each row" in text and found["behaviors"] == "clicks"


def test_a_table_of_events_is_known_by_the_words_of_a_column(tmp_path):
    events = ["view", "view", "click", "purchase"]
    folder = shop_of(tmp_path / "logs", event_type=events, gift=[0, 1, 0, 1])
    text = called("inspect", folder)
    assert "# not used: purchase; they are clicks too if clicked lists them" in text
    found = yaml.safe_load(text)
    assert found["impressions"]["where"] == {"column": "event_type", "value": "view", "clicked": "click"}
    assert "label" not in found["impressions"]["columns"] and found["behaviors"] == "clicks"
    shown = found["impressions"]
    assert shown["ad"].keys() == {"price", "brand"} and shown["user"].keys() == {"gift", "age", "created_at"}
    folder = shop_of(tmp_path / "bought", event=["Product View", "add_to_cart", "transaction", "pause"])
    where = yaml.safe_load(called("inspect", folder))["impressions"]["where"]
    assert where == {"column": "event", "value": "Product View", "clicked": ["add_to_cart", "transaction"]}
    assert "# not used: pause;" in called("inspect", folder)
    folder = shop_of(tmp_path / "labelled", event=events, clicked=[0, 1, 0, 1])
    assert "where" not in yaml.safe_load(called("inspect", folder))["impressions"]


@pytest.mark.parametrize("num_distinct", [0, 1, 4_095, 4_096, 100_000])
def test_different_ids_are_counted_exactly_up_to_4095_and_nearly_beyond_whatever_the_order(num_distinct):
    ids_N = np.random.default_rng(0).permutation(np.tile(np.arange(num_distinct) * 7 - 1_000, 3))
    one, other = (
        functools.reduce(DistinctCount.with_values, np.array_split(half_N, 5), DistinctCount())
        for half_N in np.array_split(ids_N, 2)
    )
    whole = DistinctCount().with_values(ids_N)
    assert one.merged(other).estimate == other.merged(one).estimate == whole.estimate
    error = 0 if num_distinct < 4_096 else 5 * 0.016
    assert whole.estimate == pytest.approx(num_distinct, rel=error)


def test_a_table_has_room_for_twice_the_ids_of_all_its_fields_up_to_a_bound(tmp_path, monkeypatch):
    for num_distinct, rows in ((0, 4_096), (2_048, 4_096), (2_049, 8_192), (10**6, 1 << 21), (10**9, 1 << 24)):
        assert table_rows(num_distinct) == rows
    monkeypatch.setattr("trainer.schema.fields.SMALLEST_TABLE", 1)
    columns = {"user": [1, 2], "behavior_item": [[3], [4, 5]], "ad_item": [[1], [2]], "label": [[1], [0]]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert "#   item: {kind: exact, max_rows: 16}\n" in called("inspect", tmp_path)


@pytest.mark.parametrize(
    ("num_images", "fields"),
    [(100, []), (97, []), (90, ["behavior_image_id", "ad_image_id"]), (200, ["behavior_image_id", "ad_image_id"])],
)
def test_ids_of_images_are_fields_unless_they_repeat_those_of_the_ads(tmp_path, num_images, fields):
    items = [[each % 100, each // 2] for each in range(200)]
    images = [[each % num_images] * 2 for each in range(200)]
    both = {"item": items, "image": images}
    sides = {f"{side}_{name}": rows for side in ("behavior", "ad") for name, rows in both.items()}
    pq.write_table(pa.table({"user": range(200), **sides, "label": [[1, 0]] * 200}), tmp_path / "a.parquet")
    (tmp_path / "schema.yaml").write_text(text := called("inspect", tmp_path))
    names = by_name(load_schema(tmp_path / "schema.yaml")).keys()
    assert {"ad_image", "behavior_image", "ad_item", "behavior_item"} < names
    assert [name for name in ("behavior_image_id", "ad_image_id") if name in names] == fields
    assert ("#   ad_image_id: about as many images as of ad_item, which says the same\n" in text) == (not fields)
    assert ("#   image: {kind: exact" in text) == bool(fields)


def test_a_written_schema_reads_as_it_was(tmp_path):
    schema = load_schema()
    (tmp_path / "a.yaml").write_text(schema_text(schema, ["a: #b"], {"ad_item": "c: d"}))
    assert load_schema(tmp_path / "a.yaml") == schema
    assert settings_text("s", "s/schema.yaml", schema, {"a": 1}) == (
        "# Over the defaults: crossmedia train --config s/settings.yaml\n\ndata:\n"
        "  samples: ./  # the folder of this file\n  schema_file: ./schema.yaml\n\n"
        "model:\n  tables:  # a row for each id, as it comes; "
        "max_rows: twice the ids of these samples or more\n    a: {kind: exact, max_rows: 1}\n"
    )


@pytest.mark.parametrize("images", ["none", "ad", "behavior", "both"])
def test_settings_take_the_images_that_the_schema_has(images):
    kept = {"none": (), "both": ("ad", "user"), "behavior": ("user",)}.get(images, ("ad",))
    fields = [field for field in load_schema().fields if field.kind != "content" or field.side in kept]
    text = settings_text("s", "f", Schema(fields=tuple(fields)), {})
    read = yaml.safe_load(text)
    assert read["model"].get("images", "both") == images
    assert read.get("optim") == ({"ids_lr": IDS_LR_ALONE} if images == "none" else None)
