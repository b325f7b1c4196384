"""Report pages of commands (--html), opened as files: nothing comes from the network, phones, axe-core, keyboard."""

from pathlib import Path

import pytest
from rich.table import Table

from featurestore.console.output import print_line, print_problem, print_summary, print_table, text_console
from featurestore.console.page import ReportPage, recorded
from tests.explorer.browser.watching.chromium import NARROW, WIDE, too_wide, violations
from tests.featurestore.console.test_output import HOSTILE, plot_of

pytestmark = pytest.mark.xdist_group("report pages")  # they share a page that is made once


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of every kind of block, all of whose texts are hostile or very long."""
    path, texts = tmp_path_factory.mktemp("hostile") / "page.html", [*HOSTILE, "a/very/long/name" * 30, "x" * 900]
    page = ReportPage(path, " ".join(HOSTILE), ["python", *HOSTILE])
    with recorded(page):
        for text in texts:
            table = Table(text, text, title=f"title {text}")
            table.add_column(text, justify="right")
            table.add_row(text, text, text, style="bold")
            table.add_row(text, "", "")
            print_line(text_console(), text, style="bold")
            print_line(text_console(), text)
            print_line(text_console(), f"- {text}")
            print_summary(f"images       {text}")
            print_problem(text)
            print_table(text_console(), table)
            page.add_plot(plot_of(text))
    return path


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_hostile_texts_are_inert(hostile: Path, width: int, dark: bool, tab) -> None:
    page = tab(hostile.as_uri(), width=width, dark=dark, bypass_csp=True)  # axe-core is a script in the page
    assert page.seen.asked == [hostile.as_uri()]
    assert too_wide(page) == []
    assert violations(page) == ""
    assert page.evaluate("document.scripts.length + document.links.length + document.forms.length") == 0
    assert page.evaluate("[...document.images].every(each => each.naturalWidth > 0) && document.images.length > 0")


def test_a_wide_table_is_read_by_keyboard(hostile: Path, tab) -> None:
    page = tab(hostile.as_uri(), width=NARROW)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "PRE"
    before = page.evaluate("document.activeElement.scrollLeft")
    page.keyboard.press("ArrowRight")
    for _ in range(100):  # the page's policy forbids what playwright's own waiting would evaluate
        if page.evaluate("document.activeElement.scrollLeft") > before:
            return
        page.wait_for_timeout(50)
    pytest.fail("an arrow key does not move the table")


def test_colours_follow_the_reader(hostile: Path, tab) -> None:
    pages = [tab(hostile.as_uri(), dark=dark) for dark in (False, True)]
    colours = [page.evaluate("getComputedStyle(document.body).color") for page in pages]
    assert colours == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
