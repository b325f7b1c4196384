"""Imports of XDL's text samples to which files are added: the bytes of an import of all files, or a clear refusal."""

import contextlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from featurestore.published import open_published
from featurestore.text import parse_json
from jobs import import_xdl

FIRST = [
    "s0|g0|age@3;item@5:1,6:2.5;user_img@7:1,8:1|price@0.5,2;brand@9:1;ad_img@1:1|1|100",
    "s1|g0|age@3;item@5:1,6:2.5;user_img@7:1,8:1|price@0.25,2;brand@9:1;ad_img@2:1|0|101",
    "s2|g1|age@4;item@;user_img@|price@1,2;brand@9:1;ad_img@3:1|0|102",
    "a line that is none",
]
SECOND = ["s3|g2|age@3;item@5:1;user_img@7:1|price@0.1,2;brand@11:1;ad_img@1:1|1|103"]
THIRD = [
    "s4|g3|age@5;item@5:1;user_img@8:1|price@3,2;brand@9:1;ad_img@4:1|1|104",
    "s5|g3|age@5;item@5:1;user_img@8:1|price@3,2;brand@9:1;ad_img@4:1|no|104",
]


@pytest.fixture
def job(client, monkeypatch):
    """Runs the command on the tests' cluster; its output in one line."""
    monkeypatch.setattr("pipeline.cluster.tasks.connect", lambda **kwargs: contextlib.nullcontext(client))

    def run(*args, code=0):
        result = CliRunner().invoke(import_xdl.app, ["samples", *map(str, args)])
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    return run


@pytest.fixture
def logs(tmp_path):
    """Two days of lines; the folder, and what writes another."""
    folder = tmp_path / "logs"
    folder.mkdir()

    def write(name, lines):
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
        return folder

    write("day1.txt", FIRST)
    write("day2.txt", SECOND)
    return folder, write


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path):
    return f"{request.getfixturevalue('s3_url')}/samples" if request.param == "s3" else str(tmp_path / "samples")


def content(place):
    """All files of samples but the summary, with the place's name taken out."""
    storage = open_published(place)
    names = [each.path for each in storage.entries() if not each.path.endswith(".json")]
    return {name: storage.read_bytes(name).replace(place.encode(), b"PLACE") for name in names}


def test_added_files_give_the_bytes_of_an_import_of_all(job, logs, place, tmp_path):
    folder, write = logs
    job("--from", folder, "--samples", place, "--test-share", 0.3)
    kept = [each for each in open_published(place).entries() if "part-" in each.path]
    write("day3.txt", THIRD)
    text = job("--from", folder, "--samples", place, "--add")
    assert "added 1 of 3 files lines 7 quarantined 2" in text
    found = content(place)
    job("--from", folder, "--samples", tmp_path / "anew", "--test-share", 0.3)
    expected = content(str(tmp_path / "anew"))
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    after = {each.path: each.mtime_s for each in open_published(place).entries()}
    assert kept and all(after[each.path] == each.mtime_s for each in kept)  # not written again


def test_a_day_alone_may_be_named(job, logs, tmp_path):
    """The others may be gone by then. Test samples have a source of their own, whose files move behind the new one."""
    folder, write = logs
    (tmp_path / "test.txt").write_text(f"{THIRD[0]}\n")
    test = "--test-from", tmp_path / "test.txt"
    job("--from", folder, *test, "--samples", tmp_path / "s")
    write("day3.txt", THIRD)
    job("--from", folder, *test, "--samples", tmp_path / "anew")
    (folder / "day1.txt").unlink()
    job("--from", folder / "day3.txt", *test, "--samples", tmp_path / "s", "--add")
    assert content(str(tmp_path / "s")) == content(str(tmp_path / "anew"))
    assert (tmp_path / "s" / "test" / "part-00003.parquet").is_file()


def test_nothing_is_new(job, logs, place):
    folder, _ = logs
    job("--from", folder, "--samples", place)
    before = open_published(place).entries()
    assert "added 0 of 2 files" in job("--from", folder, "--samples", place, "--add")
    assert open_published(place).entries() == before


def test_files_of_a_folder_that_was_moved_are_known(job, logs, tmp_path):
    folder, _ = logs
    job("--from", folder, "--samples", tmp_path / "s")
    folder.rename(tmp_path / "moved")
    assert "added 0 of 2 files" in job("--from", tmp_path / "moved", "--samples", tmp_path / "s", "--add")


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("s|g|age@3:1,4:1;item@5:1;user_img@7:1|price@1,2;brand@9:1;ad_img@1:1|1|1", "user age (multi_id)"),
        ("s|g|age@3;item@5:1;user_img@7:1|price@1,2;brand@9:3;ad_img@1:1|1|1", "ad brand (id, weighted)"),
        ("s|g|age@3;item@5:1;user_img@7:1;more@1:1|price@1,2;brand@9:1;ad_img@1:1|1|1", "user more (multi_id)"),
        ("s|g|item@5:1;user_img@7:1|price@1,2;brand@9:1;ad_img@1:1|1|1", "user age (multi_id)"),
    ],
)
def test_fields_that_would_be_others_are_refused(job, logs, tmp_path, line, field):
    folder, write = logs
    job("--from", folder, "--samples", tmp_path / "s")
    before = content(str(tmp_path / "s"))
    write("day3.txt", [line])
    text = job("--from", folder, "--samples", tmp_path / "s", "--add", code=1)
    assert "fields would be others than in" in text and field in text
    assert content(str(tmp_path / "s")) == before


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--weights", "drop"], 2, "--weights drop: "),
        (["--label-threshold", "0.5"], 2, "--label-threshold 0.5: "),
    ],
)
def test_other_options_are_refused(job, logs, tmp_path, args, code, message):
    folder, write = logs
    job("--from", folder, "--samples", tmp_path / "s")
    write("day3.txt", THIRD)
    text = job("--from", folder, "--samples", tmp_path / "s", "--add", *args, code=code)
    assert message in text and "was made with" in text


def test_late_lines_write_the_samples_of_their_file_anew(job, logs, place, tmp_path):
    """Bad lines, counts and the parts of the other files as well as an import of all files has them."""
    folder, write = logs
    write("day3.txt", THIRD)
    job("--from", folder, "--samples", place, "--test-share", 0.3)
    kept = {each.path: each.mtime_s for each in open_published(place).entries() if "part-00000" in each.path}
    write("day2.txt", [*SECOND, "another line that is none", *THIRD[:1]])
    write("day3.txt", [THIRD[0], *SECOND])  # its bad line is gone
    write("day4.txt", SECOND)  # new, with the bytes that day2 had
    late = "--from", folder, "--samples", place, "--add"
    assert "added 3 of 4 files lines 10 quarantined 2" in job(*late)
    assert "added 0 of 4 files" in job(*late)
    job("--from", folder, "--samples", tmp_path / "anew", "--test-share", 0.3)
    found, expected = content(place), content(str(tmp_path / "anew"))
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    after = {each.path: each.mtime_s for each in open_published(place).entries()}
    assert kept and {path: after[path] for path in kept} == kept  # not written again
    summaries = [
        parse_json(open_published(str(each)).read_bytes("summary.json")) for each in (place, tmp_path / "anew")
    ]
    same = ("lines", "good_lines", "quarantined", "train", "test", "fields")
    assert [summaries[0][name] for name in same] == [summaries[1][name] for name in same]
    assert [each["counts"] for each in summaries[0]["sources"]] == [each["counts"] for each in summaries[1]["sources"]]


def test_a_file_that_has_changed_since_an_earlier_version_imported_it_is_refused(job, logs, tmp_path):
    """That counted nothing of each file."""
    folder, write = logs
    job("--from", folder, "--samples", tmp_path / "s")
    mark = tmp_path / "s" / "summary.json"
    summary = parse_json(mark.read_bytes())
    for each in summary["sources"]:
        del each["counts"]
    mark.write_text(json.dumps(summary))
    write("day3.txt", THIRD)
    assert "added 1 of 3 files lines 7" in job("--from", folder, "--samples", tmp_path / "s", "--add")
    write("day2.txt", FIRST)
    text = job("--from", folder, "--samples", tmp_path / "s", "--add", code=1)
    assert "day2.txt has changed since it was imported; import all files anew" in text


def test_a_changed_file_whose_bad_lines_cannot_be_told_apart_is_refused(job, logs, tmp_path):
    """Training and test samples have a file of its name each."""
    folder, write = logs
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "day2.txt").write_text(f"{THIRD[0]}\n")
    places = "--from", folder, "--test-from", tmp_path / "test", "--samples", tmp_path / "s"
    job(*places)
    write("day2.txt", FIRST)
    assert "day2.txt has changed since it was imported" in job(*places, "--add", code=1)


def test_there_is_nothing_to_add_to(job, logs, tmp_path):
    folder, _ = logs
    for name in ("nothing", "logs"):
        text = job("--from", folder, "--samples", tmp_path / name, "--add", code=2)
        assert "has no samples of this job" in text
    assert Path(folder, "day1.txt").is_file()
