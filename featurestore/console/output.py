"""Output of commands: tables, texts, warnings and progress.

What `print_table`, `print_line`, `print_summary`, `print_problem` and `print_warning` print is put on the command's
page as well, where it has one (option --html).
"""

import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import typer
from rich import progress
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from featurestore.console.page import current_page
from featurestore.text import printable

_ENDLESS = 1 << 16  # columns; wider than any table


class _PlainConsole(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        """Make text of a string that is printed, or of a cell; lines stay, other control characters are spelled out."""
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


class _Bars(progress.Progress):
    def stop(self) -> None:
        """Stop the bars; where none has begun, without the empty line that ends them in a pipe."""
        if self.tasks:
            super().stop()
        else:
            self.live.stop()


def text_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Make a console that prints text as it is: no markup, no names of emoji, no colours of its own, no folded line."""
    return _PlainConsole(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)


def text_column(text: str = "{task.description}") -> progress.TextColumn:
    """Make a column of bars that takes no markup; by default it shows a task's description."""
    return progress.TextColumn(text, markup=False)


def progress_bars(
    *columns: progress.ProgressColumn, console: Console | None = None, transient: bool = False, disable: bool = False
) -> progress.Progress:
    """Make progress bars, by default on stderr, each with description, bar and count."""
    shown = columns or (text_column(), progress.BarColumn(), progress.MofNCompleteColumn())
    return _Bars(*shown, console=console or text_console(stderr=True), transient=transient, disable=disable)


def figure(value: float | int | str | None) -> str:
    """Format a number for a table: four digits, as 0.0001, from a thousand on all before the point; None as -."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)


def print_table(console: Console, table: Table) -> None:
    """Print the table, its title above it as a line. Columns aligned on the right (numbers) are never folded or cut.

    A terminal that is too narrow gets other texts folded between words. Where that does not suffice, and where there is
    no terminal, the table is as wide as it is.
    """
    if console.quiet:
        return
    title, style, table.title = table.title, table.title_style or "bold", None
    for each in _with_page(console):
        if title:
            each.print(title, style=style)
        if not each.is_terminal:
            _print_wide(each, table)
    if not console.is_terminal:
        return
    for column in table.columns:
        folded = column.justify != "right"
        column.min_width = max((_width(str(cell), folded) for cell in column.cells), default=0)
        column.min_width = max(column.min_width, _width(str(column.header), folded=True))
    least, natural = Measurement.get(console, console.options.update(max_width=_ENDLESS), table)
    if least > console.width:
        _print_wide(console, table)
        return
    table.width = min(natural, console.width)
    console.print(table, soft_wrap=False, crop=False)


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print a line."""
    for each in _with_page(console):
        each.print(text, style=style)


def print_summary(text: str) -> None:
    """Print the lines of a job on stdout, each with a name and a text from its 13th column on, or a sentence."""
    typer.echo(text)
    _print_on_page(text)


def print_problem(text: str) -> None:
    """Print a warning or an error in one line on stderr."""
    typer.echo(text, err=True)
    _print_on_page(text)


def print_warning(text: str) -> None:
    """Print a warning on stderr, while the command continues."""
    print_problem(f"warning: {text}")


def print_rows(
    names: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[str] = (), *, bold: int | None = None
) -> None:
    """Print a table of these columns on stdout; those of `numbers` are aligned on the right. `bold`: a row, from 0."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, justify="right" if name in numbers else "left")
    for number, row in enumerate(rows):
        table.add_row(*row, style="bold" if number == bold else None)
    print_table(text_console(), table)


def _with_page(console: Console) -> list[Console]:
    """Return the console of the terminal, and the recorder of the command's page."""
    page = current_page()
    return [console, page.console] if page and not console.quiet else [console]


def _print_on_page(text: str) -> None:
    if page := current_page():
        page.console.print(text)


def _width(text: str, folded: bool) -> int:
    """Count the columns of a terminal that a text needs at least; `folded`: it may be folded between words."""
    return max(map(cell_len, text.split() if folded else text.splitlines()), default=0)


def _print_wide(console: Console, table: Table) -> None:
    """Print a table as wide as it is."""
    wide = console.options.update(max_width=_ENDLESS)
    console.print(Segments(console.render(table, wide)), crop=False, end="")


FIRST_LINE_S, LINE_EVERY_S = 5.0, 10.0


class ProgressBar:
    """A progress bar: `advance` it by the number finished since the last call, or call it with the total finished."""

    def __init__(self, bars: progress.Progress, title: str, total: int, done: int) -> None:
        self._bars, self._title, self._total, self._done = bars, title, total, done
        self._doing = self._shown = ""
        self._task: progress.TaskID | None = None

    def advance(self, count: int) -> None:
        """Show `count` more of the total."""
        self(self._done + count, self._total)

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are finished."""
        self._done, self._total, self._doing = done, total, ""
        if self._bars.disable:
            return
        if self._task is None:
            self._task = self._bars.add_task(self._title, total=total, completed=done)
        else:
            self._bars.update(self._task, description=self._title, completed=done, total=total)

    def doing(self, what: str) -> None:
        """Show the current activity instead of the title, until the next number."""
        self._doing = what
        if self._task is not None:
            self._bars.update(self._task, description=what)

    @contextmanager
    def lines(self) -> Iterator[None]:
        """Print a line after `FIRST_LINE_S` and every `LINE_EVERY_S` until the end of the block, on stderr.

        And a last one if there was any. The first comes sooner, as a command takes seconds to come here.
        """
        is_over = threading.Event()

        def repeat() -> None:
            wait_s = min(FIRST_LINE_S, LINE_EVERY_S)
            while not is_over.wait(wait_s):
                self._print_line()
                wait_s = LINE_EVERY_S

        thread = threading.Thread(target=repeat, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
        if self._shown not in ("", self._line()):
            self._print_line()

    def _print_line(self) -> None:
        self._shown = self._line()
        print(self._shown, file=sys.stderr, flush=True)

    def _line(self) -> str:
        number = f"{self._done:,} of {self._total:,}" if self._total else "working"
        return f"{self._title}: {self._doing or number}"


@contextmanager
def progress_bar(title: str, total: int = 0, done: int = 0) -> Iterator[ProgressBar]:
    """Show progress on stderr: a bar until the end of the block; in a log a line every 10 s, none for quick work."""
    console = text_console(stderr=True)
    columns = (
        text_column(),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress_bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = ProgressBar(bars, title, total, done)
        with nullcontext() if console.is_terminal else bar.lines():
            yield bar
