"""A person's own tables, from a look at them to a trained model: inspect, mapping, samples, schema, check, train."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pyarrow import csv

from featurestore.format.datafile import FeatureRows
from featurestore.keys import NO_IMAGE, id_of_text, key_of_uri
from featurestore.spec import StoreInfo
from featurestore.storage.storage import Storage
from featurestore.store import FeatureStore
from jobs import build_samples
from pipeline.import_vectors import extractor_of
from pipeline.problems import Problem
from pipeline.samples import mapping
from tests.cli import invoke, said
from tests.pipeline.samples.rows import missing, quarantine, read, replaced
from tests.raised import told
from tests.trainer.whole_runs import trained_beside
from trainer.config import load_config
from trainer.samples.survey import IdDictionary
from trainer.schema import __main__ as schema_command
from trainer.schema.fields import load_schema

NUM_ITEMS = 12
MAPPING = {
    "impressions": {
        "files": "shows",
        "columns": {"timestamp": "shown_at", "user": "uid", "item": "ad_id", "image": "picture", "label": "clicked"},
        "user": {"age": "dense", "city": "id"},
        "ad": {"price": "dense", "maker": {"kind": "id", "column": "brand"}},
    },
    "behaviors": {
        "files": "visits.csv",
        "columns": {"timestamp": "ts", "user": "uid", "item": "sku", "image": "photo", "dwell_s": "seconds"},
    },
}
SHOWS = """shown_at,uid,ad_id,picture,clicked,age,city,price,brand
2026-01-01T10:00:00Z,ann,5,5.jpg,1,31.5,Rome,9.5,"Acme, Inc"
2026-01-01 10:00:05,ann,6,6.jpg,0,31.5,Rome,7,b
1767261610,7,5,5.jpg,true,40,,1,b
2026-01-02T12:00:00+01:00,bob,6,6.jpg,0,20,Bonn,2,b
"""
VISITS = """ts,uid,sku,photo,seconds
1767250000,ann,6,6.jpg,30
1767250001,ann,7,7.jpg,2
1767250002,7,5,5.jpg,40
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "logs/shows").mkdir(parents=True)
    (tmp_path / "logs/shows/a.csv").write_text(SHOWS)
    (tmp_path / "logs/visits.csv").write_text(VISITS)
    return tmp_path


@pytest.fixture
def job(connected, place):
    """Runs build_samples on the tests' cluster with a mapping."""

    def run(columns=MAPPING, *args, code=0):
        path = place / "mapping.yaml"
        path.write_text(columns if isinstance(columns, str) else yaml.safe_dump(columns))
        options = ["--logs", place / "logs", "--samples", place / "samples", "--mapping", path, "--test-days", 0, *args]
        return said(build_samples.app, *options, code=code)

    return run


def shows_as_arrow(place: Path) -> pa.Table:
    """The same shows, as Parquet may have them, in the place of the CSV file."""
    file = place / "logs/shows/a.csv"
    types = {"shown_at": pa.string(), "clicked": pa.string(), "ad_id": pa.int32(), "age": pa.float32()}
    shows = csv.read_csv(file, convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=True))
    file.unlink()
    shows = replaced(shows, "clicked", [[1, 0, 1, 0]])
    return replaced(shows, "shown_at", [[1767261600, 1767261605, 1767261610, 1767351600]])


def changed(**changes):
    made = json.loads(json.dumps(MAPPING))
    for path, value in changes.items():
        *tables, name = path.split("__")
        (made.setdefault(tables[0], {}) if tables else made)[name] = value
    return made


def unreadable(file, reason):
    """A regular expression of the sentence that a file is not CSV."""
    where, why = re.compile(f".*/{file}"), re.compile(reason)
    return told(Problem.UNREADABLE_AS, where=where, form="CSV", reason=why)


def inspect(*args, code=0):
    return invoke(schema_command.app, *args, code=code).output


def test_csv_tables_become_samples_and_parquet_tables_the_same(job, place):
    job()
    ann = key_of_uri("ann")
    found = {row["user"]: row for row in read(place / "samples")}
    assert set(found) == {ann, 7, key_of_uri("bob")}
    assert found[ann] == {
        "user": ann, "session": 0, "timestamp": 1767261600, "day": "2026-01-01", "age": 31.5,
        "city": key_of_uri("Rome"),
        "behavior_item": [6], "behavior_image": [key_of_uri("6.jpg")], "behavior_category": [0],
        "ad_item": [5, 6], "ad_image": [key_of_uri("5.jpg"), key_of_uri("6.jpg")], "ad_category": [0, 0],
        "ad_scene": [0, 0], "ad_price": [9.5, 7.0], "ad_maker": [key_of_uri("Acme, Inc"), key_of_uri("b")],
        "label": [1, 0],
    }  # fmt: skip
    assert found[7]["city"] == -1
    assert found[7]["label"] == [1]
    assert found[key_of_uri("bob")]["timestamp"] == 1767351600
    schema = load_schema(place / "samples/schema.yaml")
    assert {field.name: (field.side, field.kind) for field in schema.fields} == {
        "user": ("user", "id"), "age": ("user", "dense"), "city": ("user", "id"),
        "behavior_item": ("user", "multi_id"), "behavior_image": ("user", "content"), "ad_item": ("ad", "id"),
        "ad_image": ("ad", "content"), "ad_price": ("ad", "dense"), "ad_maker": ("ad", "id"),
    }  # fmt: skip
    fills = {field.name: field.fill for field in schema.fields if field.kind == "dense"}
    assert fills == {"age": "mean", "ad_price": "mean"}, "a request may lack the price of one candidate"
    expected = read(place / "samples")
    shows = replaced(shows_as_arrow(place), "picture", pa.array(["5.jpg", "6.jpg"] * 2).dictionary_encode())
    pq.write_table(replaced(shows, "clicked", [[True, False, True, False]]), place / "logs/shows/a.parquet")
    job()
    assert read(place / "samples") == expected


@pytest.mark.parametrize("table", ["csv", "parquet"])
def test_lists_in_a_log_become_fields_of_several_ids(job, place, table):
    tags = ["red|blue", "", " blue ||red", "green"]
    if table == "csv":
        lines = zip(SHOWS.splitlines(), ["tags", *tags], strict=True)
        (place / "logs/shows/a.csv").write_text("".join(f"{line},{each}\n" for line, each in lines))
        kind = {"kind": "multi_id", "split": "|"}
    else:
        lists = pa.array([["red", "blue"], None, ["blue", None, "", "red"], ["green"]])
        pq.write_table(shows_as_arrow(place).append_column("tags", lists), place / "logs/shows/a.parquet")
        kind = "multi_id"
    visits = VISITS.replace("seconds\n", "seconds,brand\n").replace(",30\n", ",30,b\n")
    (place / "logs/visits.csv").write_text(visits.replace(",2\n", ",2,\n").replace(",40\n", ",40,\n"))
    maker = {"maker": {"kind": "id", "column": "brand"}}
    job(changed(impressions__ad=maker | {"tags": kind}, behaviors__ad=maker))
    found = {row["user"]: row for row in read(place / "samples")}
    red, blue = key_of_uri("red"), key_of_uri("blue")
    assert found[key_of_uri("ann")]["ad_tags"] == [[red, blue], []] and found[7]["ad_tags"] == [[blue, red]]
    assert found[key_of_uri("ann")]["behavior_maker"] == [key_of_uri("b")]
    fields = {field.name: field for field in load_schema(place / "samples/schema.yaml").fields}
    assert (fields["ad_tags"].side, fields["ad_tags"].kind) == ("ad", "multi_id")


def test_a_log_of_impressions_alone_has_its_clicks_as_behaviours(job, place):
    (place / "logs/visits.csv").unlink()
    later = "1767351700,ann,6,6.jpg,0,31.5,Rome,7,b\n1767351800,7,6,6.jpg,0,40,,1,b\n"
    (place / "logs/shows/a.csv").write_text(SHOWS.replace("clicked", "gut") + later)
    suggested = yaml.safe_load(inspect("inspect", place / "logs", "--label", "gut"))
    assert suggested["behaviors"] == "clicks" and suggested["impressions"]["columns"]["label"] == "gut"
    suggested["impressions"]["columns"] |= {"timestamp": "shown_at", "item": "ad_id", "image": "picture"}
    text = job(suggested)
    assert "6 of 6 kept" in text
    found = {(row["user"], row["timestamp"]): row["behavior_item"] for row in read(place / "samples")}
    ann = key_of_uri("ann")
    assert found == {(ann, 1767261600): [], (7, 1767261610): [], (key_of_uri("bob"), 1767351600): [],
                     (ann, 1767351700): [5], (7, 1767351800): [5]}  # fmt: skip


def test_a_log_without_images_becomes_samples_and_settings_as_a_look_suggests(job, place):
    for path in (place / "logs/shows/a.csv", place / "logs/visits.csv"):
        path.write_text(path.read_text().replace("picture", "note").replace("photo", "note").replace(".jpg", " stars"))
    inspect("inspect", place / "logs", "--out", place / "suggested.yaml")
    suggested = yaml.safe_load((place / "suggested.yaml").read_text())
    assert [suggested[log]["columns"]["image"] for log in ("impressions", "behaviors")] == [None, None]
    text = (place / "suggested.yaml").read_text()
    assert text.count("# Pictures named by the item: join a table") == 1
    assert "# image: ad_id, and extract --images FILE.csv with id,uri" in text
    job(changed(**{f"{log}__columns": {**MAPPING[log]["columns"], "image": None} for log in MAPPING}))
    assert {key for row in read(place / "samples") for key in row["ad_image"] + row["behavior_image"]} == {NO_IMAGE}
    assert load_config(place / "samples/settings.yaml").model.images == "none"
    theirs = {log: MAPPING[log]["columns"] for log in MAPPING}
    named = {f"{log}__columns": columns | {"image": columns["item"]} for log, columns in theirs.items()}
    job(changed(**named))
    assert {key for row in read(place / "samples") for key in row["ad_image"]} == {key_of_uri("5"), key_of_uri("6")}
    pq.write_table(shows_as_arrow(place), place / "logs/shows/a.parquet")
    job(changed(**named))
    assert {key for row in read(place / "samples") for key in row["ad_image"]} == {5, 6}


@pytest.mark.parametrize("kind", [pa.null(), pa.float64(), pa.string()])
def test_a_column_of_images_without_values_is_no_image(job, place, kind):
    pq.write_table(replaced(shows_as_arrow(place), "picture", pa.nulls(4, kind)), place / "logs/shows/a.parquet")
    job()
    assert {key for row in read(place / "samples") for key in row["ad_image"]} == {NO_IMAGE}


def test_bad_rows_of_csv_are_kept_with_number_and_reason(job, place):
    bad = [
        ("soon,ann,5,5.jpg,1,1,Rome,1,b", "timestamp is not a time"),
        ("1767261610,ann,5,5.jpg", "4 values instead of 9"),
        ("1767261610,,5,5.jpg,1,1,Rome,1,b", "user is null"),
        ("1767261610,ann,5,5.jpg,maybe,1,Rome,1,b", "label is not a number"),
        ("1767261610,ann,5,5.jpg,2,1,Rome,1,b", "label is not 0 or 1"),
        ("1767261610,ann,5,5.jpg,1,old,Rome,1,b", "age is not a number"),
        ("1767261610,ann,5,5.jpg,1,1,Rome,1e99,b", "price is not finite in float32"),
        ("99999999999,ann,5,5.jpg,1,1,Rome,1,b", "timestamp is in the future"),
    ]
    (place / "logs/shows/a.csv").write_text(SHOWS + "".join(f"{line}\n" for line, _ in bad))
    text = job()
    assert "4 of 12 kept, 0 without an image; 0 duplicates, 8 quarantined (" in text
    assert "timestamp is not a time: 1, as 'soon'" in text
    assert quarantine(place) == [("shows/a.csv", number, reason) for number, (_, reason) in enumerate(bad, 4)]


def test_labels_may_be_yes_and_no_and_a_number_missing(job, place):
    words = SHOWS.replace("jpg,1", "jpg,yes").replace("jpg,true", "jpg,Yes").replace("jpg,0", "jpg,no")
    (place / "logs/shows/a.csv").write_text(words)
    assert "4 of 4 kept" in job()
    assert sorted(row["label"] for row in read(place / "samples")) == [[0], [1], [1, 0]]
    (place / "logs/shows/a.csv").write_text(SHOWS.replace("1,31.5", "1,").replace("Rome,7", "Rome,"))
    assert "4 of 4 kept, 0 without an image; 0 duplicates, 0 quarantined" in job()
    found = read(place / "samples")
    assert sum(math.isnan(row["age"]) for row in found) == 1
    assert sum(math.isnan(price) for row in found for price in row["ad_price"]) == 1
    text = inspect("check", place / "samples/schema.yaml", place / "samples", code=2)  # there are no days for testing
    assert "4 samples in 3 groups fit the schema" in text


def shows_of(lines: list[str]) -> str:
    return SHOWS.splitlines()[0] + "\n" + "".join(f"{line}\n" for line in lines)


def test_a_quote_that_is_not_closed_stops_the_job_with_its_line(job, place, caplog):
    lines = [f"{1767261610 + n},ann,5,5.jpg,1,1,Rome,1,b" for n in range(200)]
    lines[4] = lines[4].replace("Rome", '"Rome')
    (place / "logs/shows/a.csv").write_text(shows_of(lines))
    text = job(code=1)
    assert re.search(unreadable("shows/a.csv", "line 6: .* 100 lines"), text)
    assert not (place / "samples").exists()
    assert re.search(r"a\.csv: line 6: ", inspect("inspect", place / "logs", code=1))
    (place / "logs/shows/a.csv").unlink()
    (place / "logs/visits.csv").write_text(VISITS.replace(",", "\t"))
    mapping = changed(csv={"delimiter": "\t"})
    (place / "logs/shows/a.tsv").write_text(shows_of(lines[:20]).replace(",", "\t"))
    assert re.search(unreadable("shows/a.tsv", "line 6: "), job(mapping, code=1))
    assert not [record for record in caplog.records if "Compute Failed" in record.message], "a traceback on stderr"


def test_a_value_with_other_rows_in_it_is_quarantined(job, place):
    lines = [f"{1767261610 + n},ann,5,{n}.jpg,1,1,Rome,1,b" for n in range(10)]
    lines[3] = lines[3].replace("Rome", '"Rome')
    lines[6] = lines[6].replace("Rome", '"Rome')  # closes it: a row of nine values, two rows in one of them
    lines[8] = lines[8].replace("Rome", '"Rome\nin Italy"')
    (place / "logs/shows/a.csv").write_text(shows_of(lines))
    text = job()
    assert "6 of 7 kept" in text
    reason = "a quoted value has other rows in it; is a quote not closed?"
    assert quarantine(place) == [("shows/a.csv", 3, reason)]
    wanted = {key_of_uri(f"{n}.jpg") for n in (0, 1, 2, 7, 8, 9)}
    assert {image for row in read(place / "samples") for image in row["ad_image"]} == wanted


FOREIGN = """shown_at;uid;ad_id;picture;clicked;age;city;price;brand
05/02/2026 10:00;ann;5;5.jpg;1;31,5;Köln;1.009,5;b
05/02/2026 10:01;ann;6;é.jpg;0;31,5;Köln;7;b
25/02/2026 12:00;bob;7;;0;20,0;Bonn;2,25;b
"""


def test_another_countrys_csv_is_found_out_or_said(job, place):
    """Semicolons, Latin-1, decimal commas, days before months; and thousandths of seconds in the other table."""
    (place / "logs/shows/a.csv").write_bytes(FOREIGN.encode("latin-1"))
    visits = VISITS.replace("17672500", "17702000").replace(",ann", "000,ann").replace(",7,", "000,7,")
    (place / "logs/visits.csv").write_text(visits)
    text = job(code=1)
    said = "shows/a.csv: read as CSV with delimiter ;, encoding latin-1, decimal ,; csv and time_unit of a mapping"
    assert said in text
    assert "visits.csv: times such as 1770200000000 are in ms since 1970" in text
    reasons, forms = "timestamp is not a time: 3, as '05/02/2026 10:00'", '"%d/%m/%Y %H:%M" or "%m/%d/%Y %H:%M"'
    hint = Problem.TIME_FORM_NEEDED.of(forms)
    assert re.search(told(Problem.ALL_ROWS_BAD, where=place / "logs", count=3, reasons=reasons, hint=hint), text)
    for looked_at in ("logs/shows/a.csv", "logs"):
        found = yaml.safe_load(inspect("inspect", place / looked_at))
        assert found["time_format"] == "%d/%m/%Y %H:%M"
    assert found.keys() == {"time_format", "impressions", "behaviors"}, "the job finds the rest itself"
    text = job(changed(time_format="%d/%m/%Y %H:%M"))
    assert "3 of 3 kept, 1 without an image" in text
    ann, bob = read(place / "samples")
    assert (ann["timestamp"], ann["age"], ann["city"]) == (1770285600, 31.5, key_of_uri("Köln"))
    assert (ann["ad_image"], ann["ad_price"]) == ([key_of_uri("5.jpg"), key_of_uri("é.jpg")], [1009.5, 7.0])
    assert (bob["ad_image"], bob["ad_price"]) == ([NO_IMAGE], [2.25])
    assert ann["behavior_item"] == [6]  # its time is in the unit that was found
    named = pq.read_table(place / "samples/images.parquet").to_pylist()
    assert {row["uri"] for row in named} == {"5.jpg", "6.jpg", "7.jpg", "é.jpg"}
    assert all(row["key"] == key_of_uri(row["uri"]) for row in named)


def test_texts_of_ids_are_known_to_lookup_and_later_days_add_theirs(job, place):
    job()
    found = inspect("lookup", place / "samples", key_of_uri("ann"), "Rome", 7)
    assert found.splitlines() == [
        f"{key_of_uri('ann')}  ann", f"{key_of_uri('Rome')}  Rome", "7  not in it as a text",
    ]  # fmt: skip
    (place / "logs/shows/b.csv").write_text(SHOWS.splitlines()[0] + "\n2026-01-03,cleo,5,5.jpg,1,31.5,Rome,9.5,b\n")
    job(MAPPING, "--days", "2026-01-03")
    dictionary = IdDictionary.of_samples(Storage(place / "samples"))
    wanted = ["ann", "bob", "cleo", "Rome", "Bonn", "Acme, Inc", "b"]
    assert dictionary.texts(map(key_of_uri, wanted)) == {key_of_uri(text): text for text in wanted}
    assert dictionary.first(100)[1] == len(wanted)


def test_a_first_mapping_leaves_out_what_no_request_can_know(place):
    head, *lines = SHOWS.splitlines()
    more = [f"{line},{n},{40 * n},{n},{n}\n" for n, line in enumerate(lines)]
    (place / "logs/shows/a.csv").write_text("".join([f"{head},position,dwell_ms,slot,time_slot\n", *more]))
    said = inspect("inspect", place / "logs", "--out", place / "first.yaml")
    for name in ("position", "dwell_ms", "slot"):
        assert f"warning      left out: {name}, which no request can know before its ads are shown" in said
    found = yaml.safe_load((place / "first.yaml").read_text())["impressions"]
    assert "scene" not in found["columns"]
    assert {*found["user"], *found["ad"]} == {"age", "city", "price", "brand", "time_slot"}


@pytest.mark.parametrize("parts", [1, 2])
def test_two_texts_of_one_id_end_the_job(job, place, monkeypatch, parts):
    """In one file, or each in a file of its own."""
    monkeypatch.setattr(mapping, "id_of_text", lambda text: 3 if text in ("ann", "bob") else id_of_text(text))
    head, *lines = SHOWS.splitlines()
    for part in range(parts):
        (place / f"logs/shows/{part}.csv").write_text("\n".join([head, *lines[part::parts]]) + "\n")
    (place / "logs/shows/a.csv").unlink()
    (place / "logs/visits.csv").write_text(VISITS.replace("ann", "eva"))
    assert Problem.ID_OF_TWO_TEXTS.of(3, "ann", "bob") in job(code=1)


def test_a_folder_that_is_not_there_and_json_lines_are_told_and_how_to_convert_these(job, place):
    for folder in ("raw", "logs/json"):
        (place / folder).mkdir()
        (place / folder / "events.jsonl").write_text('{"ts": 0}\n')
    how = '{0}events.jsonl", lines=True).to_parquet("{0}events.jsonl.parquet")'
    hint = 'pandas.read_json("'
    said = inspect("inspect", place / "raw/events.jsonl", code=1)
    assert f"{hint}{how.format(f'{place}/raw/')}" in said
    assert f"{hint}{how.format('')}" in inspect("inspect", place / "raw", code=2)
    assert job(MAPPING, "--logs", place / "lgs", code=2).endswith("error: " + Problem.NO_FOLDER.of(f"{place}/lgs"))
    for files in ("json", "json/events.jsonl"):
        found = job(changed(behaviors__files=files), code=2)
        assert re.search(told(Problem.NO_MAPPED_FILES, where=place / "logs" / files, log="behaviors"), found)
        assert hint in found


def test_text_of_another_encoding_is_told(job, place):
    (place / "logs/shows/a.csv").write_bytes(SHOWS.replace("Rome", "Köln").encode("utf-16"))
    assert re.search(unreadable("shows/a.csv", ".*UTF-16 or UTF-32, not in UTF-8"), job(code=1))
    assert re.search(r"a\.csv: .*UTF-16", inspect("inspect", place / "logs", code=1))
    many = [f"{1767261610 + n},ann,5,5.jpg,1,1,Rome,1,b" for n in range(40_000)]
    (place / "logs/shows/a.csv").write_bytes(shows_of([*many, many[0].replace("Rome", "Köln")]).encode("latin-1"))
    assert re.search(told(Problem.WRONG_ENCODING, where=place / "logs/shows/a.csv", value="utf-8"), job(code=1))
    assert re.search(unreadable("shows/a.csv", ".*nonsense"), job(changed(csv={"encoding": "nonsense"}), code=1))


def test_units_and_delimiters_are_those_of_the_mapping(job, place):
    """Also where a look would find seconds."""
    (place / "logs/shows/a.csv").write_text(SHOWS.replace(",", ";"))
    (place / "logs/visits.csv").write_text(VISITS.replace(",", ";"))
    job(changed(csv={"delimiter": ";"}, time_unit="ms"))
    assert {row["timestamp"] for row in read(place / "samples")} == {1767261600, 1767261, 1767351600}


USUAL, NOWHERE = re.compile("timestamp, user.*"), re.compile(".*/nowhere")
UNKNOWN_USR = told(Problem.UNKNOWN_COLUMN, where="impressions", value="usr", known=USUAL)
UIDS, BRAD = MAPPING["impressions"]["columns"] | {"user": "uids"}, {"maker": {"kind": "id", "column": "brad"}}


@pytest.mark.parametrize(
    ("mapping", "problem"),
    [
        ("- a", "it should be a valid dictionary"),
        ("impressions: [", told(Problem.UNREADABLE_AS, form="YAML")),
        (changed(impressions__columns={"usr": "uid"}), UNKNOWN_USR),
        (changed(impressions__user={"item": "id"}), told(Problem.TAKEN_NAME, value="item")),
        (changed(impressions__user={"price": "id"}), told(Problem.NAME_OF_BOTH, value="price")),
        (changed(impressions__user={"age": "number"}), "age.kind='number': it should be 'id', 'multi_id' or 'dense'"),
        (changed(csv={"password": "none of yours"}), "csv.password: it is not permitted"),
        (changed(behaviors__user={"age": "dense"}), told(Problem.USER_OF_BEHAVIORS)),
        (changed(behaviors__ad={"tags": "multi_id"}), told(Problem.LIST_OF_BEHAVIORS, where="tags")),
        (changed(behaviors__ad={"age": "dense"}), told(Problem.TAKEN_NAME, value="age")),
        (changed(impressions__ad={"brand": {"kind": "id", "split": "|"}}), told(Problem.SPLIT_OF_NO_LIST, value="id")),
        *(
            (changed(csv={"delimiter": sign}), told(Problem.NOT_A_DELIMITER, value=sign))
            for sign in ("", ";;", '"', "§", "\0", "\n")
        ),
        (changed(behaviors__files="nowhere"), told(Problem.NO_MAPPED_FILES, where=NOWHERE, log="behaviors")),
        (
            changed(behaviors__columns={}),
            missing("visits.csv", "timestamp", "behaviors.columns.timestamp", "photo, sec"),
        ),
        (changed(impressions__columns=UIDS), missing("", "uids", "impressions.columns.user", r"\buid\b")),
        (changed(impressions__ad=BRAD), missing("", "brad", "impressions.ad.maker", r"\bbrand\b")),
    ],
)
def test_mistakes_in_a_mapping_are_told(job, place, mapping, problem):
    assert re.search(problem, job(mapping, code=2))
    assert not (place / "samples").exists()


def draw_tables(place: Path) -> None:
    """Logs whose columns have names of their own, and a store with all images."""
    random = np.random.default_rng(0)
    count, day_s = 300, 86_400
    user, item = random.integers(0, 20, count), random.integers(0, NUM_ITEMS, count)
    shown = {
        "event_time": (1_767_225_600 + np.arange(count) * (3 * day_s // count)).tolist(),
        "member_id": [f"m{each}" for each in user], "adgroup_id": item, "img_url": [f"{each}.jpg" for each in item],
        "cate": item % 3, "pid": random.integers(0, 2, count), "clk": (random.random(count) < 0.4).astype(int),
        "age": user + 20.5, "city": [f"c{each % 4}" for each in user], "price": np.round(item * 1.5, 1),
    }  # fmt: skip
    done = {
        "time": (1_767_139_200 + np.arange(200) * 60).tolist(), "member_id": [f"m{each % 20}" for each in range(200)],
        "goods_id": np.arange(200) % NUM_ITEMS, "img_url": [f"{each % NUM_ITEMS}.jpg" for each in range(200)],
        "cate": np.arange(200) % NUM_ITEMS % 3, "dwell_seconds": random.uniform(6, 60, 200),
    }  # fmt: skip
    (place / "raw/shown").mkdir(parents=True)
    (place / "raw/done").mkdir()
    csv.write_csv(pa.table(shown), place / "raw/shown/a.csv")
    pq.write_table(pa.table(done), place / "raw/done/a.parquet")
    info = StoreInfo(num_shards=2, dim=8, dtype="float32", extractor=extractor_of("drawn"))
    uris = [f"{each}.jpg" for each in range(NUM_ITEMS)]
    features_ND = random.normal(size=(NUM_ITEMS, 8)).astype(np.float32)
    FeatureStore.create(place / "features", info).put(FeatureRows.of(uris, features_ND))


def test_from_raw_tables_to_a_trained_model(job, place):
    draw_tables(place)
    inspect("inspect", place / "raw", "--out", place / "first.yaml")
    text = (place / "first.yaml").read_text()
    assert yaml.safe_load(text) == {
        "impressions": {
            "files": "shown",
            "columns": {"timestamp": "event_time", "user": "member_id", "scene": "pid", "item": "adgroup_id",
                        "image": "img_url", "category": "cate", "label": "clk"},
            "user": {"age": "dense", "city": "id"},
            "ad": {"price": "dense"},
        },
        "behaviors": {
            "files": "done",
            "columns": {"timestamp": "time", "user": "member_id", "item": "goods_id", "image": "img_url",
                        "category": "cate", "dwell_s": "dwell_seconds"},
        },
    }  # fmt: skip
    assert "user: member_id  # string, 20 different, as 'm17'" in text
    job(text, "--logs", place / "raw", "--test-days", 1)
    assert "fit the schema" in inspect("check", place / "samples/schema.yaml", place / "samples")
    tables = trained_beside(place)["tables"].values()
    assert all(table["kind"] == "exact" and table["cold"] == table["evicted"] == 0 for table in tables)


def test_tables_have_rows_for_the_ids_of_all_samples(job, place, monkeypatch):
    """Also where the schema is suggested from a few of the sample groups."""
    monkeypatch.setattr("pipeline.samples.build.LOOKED_AT", 2)
    monkeypatch.setattr("trainer.schema.fields.SMALLEST_TABLE", 1)
    draw_tables(place)
    job(inspect("inspect", place / "raw"), "--logs", place / "raw")
    rows = {"user": 64, "city": 8, "item": 32, "category": 8, "scene": 4}
    tables = load_config(place / "samples/settings.yaml").model.tables
    defaults = load_config().model.tables
    assert {name: table.max_rows for name, table in tables.items() if table != defaults.get(name)} == rows
