"""Report pages (option --html): what a command prints, recorded by rich, as one HTML file that needs nothing else.

The page has no script, and its policy forbids whatever it does not hold itself. Imports neither rich nor matplotlib: a
command that writes no page does not wait for them.
"""

import base64
import contextlib
import functools
import inspect
import io
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurestore.console.files import check_place, replace_file
from featurestore.errors import UserError
from featurestore.problems import Problem
from featurestore.text import printable, refusal, without_passwords

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

PAGE = "html_page"
"""The name of the option --html among a command's parameters."""
_FORMAT = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>TITLE</title>
<style>
pre {{ overflow-x: auto; line-height: 1.25; }}
img {{ max-width: 100%; }}
{stylesheet}
</style>
</head>
<body>
<main>
<h1>TITLE</h1>
<pre tabindex="0">{code}</pre>
PLOTS
</main>
</body>
</html>
"""
"""Format of a page, like rich's own (`Console.export_html`)."""


class ReportPage:
    """The page of one call of a command.

    `title` says what the command does, `words` are those of its command line; passwords in addresses are hidden.
    """

    def __init__(self, path: Path, title: str, words: Sequence[str]) -> None:
        self._path, self._title, self._words = path, title, words
        self._plots: list[tuple[str, str]] = []  # the title of each, and its SVG
        self._is_left_out = False

    @functools.cached_property
    def console(self) -> "Console":
        """Records output without showing it."""
        from rich.console import Console

        console = Console(
            record=True,
            file=io.StringIO(),
            force_terminal=False,
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
        )
        console.print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {' '.join(shlex.join(self._words).split())}\n")
        return console

    def check_place(self) -> None:
        """Raise OutputPlaceError where the file cannot be written; called before the work, which may take hours."""
        check_place(self._path, "--html")

    def leave_out(self) -> None:
        """Write nothing at the end: another process of the same command writes the page."""
        self._is_left_out = True

    def add_plot(self, figure: "Figure") -> None:
        """Put a figure of matplotlib below the texts, as SVG; its title says what it shows."""
        from matplotlib import rc_context

        file = io.StringIO()
        with rc_context({"svg.fonttype": "none"}):
            figure.savefig(file, format="svg", metadata={"Date": None})
        title = figure.get_suptitle() or figure.axes[0].get_title() or figure.axes[0].get_title(loc="left")
        self._plots.append((title, _visible(file.getvalue())))

    def html(self) -> str:
        """Return the page as text, keeping the recorded output."""
        images = []
        for title, svg in self._plots:
            data = base64.b64encode(svg.encode()).decode()
            images.append(f'<p><img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}"></p>')
        texts = {"TITLE": escape(self._title), "PLOTS": "\n".join(images)}
        code_format = _FORMAT
        for name, text in texts.items():
            code_format = code_format.replace(name, text.replace("{", "{{").replace("}", "}}"))
        return _visible(without_passwords(self.console.export_html(code_format=code_format, clear=False)))

    def write(self) -> None:
        """Write the file, whole or not at all. Raises UserError."""
        if self._is_left_out:
            return
        try:
            replace_file(self._path, self.html())
        except OSError as error:
            raise UserError(Problem.OUTPUT_REFUSED, "--html", self._path, refusal(error)) from error


def _visible(text: str) -> str:
    """Spell out characters that cannot be seen; lines stay."""
    return "\n".join(map(printable, text.split("\n")))


_CURRENT: ContextVar[ReportPage | None] = ContextVar("report_page", default=None)


def current_page() -> ReportPage | None:
    """Return the page of the running command; None without --html."""
    return _CURRENT.get()


def save_plot(figure: "Figure", path: Path) -> None:
    """Write a plot as a PNG file, and put it on the page of the running command, where it has one, as SVG."""
    figure.savefig(path, dpi=120)
    if page := current_page():
        page.add_plot(figure)


@contextlib.contextmanager
def recorded(page: ReportPage, *, with_findings: bool = False) -> Iterator[None]:
    """Record all output of the block in `page`, and write it if the command completes.

    A command that fails writes none; `with_findings`: its exit code 1 says that it has found something.
    """
    before = _CURRENT.set(page)
    try:
        yield
    except typer.Exit as end:
        if end.exit_code == 0 or (with_findings and end.exit_code == 1):
            page.write()
        raise
    else:
        page.write()
    finally:
        _CURRENT.reset(before)


def takes_page(function: Callable[..., Any], *, on_ranks: bool, with_findings: bool) -> Callable[..., Any]:
    """Give a command the option --html FILE; the function itself does not see it.

    Whether the file can be written is checked before the work begins, for a command on ranks by `run_on_ranks`.
    """

    @functools.wraps(function)
    def command(*args: Any, **values: Any) -> Any:
        page: ReportPage | None = values.pop(PAGE, None)
        if page is None:
            return function(*args, **values)
        if not on_ranks:
            page.check_place()
        with recorded(page, with_findings=with_findings):
            return function(*args, **values)

    signature = inspect.signature(function)
    option = inspect.Parameter(PAGE, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_HTML)
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), option], return_annotation=inspect.Signature.empty
    )
    command.__annotations__ = {**function.__annotations__, PAGE: _HTML}
    return command


def _page_of(context: typer.Context, value: Path | None) -> ReportPage | None:
    if value is None or context.resilient_parsing:
        return None
    first, _, _ = (context.command.help or context.command_path).strip().partition("\n\n")
    title, _, _ = " ".join(first.split()).partition(". ")
    return ReportPage(value, title.rstrip("."), [*_program(context.find_root().info_name or ""), *sys.argv[1:]])


def _program(name: str) -> list[str]:
    """Return the program's name as in the documentation, e.g. jobs/score.py, whatever its folder."""
    if name.endswith(".py"):
        return ["python", "/".join(Path(sys.argv[0]).absolute().parts[-2:])]
    return name.split()


_HTML = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write what is printed as a page as well.", callback=_page_of),
]
