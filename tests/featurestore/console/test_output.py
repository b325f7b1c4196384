"""Tables on a terminal and in a pipe: no number is cut or folded, and no command prints by another way."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from featurestore.console.output import print_table, text_console

ROOT = Path(__file__).parents[3]
NUMBERS = ["1,234,567,890", "0.123456", "0.6260 to 0.6279", "2,048 (+0.0123)"]


def table_of(title: str = "") -> Table:
    table = Table("a name of several words", title=title)
    for heading in ("impressions", "log loss", "95 % interval", "gain over the first"):
        table.add_column(heading, justify="right")
    for name in ("all of the impressions together", "data/runs/[bold]a[/x]"):
        table.add_row(name, *NUMBERS)
    return table


def printed(monkeypatch: pytest.MonkeyPatch, columns: int | None, title: str = "") -> list[str]:
    """Lines on a terminal of so many columns; None: in a pipe."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    console = text_console()
    console.file = io.StringIO()
    print_table(console, table_of(title))
    return re.sub(r"\x1b\[[0-9;]*m", "" if columns is not None else r"\g<0>", console.file.getvalue()).splitlines()


def test_in_a_pipe_a_row_is_a_line_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    title = "data/a/very/long/folder/" + "x" * 200
    lines = printed(monkeypatch, None, title)
    assert lines[0] == title
    for name in ("all of the impressions together", "data/runs/[bold]a[/x]"):
        (line,) = [each for each in lines if name in each]
        assert all(number in line for number in NUMBERS)
    assert len({len(line) for line in lines[1:]}) == 1, "the frame is as wide as the rows"
    assert not any("\x1b" in line or "…" in line for line in lines)


@pytest.mark.parametrize("columns", [130, 100, 60, 30, 10])
def test_a_narrow_terminal_cuts_no_number(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    lines = printed(monkeypatch, columns)
    for number in NUMBERS:
        assert sum(number in line for line in lines) == 2, number
    assert not any("…" in line for line in lines)
    if columns >= 100:
        assert all(len(line) <= columns for line in lines)
    else:
        assert "impressions" in lines[1], "a column's name and its value are a line"


def test_only_output_makes_consoles_and_prints_tables() -> None:
    """So that the tests above are about every command; those of report pages and of the tutorial show nothing."""
    found = []
    for package in ("featurestore", "pipeline", "trainer", "jobs", "benchmarks", "tools"):
        for file in sorted((ROOT / package).rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            makes = re.search(
                r"\b(Console|Progress|TextColumn)\(|rich\.print|from rich import print|Markdown\(|import track", text
            )
            by_itself = "rich.table import" in text and "print_table" not in text
            if file.name not in ("output.py", "page.py", "tutorial.py") and (makes or by_itself):
                found.append(file)
    assert found == []
    assert isinstance(text_console(stderr=True), Console)
