"""Report pages of commands: which have --html, a wrong path is refused, and a page has the figures of its command."""

import json
from pathlib import Path

import pytest

from benchmarks.report import Section, write_sections
from featurestore.console.output import figure
from featurestore.console.page import ReportPage, recorded
from tests.commands.calls import COMMANDS, call, words_of
from tests.commands.test_every_command import LEAVES, least_words
from tests.pages import ReadPage, check_page
from trainer.evaluation.bootstrap import LEAST_USERS_SHOWN, Estimate
from trainer.evaluation.report import METRIC_TITLES, number, range_of

WITH_PAGES = sorted(
    line
    for line in LEAVES
    if line.startswith(("jobs/", "benchmarks.", "trainer.evaluate", "trainer.plan"))
    or line in ("featurestore verify", "trainer.compat")
    or any("--html" in each.opts for each in LEAVES[line].params)
)
"""Commands that have to have the option, and others that have it."""


def written(path: Path) -> ReadPage:
    """Read the page that a command wrote, which is as every page has to be."""
    return check_page(path.read_text(encoding="utf-8"))


def test_a_new_job_is_among_them() -> None:
    jobs = {name for name in COMMANDS if name.startswith("jobs/")}
    assert {line.split()[0] for line in WITH_PAGES} >= jobs and len(jobs) >= 10 and len(WITH_PAGES) >= 25


@pytest.mark.parametrize("line", WITH_PAGES)
def test_a_path_that_cannot_be_written_ends_the_command_before_its_work(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command has the option, and looks at its value before anything else."""
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "missing" / "page.html"
    called = call([*line.split(), *least_words(LEAVES[line]), "--html", str(page)])
    assert (called.code, called.trace, called.out) == (2, "", "")
    assert called.err == f"error: cannot write --html {page}: there is no folder {page.parent}; make it first\n"
    assert list(tmp_path.iterdir()) == [], "it began to work"


def test_an_evaluation_has_the_figures_of_its_json(names: dict[str, object], tmp_path: Path) -> None:
    places = {**names, "page": tmp_path / "page.html", "out": tmp_path / "out"}
    line = "trainer.evaluate {run} --bootstrap 20 --out {out} --html {page}"
    called = call(words_of(line, places))
    assert (called.code, called.trace) == (0, ""), called.err
    read, report = written(tmp_path / "page.html"), json.loads((tmp_path / "out/report.json").read_text())
    for name, title in METRIC_TITLES.items():
        estimate = Estimate(**report["whole"]["metrics"][name])
        assert [title, number(estimate.value), range_of(estimate)] in read.rows
    for sliced in report["sliced_by"].values():
        for name, each in sliced["slices"].items():
            values = [number(each["metrics"][metric]["value"]) for metric in METRIC_TITLES]
            assert [name, f"{each['impressions']:,}", *values] in read.rows
    assert len(read.plots) == 1 and read.plots[0].startswith("Reliability")
    assert str(names["run"]) in read.text and f"written to {tmp_path / 'out'}" in read.texts
    against = "trainer.evaluate {run} --against {run} --bootstrap 20 --out {out} --html {page}"
    assert call(words_of(against, places)).code == 0
    read, found = written(tmp_path / "page.html"), json.loads((tmp_path / "out/comparison.json").read_text())
    for name, each in found["differences"].items():
        is_shown = each["users"] is None or each["users"] >= LEAST_USERS_SHOWN
        values = [number(each[key] if is_shown else None) for key in ("ours", "baseline", "value")]
        assert read.value(METRIC_TITLES[name])[:3] == values


def test_an_evaluation_that_fails_writes_no_page(names: dict[str, object], tmp_path: Path) -> None:
    line = "trainer.evaluate {run} --bootstrap 0 --out {empty} --html {page}"
    assert call(words_of(line, {**names, "page": tmp_path / "page.html"})).code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_benchmark_has_the_figures_of_its_json(tmp_path: Path) -> None:
    sections = [
        Section("speed", {"full_s": 12.5, "refresh_s": 0.5, "ratio": 25.0, "name": "x", "none_s": None, "rows": 2}),
        Section("ratios", {"a_vs_b": 1.5, "c_vs_b": 2.0, "read_rows_per_s": 5.0, "write_rows_per_s": 7.0}),
        Section("grid", {}, {"ours_2_ranks": {"samples_per_s": 1234.5}, "theirs": {"samples_per_s": 987.0}}, "p_"),
    ]
    with recorded(ReportPage(tmp_path / "page.html", "T", [])):
        write_sections(sections, tmp_path / "file.json")
    read, values = written(tmp_path / "page.html"), json.loads((tmp_path / "file.json").read_text())
    for name in (*sections[0].figures, *sections[1].figures):
        assert read.value(name) == [figure(values[name])]
    for name in ("ours_2_ranks", "theirs"):
        assert read.value(name.replace("_", " ")) == [figure(values[f"p_{name}_samples_per_s"])]


def test_verify_writes_what_it_has_found(names: dict[str, object], tmp_path: Path) -> None:
    places = {**names, "page": tmp_path / "page.html", "copy": tmp_path / "store"}
    called = call(words_of("featurestore verify {store} --html {page}", places))
    read = written(tmp_path / "page.html")
    assert called.code == 0 and called.out.strip() in read.texts and called.out.startswith("0 problems")
    broken = call(words_of("featurestore verify {deepstore} --html {page}", places))
    read = written(tmp_path / "page.html")
    assert broken.code == 1 and broken.err.strip() in read.printed
    assert any(each in broken.err for each in read.texts if each.startswith("broken: "))


def test_the_proof_of_a_takedown_is_a_page(names: dict[str, object], tmp_path: Path) -> None:
    places = {**names, "page": tmp_path / "page.html", "file": tmp_path / "takedown.txt"}
    line = "featurestore verify {store} --absent {file} --html {page}"
    (tmp_path / "takedown.txt").write_text("987654321\n")
    called = call(words_of(line, places))
    assert called.code == 0 and written(tmp_path / "page.html").value("proof") == [called.out[13:].strip()]
    (tmp_path / "takedown.txt").write_text("1000\n")
    called = call(words_of(line, places))
    read = written(tmp_path / "page.html")
    assert called.code == 1 and called.out.strip() in read.texts and called.out.startswith("not absent: ")
    assert all(told.strip() in read.texts for told in called.err.splitlines() if told.startswith("error: "))


def lines_of(out: str) -> list[list[str]]:
    """Return the named lines of a job as rows of a page have them: the name and the rest of each."""
    return [[line[:13].strip(), line[13:].strip()] for line in out.splitlines()]


JOBS = [
    "jobs/score --run {run} --out {new}.parquet",
    "jobs/export_embeddings --run {run} --out {new}.parquet",
    "trainer.prerank build --run {towers} --samples {samples} --out {new}",
    "jobs/make_demo_data --out {new} --items 20 --users 10 --days 2",
]


@pytest.mark.parametrize("line", JOBS)
def test_the_summary_of_a_job_is_its_page(line: str, names: dict[str, object], tmp_path: Path) -> None:
    places = {**names, "new": tmp_path / "new"}
    called = call([*words_of(line, places), "--html", str(tmp_path / "page.html")])
    assert (called.code, called.trace) == (0, ""), called.err
    read = written(tmp_path / "page.html")
    told = lines_of(called.out)
    assert told and len(told) >= 2
    assert all(each in read.rows for each in told)
