"""XDL's formats through the job: lines come in as they are, bad ones are reported, random data trains."""

import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from featurestore.keys import key_of_uri
from jobs import import_features, import_xdl
from pipeline.problems import Problem
from pipeline.xdl import split_of
from tests.cli import said
from tests.pipeline.samples.rows import all_bytes, read
from tests.pipeline.test_import_vectors import write_xdl
from tests.raised import told
from tests.trainer.whole_runs import trained_beside
from trainer.schema.fields import load_schema

LINES = [
    "s0|g0|age@3;item@5:1,6:2.5;user_img@7:1,8:1|price@0.5,2;brand@9:1;ad_img@1:1|1|100",
    "s1|g0|age@3;item@5:1,6:2.5;user_img@7:1,8:1|price@0.25,2;brand@9:1,10:1;ad_img@2:1|0|101",
    "s2|g1|age@4;item@;user_img@|price@1,2;brand@9:1;ad_img@3:1|0|102",
    "s3|g0|age@3;item@5:1,6:2.5;user_img@7:1,8:1|price@0.1,2;brand@9:1;ad_img@1:1|1|103",
    "s4|g0|age@3;item@5:1;user_img@7:1,8:1|price@1e-3,2;brand@9:1;ad_img@4:1|1|104",
]


@pytest.fixture
def job(connected):
    """Runs a command of the job on the tests' cluster; its output in one line."""
    return lambda *args, code=0, app=import_xdl.app: said(app, *args, code=code)


@pytest.fixture
def lines(tmp_path):
    """Writes lines to a file."""

    def write(content, name="data.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in content))
        return path

    return write


def draw(count, num_images):
    """Draw lines as XDL's example does: weighted ids of the user, numbers of the ad, images of both, a label."""
    random = np.random.default_rng(0)

    def sparse(most):
        ids = random.integers(1, num_images + 1, random.integers(1, most + 1))
        return ",".join(f"{number}:{random.random():f}" for number in ids)

    for number in range(count):
        user = [f"user{field}@{sparse(4)}" for field in range(4)] + [f"user_img@{sparse(31)}"]
        ad = [f"ad{field}@{random.random():f}" for field in range(4)] + [f"ad_img@{sparse(1)}"]
        yield f"skey{number}|gkey{number}|{';'.join(user)}|{';'.join(ad)}|{random.random():f}|1543622400"


def test_neighbouring_lines_of_a_group_become_one_row_with_columns_of_each_part(job, lines, tmp_path):
    text = job("--from", lines(LINES), "--samples", tmp_path / "s", "--test-share", 0)
    assert "lines 5 quarantined 0 train 5 samples in 4 groups, 3 clicks" in text
    found = read(tmp_path / "s", "train")
    assert not list((tmp_path / "s/test").iterdir()), "no file without a group"
    assert [row["gkey"] for row in found] == ["g0", "g1", "g0", "g0"]  # the last has another user part
    assert found[0] == {
        "user": key_of_uri("g0"), "gkey": "g0", "timestamp": 100, "age": 3, "item": [5, 6], "item_weight": [1, 2.5],
        "user_img": [7, 8], "price": [[0.5, 2], [0.25, 2]], "brand": [[9], [9, 10]], "ad_img": [1, 2],
        "label": [1, 0],
    }  # fmt: skip
    fields = {field.name: field for field in load_schema(tmp_path / "s/schema.yaml").fields}
    assert {name: (field.side, field.kind) for name, field in fields.items()} == {
        "user": ("user", "id"), "age": ("user", "id"), "item": ("user", "multi_id"), "user_img": ("user", "content"),
        "user_img_id": ("user", "multi_id"), "price": ("ad", "dense"), "brand": ("ad", "multi_id"),
        "ad_img": ("ad", "content"), "ad_img_id": ("ad", "id"),
    }  # fmt: skip
    assert fields["price"].width == 2
    path = lines(["s|g|x@1:1;label@2:1|x@3:1;ad_img@4:1|1|5"])
    job("--from", path, "--samples", tmp_path / "s", "--test-share", 0)
    (row,) = read(tmp_path / "s", "train")
    assert (row["user_x"], row["ad_x"], row["user_label"], row["label"]) == (1, [3], 2, [1])


def test_random_lines_are_imported_as_they_are(job, lines, tmp_path):
    """Ids, weights, numbers, labels and groups, from the text as it was drawn."""
    source, samples = lines(draw(40, 30)), tmp_path / "s"
    job("--from", source, "--samples", samples, "--label-threshold", 0.5, "--test-share", 0.3)
    found = {row["gkey"]: row for split in ("train", "test") for row in read(samples, split)}
    assert len(read(samples, "train")) > 5 and len(read(samples, "test")) > 5
    drawn = source.read_text().splitlines()
    assert len(found) == len(drawn) == 40
    for line in drawn:
        _, gkey, user, ad, label, ts = line.split("|")
        row = found[gkey]
        assert (row["user"], row["timestamp"]) == (key_of_uri(gkey), int(ts))
        assert row["label"] == [int(float(label) >= 0.5)]
        for text in user.split(";"):
            name, _, values = text.partition("@")
            pairs = [value.split(":") for value in values.split(",")]
            assert row[name] == [int(number) for number, _ in pairs]
            assert row[f"{name}_weight"] == [float(np.float32(weight)) for _, weight in pairs]
        for text in ad.split(";"):
            name, _, value = text.partition("@")
            number, _, weight = value.partition(":")
            expected = float(np.float32(number)) if not weight else int(number)
            assert row[name] == [expected]
            assert not weight or row[f"{name}_weight"] == [float(np.float32(weight))]
    weights = {field.name: field.weights for field in load_schema(samples / "schema.yaml").fields}
    assert (weights["user0"], weights["ad_img_id"], weights["ad0"]) == ("user0_weight", "ad_img_weight", None)
    shares = [sum(split_of(f"g{n}", share) == "test" for n in range(1000)) / 1000 for share in (0, 0.3, 1)]
    assert shares == [0, pytest.approx(0.3, abs=0.05), 1]


def test_bad_lines_are_kept_with_number_and_reason(job, lines, tmp_path):
    bad = {
        "": "empty line",
        "s|g|a@1:1|b@1|1": "5 segments instead of 6",
        "s||age@3|x|1|1": "no group key",
        LINES[0].replace("|1|100", "|2|100"): "label is not 0 or 1; --label-threshold makes it so",
        LINES[0].replace("|1|100", "|1,0|100"): "label is not a number",
        LINES[0].replace("|100", "|soon"): "ts is not a whole number",
        LINES[0].replace("age@3", "age@3;age@4"): "user part: age is there twice",
        LINES[0].replace("age@3", "age"): "user part: a field without a name",
        LINES[0].replace("7:1", "7:x"): "a weight of user_img is not a number",
        LINES[0].replace("7:1", f"{2**63}:1"): "user_img does not fit into 64 bits",
        LINES[0].replace("ad_img@1:1", "ad_img@1:1,2:1"): "ad_img has not one id",
        LINES[0].replace("price@0.5,2", "price@nan,2"): "price is not finite",
        LINES[0].replace("price@0.5,2", "price@0.5"): "price has not 2 numbers",
    }
    good = [*LINES, LINES[0].replace("price@0.5,2;", "")]
    path = lines([*good, *bad])
    path.write_bytes(path.read_bytes() + b"\xff|g\n")
    text = job("--from", path, "--samples", tmp_path / "s", "--test-share", 0)
    assert f"lines {len(good) + len(bad) + 1} quarantined {len(bad) + 1}" in text
    kept = pq.read_table(tmp_path / "s/quarantine.parquet").to_pylist()
    expected = [*bad.items(), (None, "no UTF-8")]
    found = [(row["file"], row["line"], row["reason"]) for row in kept]
    assert found == [("data.txt", number, reason) for number, (_, reason) in enumerate(expected, 1 + len(good))]
    assert [row["text"].decode() for row in kept[:-1]] == list(bad)
    assert len(read(tmp_path / "s", "train")) == 5
    assert read(tmp_path / "s", "train")[-1]["price"] == [[0.0, 0.0]]  # as in XDL


def test_mistakes_are_one_message(job, lines, tmp_path):
    bad = [line.replace("|1|", "|2|").replace("|0|", "|3|") for line in LINES[:2]]
    text = job("--from", lines(bad), "--samples", tmp_path / "s", code=1)
    reasons = "label is not 0 or 1; --label-threshold makes it so: 2"
    assert re.search(told(Problem.NO_GOOD_LINE, where=tmp_path / "data.txt", count=2, reasons=reasons), text)
    assert not (tmp_path / "s").exists()
    for content, problem in ((["x"], Problem.NO_XDL_LINE), ([], Problem.ONLY_EMPTY_FILES)):
        text = job("--from", lines(content), "--samples", tmp_path / "s", code=1)
        assert re.search(told(problem, where=tmp_path / "data.txt"), text)
    plain = [f"s|g{n}|tags@1,{n}|price@{n % 2};brand@{n}:1,3:1;NAME@{n}:1|{n}|{n}" for n in (0, 1)]
    args = ["--samples", tmp_path / "s", "--test-share", 0]
    some = [line.replace("NAME@1:1", "NAME@1:1,2:1") for line in plain]
    text = job("--from", lines([line.replace("NAME", "pair") for line in some]), *args, code=2)
    assert f"error: {tmp_path / 's'}: " in text
    text = job("--from", lines([line.replace("NAME", "ad_pic") for line in [*plain, *some]]), *args)
    assert "quarantined 1 (ad_pic has not one id: 1)" in text
    kinds = {field.name: field.kind for field in load_schema(tmp_path / "s/schema.yaml").fields}
    found = [kinds[name] for name in ("ad_pic", "ad_pic_id", "brand", "price")]
    assert found == ["content", "id", "multi_id", "dense"]


def test_samples_at_an_address_are_those_of_a_disk(job, lines, s3_url, tmp_path):
    lines(LINES[:2], "day/b.txt"), lines([*LINES[2:], "a line that is none"], "day/a.txt")
    for place in (tmp_path / "s", f"{s3_url}/samples"):
        job("--from", tmp_path / "day", "--samples", place, "--test-share", 0.3)
    here = all_bytes(tmp_path / "s")
    assert {"quarantine.parquet", "train/part-00001.parquet"} <= here.keys() and all_bytes(f"{s3_url}/samples") == here
    assert read(tmp_path / "s", "train")[-1]["gkey"] == "g0"  # files by name


def test_random_data_trains(job, lines, tmp_path):
    """The example from end to end, in a small size."""
    vectors_ND = np.random.default_rng(1).normal(size=(50, 16)).astype(np.float32)
    write_xdl(tmp_path / "imgs", range(1, 51), vectors_ND)
    job("--from", tmp_path / "imgs", "--store", tmp_path / "features", "--dim", 16, app=import_features.app)
    job("--from", lines(draw(120, 50)), "--samples", tmp_path / "samples", "--label-threshold", 0.5)
    report = trained_beside(tmp_path)
    assert report["metrics"]["impressions"] == sum(len(row["label"]) for row in read(tmp_path / "samples", "test"))
    assert {table["kind"] for table in report["tables"].values()} == {"exact"}
