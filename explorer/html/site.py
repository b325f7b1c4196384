"""The site that all pages share: its places, pictures, templates and links."""

import datetime
import json
import math
import posixpath
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import Any, ClassVar, NamedTuple
from urllib.parse import quote, urlencode

import jinja2
import xxhash
from markupsafe import Markup
from rich.filesize import decimal
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

from explorer.data.background import Background, Task
from explorer.data.impressions.explained import name_of, percent, points
from explorer.data.impressions.open_runs import TrainedRuns
from explorer.data.pictures import Pictures
from explorer.errors import RequestError
from explorer.html import charts
from explorer.places import Places
from featurestore.console.output import figure
from featurestore.errors import UserError
from featurestore.log import utc_text
from featurestore.text import count_text, one_line, printable

Param = str | int | float | bool | None

PICTURE, STATIC = "/picture", "/static/"
LEFT_OUT = "left-out.html"
"""Page of an exported folder to which links of pages that were not exported lead."""
_ODD = re.compile(r"[^A-Za-z0-9]+")


def address(path: str, params: Mapping[str, Param | Sequence[str]]) -> str:
    """Return the address of a page: the quoted path, and the parameters sorted by name, without those that are None.

    A parameter with several values is repeated.
    """
    given = {
        name: str(value) if isinstance(value, str | int | float) else list(value)
        for name, value in sorted(params.items())
        if value is not None
    }
    return quote(path) + (f"?{urlencode(given, doseq=True)}" if given else "")


def file_of(address: str) -> str:
    """Name the file of an address in an exported folder: readable, unique, and plain ASCII whatever it names."""
    if address == "/":
        return "index.html"
    if address.startswith((STATIC, f"/{LEFT_OUT}")):
        return address[1:]
    name = f"{_ODD.sub('-', address)[:48].strip('-')}-{xxhash.xxh3_64_hexdigest(address.encode())}"
    return f"pictures/{name}.jpg" if address.startswith(PICTURE) else f"pages/{name}.html"


def relative(target: str, page: str) -> str:
    """Return the relative path from one file of an exported folder to another."""
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


DASH = "–"


def number(value: float | int | None, digits: int | None = None) -> str:
    """Format a number: integers with commas, others with `digits` decimals or as in tables; a dash for None."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    if digits is not None:
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else figure(value)


def things(value: int | None, thing: str) -> str:
    """Format a number with its noun, e.g. `1 row` or `2,000 rows`; a dash for None."""
    return f"{DASH} {thing}s" if value is None else count_text(value, thing)


def signed(value: float | None, digits: int = 4) -> str:
    """Write a difference with its sign."""
    return DASH if value is None or not math.isfinite(value) else f"{value:+.{digits}f}"


def size(value: int | None) -> str:
    """Write a number of bytes, e.g. 3.1 MB."""
    return DASH if value is None else decimal(value)


def time(value: float | None) -> str:
    """Write a time in seconds since 1970 as UTC."""
    return DASH if value is None else utc_text(value)


def ago(value: float | None) -> str:
    """Format the age of a time roughly, e.g. `3 minutes ago`."""
    if value is None:
        return DASH
    seconds = datetime.datetime.now(datetime.UTC).timestamp() - value
    for name, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"


FILTERS = {each.__name__: each for each in (number, things, signed, size, time, ago)} | {"plain": printable}

THUMBNAIL = 160
"""Pixels of the longer side of a picture in a list."""
LOOK_S, _POLL_S = 0.1, 2.0
"""Seconds that a page waits for a task before it shows its progress: at first, and when it asks again."""
_asked: ContextVar[str] = ContextVar("address of the page that is being written")


class NavItem(NamedTuple):
    """An entry of the navigation: the word, and the address of its page."""

    word: str
    path: str


class Question(NamedTuple):
    """A user's question, the address of the page that answers it, and the content of that page."""

    words: str
    path: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a page: one element, named after its template, and what it shows.

    A page is a list of parts. It is sent without those that are not quick, or whose task runs; each of them is then
    asked for by `wait=NAME` at the page's own address. In an export all are computed, one after the other.
    """

    template: str
    values: Mapping[str, Any] | Callable[[], Mapping[str, Any]] = field(default_factory=dict)
    """Values for the template, or what computes them when the part is written.

    `again_s` among them: the page asks for the part again after so many seconds. A UserError becomes a sentence in the
    part's place, but for a RequestError, which is the page's.
    """
    heading: str = ""
    """Stands above the part, also while it is not there yet."""
    is_quick: bool = True
    """Whether the page waits for `values`; not looked at with a task."""
    task: Task[Any] | None = None
    """The background task without whose result `values` would wait; its progress is shown until it ends."""
    what: str = ""
    """What is being done, shown in the place of a part that is not there yet; empty: nothing is."""
    is_page: bool = False
    """Whether the page is for this part, so that its errors are the page's."""

    @property
    def name(self) -> str:
        """The id of its element."""
        return PurePosixPath(self.template).stem


@dataclass
class Site:
    """The state that all pages share.

    `frozen`: pages are exported as files, so they must not need a server: no forms, no live parts.
    """

    places: Places
    frozen: bool = False
    nav: list[NavItem] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    linked: list[str] = field(default_factory=lambda: ["/"])
    """Of a frozen site: the addresses that its pages link to, each once."""
    most_files: int | None = None
    """The number of files that a frozen site exports; later addresses lead to a page that says so."""
    left_out: set[str] = field(default_factory=set)
    """Of a frozen site: the addresses beyond the limit of files."""
    doing: Callable[[str], None] = lambda doing: None
    """Of a frozen site: receives the progress of a page."""

    @cached_property
    def _known(self) -> set[str]:
        return set(self.linked)

    @cached_property
    def pictures(self) -> Pictures:
        """The pictures below the images' place."""
        return Pictures(self.places.images)

    @cached_property
    def background(self) -> Background:
        """Background tasks, shared by all pages."""
        return Background()

    def close(self) -> None:
        """End the background tasks."""
        background: Background | None = self.__dict__.pop("background", None)
        if background is not None:
            background.close()

    @cached_property
    def trained_runs(self) -> TrainedRuns:
        """The open runs, shared by the pages; the pages of impressions close them."""
        return TrainedRuns(self.places)

    @cached_property
    def templates(self) -> jinja2.Environment:
        """The templates; text in them is escaped, and a missing value is an error."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("explorer"),
            autoescape=True,
            auto_reload=False,  # after an upgrade, a running server must not use new templates with old code
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters.update(FILTERS)
        environment.globals.update(site=self, url=self.url, picture=self.picture, frozen=self.frozen)
        environment.globals.update(script_json=script_json, percent=percent, points=points, name_of=name_of)
        environment.globals.update(charts_of=charts, macros=environment.get_template("macros.html").module)
        return environment

    def wait_for(self, task: Task[Any], timeout_s: float) -> bool:
        """Wait for the end of a task, in an export without the timeout; return whether it has ended."""
        while not task.wait(timeout_s):
            if not self.frozen:
                return False
            of = f" ({task.done:,} of {task.total:,})" if task.total else ""
            self.doing(f"{task.doing}{of}")
        return True

    def url(self, path: str, **params: Param | Sequence[str]) -> str:
        """Return a link to a page of the site; every link of every template is made here."""
        wanted = address(path, params)
        if not self.frozen:
            return wanted
        page = file_of(_asked.get())
        if wanted not in self._known:
            if self.most_files is not None and len(self.linked) >= self.most_files - 1:  # one is for those beyond
                self.left_out.add(wanted)
                return relative(LEFT_OUT, page)
            self._known.add(wanted)
            self.linked.append(wanted)
        return relative(file_of(wanted), page)

    def picture(self, uri: str, size: int = THUMBNAIL) -> str:
        """Write the address of a picture, its longer side at most `size` pixels."""
        return self.url(PICTURE, uri=uri, size=size)

    def page(
        self, request: Request, title: str, *parts: Part, status: int = 200, has_charts: bool = False, **shared: Any
    ) -> HTMLResponse:
        """Write a page, or the one part of it that htmx asks for by `wait=NAME`.

        `title`: of the page, without the site's name. `has_charts`: in any part. `shared`: values for all templates.
        The page is to be loaded again where it has no such part any more.
        """
        shared |= {"here": request.scope["path"], "title": title, "has_charts": has_charts}
        asked = [part for part in parts if part.name == request.query_params.get("wait")]
        if not asked and status == HTTPStatus.OK and "HX-Request" in request.headers:
            return HTMLResponse(headers={"HX-Refresh": "true"})
        token = _asked.set(address_of(request))
        try:
            for task in (part.task for part in asked if part.task is not None):
                self.wait_for(task, _POLL_S)
            if asked and "HX-Request" in request.headers:
                return HTMLResponse(self._written(request, asked[0], shared), status)
            written = [self._written(request, part, shared) for part in parts]
            return HTMLResponse(self.templates.get_template("base.html").render(parts=written, **shared), status)
        finally:
            _asked.reset(token)

    def _written(self, request: Request, part: Part, shared: Mapping[str, Any]) -> Markup:
        """Write a part that is quick or asked for; else what is shown in its place, which asks for it."""
        given = request.query_params
        is_there = self.frozen or part.is_quick or given.get("wait") == part.name
        if part.task is not None:
            is_there = self.wait_for(part.task, LOOK_S)
        values, problem = {} if callable(part.values) else part.values, ""
        if is_there and callable(part.values):
            try:
                values = part.values()
            except UserError as error:
                if part.is_page or isinstance(error, RequestError):
                    raise
                problem = one_line(error)
        params = {name: given.getlist(name) for name in given} | {"wait": part.name}
        context = {"again_s": None, **shared, **values, "part": part, "is_there": is_there, "problem": problem}
        text = self.templates.get_template("part.html").render(href=address(request.scope["path"], params), **context)
        return Markup(text)


def address_of(request: Request) -> str:
    """Give the address that a request asks for, path and parameters."""
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


def script_json(value: Any) -> Markup:
    """Encode JSON that is safe inside a script element, whatever texts it contains."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return Markup("".join(escapes.get(each, each) for each in text))


class PageKind(ABC):
    """Pages of one kind. Endpoints are plain functions `(request) -> response`: starlette runs them in threads."""

    needs: ClassVar[str] = ""
    """The place without which there are no such pages, as `Places` names it; empty: none."""
    nav: ClassVar[NavItem | None] = None
    """The entry of the navigation."""
    questions: ClassVar[Sequence[Question]] = ()
    """The most frequent questions that these pages answer, for the first page."""

    def __init__(self, site: Site) -> None:
        self.site = site

    @abstractmethod
    def routes(self) -> Sequence[Route]:
        """List the routes."""

    def close(self) -> None:  # noqa: B027
        """Release resources of the pages; most have none."""
