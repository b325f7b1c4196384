"""The page that the running command fills: what it prints by featurestore.console.output is put there too."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from featurestore.console.page.page import ReportPage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    """Fill `page` with what is printed meanwhile, and write it where the command comes to its end.

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


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Keep what is printed meanwhile out of the page: it is another command's."""
    before = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(before)
