"""Report pages of commands: which have --html, a wrong path is refused, and a page has the figures of its command.

Their tables in a pipe and on narrow terminals: all numbers are there, each on one line.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.report import Section, write_sections
from crossmedia import demo
from featurestore.console.output import figure, print_rows, text_console
from featurestore.console.page import ReportPage, recorded
from featurestore.problems import Problem
from tests.commands.calls import COMMANDS, Called, call, words_of
from tests.commands.test_every_command import LEAVES, least_words
from tests.pages import ReadPage, check_page
from trainer import daily as daytable
from trainer.config import load_config, save_config
from trainer.evaluation import report
from trainer.evaluation.bootstrap import LEAST_USERS_SHOWN, METRICS, Estimate, Evaluation, Measured, SlicedBy
from trainer.evaluation.report import METRIC_TITLES, number, range_of
from trainer.loop import summary

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
    assert called.err == f"error: {Problem.OUTPUT_WITHOUT_FOLDER.of('--html', page, page.parent)}\n"
    assert list(tmp_path.iterdir()) == [], "it began to work"


@pytest.mark.long
def test_an_evaluation_has_the_figures_of_its_json(names: dict[str, object], tmp_path: Path) -> None:
    places = {**names, "page": tmp_path / "page.html", "out": tmp_path / "out"}
    fails = "trainer.evaluate {run} --bootstrap 0 --out {empty} --html {page}"
    assert call(words_of(fails, places)).code == 1 and list(tmp_path.iterdir()) == [], "no page"
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
        row = read.value(METRIC_TITLES[name])
        if each["users"] is None or each["users"] >= LEAST_USERS_SHOWN:
            assert row[:3] == [number(each[key]) for key in ("ours", "baseline", "value")]
        else:
            assert row == [number(None)] * 5
    assert f"metrics are given of {LEAST_USERS_SHOWN} users or more" in read.text


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


def test_verify_writes_what_it_has_found_and_the_proof_of_a_takedown(names: dict[str, object], tmp_path: Path) -> None:
    places, file = {**names, "file": tmp_path / "takedown.txt"}, tmp_path / "takedown.txt"

    def verified(line: str) -> tuple[Called, ReadPage]:
        called = call([*words_of(f"featurestore verify {line}", places), "--html", str(tmp_path / "page.html")])
        return called, written(tmp_path / "page.html")

    called, read = verified("{store}")
    assert called.code == 0 and called.out.strip() in read.texts and called.out.startswith("0 problems")
    called, read = verified("{deepstore}")
    assert called.code == 1 and called.err.strip() in read.printed
    assert any(each in called.err for each in read.texts if each.startswith("broken: "))
    file.write_text("987654321\n")
    called, read = verified("{store} --absent {file}")
    assert called.code == 0 and read.value("proof") == [called.out[13:].strip()]
    file.write_text("1000\n")
    called, read = verified("{store} --absent {file}")
    assert called.code == 1 and called.out.strip() in read.texts and called.out.startswith("not absent: ")
    assert all(told.strip() in read.texts for told in called.err.splitlines() if told.startswith("error: "))


@pytest.mark.parametrize(
    "line",
    [
        "jobs/score --run {run} --out {new}.parquet",
        "jobs/export_embeddings --run {run} --out {new}.parquet",
        "trainer.prerank build --run {towers} --samples {samples} --out {new}",
        "jobs/make_demo_data --out {new} --items 20 --users 10 --days 2",
    ],
)
def test_the_summary_of_a_job_is_its_page(line: str, names: dict[str, object], tmp_path: Path) -> None:
    """A named line of it is a row: the name and the rest."""
    called = call([*words_of(line, names | {"new": tmp_path / "new"}), "--html", str(tmp_path / "page.html")])
    assert (called.code, called.trace) == (0, ""), called.err
    rows, told = written(tmp_path / "page.html").rows, called.out.splitlines()
    assert len(told) >= 2 and all([line[:13].strip(), line[13:].strip()] in rows for line in told)


LONG = "a/very/long/folder/[bold]of[/x]/runs/" + "x" * 90
Shown = Callable[[Path], list[str]]


def of_store(_: Path) -> list[str]:
    print_rows(["version", "writer", "bytes"], [["1", "me", "123,456,789.0 kB"]], numbers=["version", "bytes"])
    return ["123,456,789.0 kB"]


def of_training(_: Path) -> list[str]:
    figures = {"samples_per_s": 1234567.8, "name": "n", "folder": LONG, "num_ranks": 2, "global_step": 2040}
    summary.show(text_console(), {**figures, "metrics": {"gauc": 0.654321}})
    return ["1,234,568", "0.6543", LONG]


def of_evaluation(folder: Path) -> list[str]:
    metrics = {name: Estimate(0.5 + at / 1000, 0.4, 0.6) for at, name in enumerate(METRICS)}
    whole = Measured(1234567, 89, 10, metrics)
    figures = Evaluation(whole, {"age": SlicedBy("age of the ad", {"new": whole})}, [])
    report.show(text_console(), {"run": LONG, "checkpoint": "step-7", "notes": []}, figures, folder)
    return [*(f"{0.5 + at / 1000:.4f}" for at in range(len(METRICS))), "0.4000 to 0.6000", "1,234,567", LONG]


def of_days(folder: Path) -> list[str]:
    day = folder / "2026-01-01"
    day.mkdir()
    config = load_config(settings=["data.train_days=[2026-01-01]", "data.test_days=[2026-01-02]"])
    save_config(config, day / "config.yaml")
    metrics = {name: 0.5 + at / 1000 for at, name in enumerate(("logloss", "auc", "gauc", "new_ad_auc", "new_ad_gauc"))}
    told = {"global_step": 1234567, "store_version": 19, "metrics": {"impressions": 7654321, **metrics}}
    (day / "report.json").write_text(json.dumps(told))
    daytable.show(folder, daytable.write(folder))
    return ["1,234,567", "7,654,321", "2026-01-01", "2026-01-02", *(f"{value:.4f}" for value in metrics.values())]


def of_benchmarks(_: Path) -> list[str]:
    write_sections([Section("t", {"samples_per_s_" + "of_all_" * 9: 1234567.0, "ratio": 0.12345})])
    return ["1,234,567", "0.1235"]


def of_the_demo(_: Path) -> list[str]:
    metrics = dict.fromkeys(demo.METRICS, 0.61234)
    variants = dict.fromkeys(demo.VARIANTS, metrics)
    demo.show({**variants, "unique_ratio": 0.12345, "bytes_sent_per_step": 1234567.0, "samples_per_s": 7654321.0})
    return ["0.6123 (+0.0000)", "7,654,321 samples/s"]


@pytest.mark.parametrize("columns", [None, 120, 40])
@pytest.mark.parametrize("command", [of_store, of_training, of_evaluation, of_days, of_benchmarks, of_the_demo])
def test_every_number_is_whole(
    command: Shown,
    columns: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """And a training ends with few lines."""
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    wanted = command(tmp_path)
    out = capsys.readouterr().out
    if columns is None:
        assert "\x1b" not in out
    lines = re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines()
    assert [each for each in wanted if not any(each in line for line in lines)] == []
    assert not any("…" in line for line in lines)
    assert len(lines) <= 15 or command is not of_training or columns is not None
