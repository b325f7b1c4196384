"""The option --html of a command: a page is made of its command line, and filled while the command runs."""

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from featurestore.console.page.page import ReportPage
from featurestore.console.page.recording import recorded

PAGE = "html_page"
"""The name of the option among a command's parameters."""


def takes_page(function: Callable[..., Any], *, on_ranks: bool, with_findings: bool) -> Callable[..., Any]:
    """Give a command the option --html FILE; the function itself does not see it.

    That the file can be written is checked before the work begins; where the command runs on ranks, by `run_on_ranks`.
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
    """Return the words that start this program, as its documentation has them: jobs/score.py, whatever its folder."""
    if name.endswith(".py"):
        return ["python", "/".join(Path(sys.argv[0]).absolute().parts[-2:])]
    return name.split()


_HTML = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write what is printed as a page as well.", callback=_page_of),
]
