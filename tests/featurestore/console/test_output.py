"""Tables, progress and report pages: no number is cut, a bar goes with the work, and a page is inert and whole."""

import os
import threading
import time
from pathlib import Path

import pytest
import typer
from matplotlib.figure import Figure
from rich.table import Table

from featurestore.console import output
from featurestore.console.output import print_line, print_problem, print_summary, print_table, text_console
from featurestore.console.page import ReportPage, _program, current_page, recorded, save_plot
from featurestore.errors import USAGE, OutputPlaceError, UserError
from featurestore.problems import Problem
from featurestore.text import printable
from tests.pages import ReadPage, check_page
from tests.raised import raises


def shown(capsys: pytest.CaptureFixture[str], until: str) -> str:
    """Wait for a text on stderr, and return all that came there."""
    err = ""
    while until not in err:
        time.sleep(0.005)
        err += capsys.readouterr().err
    return err


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress_bar("reading", 2000) as bar:
        bar.advance(2000)
    assert capsys.readouterr().err == ""  # quick work
    monkeypatch.setattr(output, "LINE_EVERY_S", 0.02)
    with output.progress_bar("reading", 2000) as bar:
        line = "reading: 0 of 2,000\n"
        assert shown(capsys, line * 2).startswith(line * 2)  # also where nothing moves on
        bar.advance(500)
        bar.advance(500)
        shown(capsys, "reading: 1,000 of 2,000\n")
        monkeypatch.setattr(output, "LINE_EVERY_S", 60)
        bar.advance(1000)
    assert capsys.readouterr().err.endswith("reading: 2,000 of 2,000\n")
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_a_terminal_gets_a_bar_that_goes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    with output.progress_bar("reading", 4, done=1) as bar:
        bar.advance(1)
        bar(4, 4)
    err = capsys.readouterr().err
    assert "reading" in err and "4/4" in err and err.endswith("\x1b[2K")


def test_what_goes_on_is_told_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(output, "LINE_EVERY_S", 0.02)
    with output.progress_bar("pages") as bar:
        bar(1, 9)
        bar.doing("map, 112 s")
        shown(capsys, "pages: map, 112 s\n")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    with output.progress_bar("pages") as bar:
        bar(1, 9)
        bar.doing("lays out a map")
    assert "lays out a map" in capsys.readouterr().err


HOSTILE = [
    "</title><img src=x onerror=alert(1)>",
    "\"' onload='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &amp;amp;",
    "\u202egpj.exe",
    "a\x00b\x1b[31m\nc",
]


def plot_of(text: str) -> Figure:
    """Draw a plot with this text."""
    figure = Figure()
    axes = figure.subplots()
    axes.barh([text], [1.0])
    axes.set_title(printable(text), parse_math=False)
    return figure


def page_of(tmp_path: Path) -> ReportPage:
    return ReportPage(tmp_path / "page.html", "Title", ["python", "-m", "x"])


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert_wherever_it_stands(text: str, tmp_path: Path) -> None:
    page = ReportPage(tmp_path / "page.html", text, ["python", text])
    table = Table(text, title=f"title {text}")
    table.add_column(text, justify="right")
    table.add_row(text, text)
    with recorded(page):
        print_line(text_console(), text, style="bold")
        print_line(text_console(), text)
        print_summary(f"images       {text}")
        print_problem(text)
        print_table(text_console(), table)
        save_plot(plot_of(text), tmp_path / "plot.png")
    read = check_page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "\u202e" not in read.text and "\x00" not in read.text and "\x1b" not in read.text
    shown = "".join(map(_shown, text.split("\n", maxsplit=1)[0]))
    assert read.printed.count(shown) >= 8  # a heading, a line, a job's line, a problem, and a table's title and cells
    assert [each.split("\n")[0] for each in read.titles] == [shown] * 2
    assert read.plots == [printable(printable(text))]


def _shown(letter: str) -> str:
    return letter if letter.isprintable() else f"\\u{ord(letter):04x}" if ord(letter) > 255 else f"\\x{ord(letter):02x}"


def test_blocks_come_in_the_order_of_printing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the terminal is the same with a page."""

    def printed() -> tuple[str, str]:
        table = Table("name", title="A table")
        table.add_column("value", justify="right")
        table.add_row("a part", "")
        table.add_row("one", "1,234", style="bold")
        print_line(text_console(), "first")
        print_table(text_console(), table)
        print_line(text_console(), "A heading", style="bold")
        print_line(text_console(), "- point one")
        print_line(text_console(), "- point two")
        print_summary("images       12\nlast words")
        print_problem("warning: x")
        print_line(text_console(quiet=True), "of another rank")
        print_table(text_console(quiet=True), Table("of another rank"))
        text_console().print("progress")
        return capsys.readouterr()

    without = printed()
    with recorded(page_of(tmp_path)):
        told = printed()
    assert told == without and told[1] == "warning: x\n"
    read = check_page((tmp_path / "page.html").read_text(encoding="utf-8"))
    wanted = ["first", "A table", "name", "value", "a part", "one", "1,234", "A heading", "- point one", "- point two"]
    wanted += ["images       12", "last words", "warning: x"]
    places = [read.printed.index(each) for each in wanted]
    assert places == sorted(places)
    assert all(each in told[0] for each in (*wanted[:-1], "progress"))
    assert "another" not in read.printed and "progress" not in read.printed
    assert read.value("one") == ["1,234"] and '<span class="r1">A heading</span>' in read.text


def test_passwords_in_addresses_are_hidden(tmp_path: Path) -> None:
    page = ReportPage(tmp_path / "x.html", "T", ["python", "--store", "http://me:hidden-word@host/x", "a b"])
    table = Table("store")
    table.add_row("s3://me:hidden-word@host/x")
    with recorded(page):
        print_line(text_console(), "from s3://me:hidden-word@host/x")
        print_summary("store        s3://me:hidden-word@host/x")
        print_table(text_console(), table)
    assert ": python --store http://me:***@host/x 'a b'" in ReadPage(page.html()).printed
    assert "hidden-word" not in page.html() and page.html().count("me:***@host") == 4


def test_a_page_is_written_at_the_end_of_a_command_and_not_of_one_that_failed(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    for error in (UserError("no"), typer.Exit(1), KeyboardInterrupt()):
        with pytest.raises(type(error)), recorded(page_of(tmp_path)):
            raise error
    assert current_page() is None and not file.exists()
    with pytest.raises(typer.Exit), recorded(page_of(tmp_path), with_findings=True):
        print_problem("broken: a file")
        raise typer.Exit(1)
    assert "broken: a file" in check_page(file.read_text(encoding="utf-8")).texts
    file.unlink()
    with pytest.raises(typer.Exit), recorded(page_of(tmp_path)):
        raise typer.Exit(0)
    assert file.exists()
    file.unlink()
    page = page_of(tmp_path)
    with recorded(page):
        page.leave_out()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    wrong = {
        tmp_path: (Problem.OUTPUT_IS_A_FOLDER, {}),
        tmp_path / "missing" / "page.html": (Problem.OUTPUT_WITHOUT_FOLDER, {"parent": tmp_path / "missing"}),
        tmp_path / "pipe": (Problem.OUTPUT_NOT_REGULAR, {}),
        tmp_path / "file" / "page.html": (Problem.OUTPUT_WITHOUT_FOLDER, {"parent": tmp_path / "file"}),
        tmp_path / ("x" * 255): (Problem.OUTPUT_REFUSED, {"reason": "File name too long"}),
        Path("/proc/page.html"): (Problem.OUTPUT_REFUSED, {}),
    }
    for path, (problem, values) in wrong.items():
        with raises(OutputPlaceError, problem, option="--html", where=path, **values) as caught:
            ReportPage(path, "T", []).check_place()
        assert caught.value.exit_code == USAGE
    with raises(UserError, Problem.OUTPUT_REFUSED, option="--html", where=tmp_path / "gone" / "page.html"):
        ReportPage(tmp_path / "gone" / "page.html", "T", []).write()
    ReportPage(tmp_path / "new.html", "T", []).check_place()
    ReportPage(tmp_path / "file", "T", []).check_place()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


def test_a_page_names_a_script_as_the_documentation_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/a/b/jobs/score.py"])
    assert _program("score.py") == ["python", "jobs/score.py"]
