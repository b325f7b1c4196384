"""The application: all pages, access control, error pages, and headers against hostile names and sites."""

import contextlib
import ctypes
import hashlib
import hmac
import logging
import os
import secrets
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from explorer.data.visual import MOST_BYTES
from explorer.errors import NotHereError
from explorer.html.query import DRAINED
from explorer.html.site import LEFT_OUT, PICTURE, THUMBNAIL, PageKind, Part, Site
from explorer.pages.images import ImagePages
from explorer.pages.impressions import ImpressionPages
from explorer.pages.runs import ModelPages, RunPages
from explorer.pages.store import StorePages
from explorer.places import ExplorerSettings
from explorer.problems import Problem
from featurestore.console.memory import bound_freed_memory
from featurestore.errors import UserError
from featurestore.text import one_line
from serving.http.access import (
    LOOPBACKS,
    Credentials,
    SecuredServer,
    check_files,
    configure_logging,
    listen,
    matches_token,
    url_of,
)
from serving.http.limits import BODIES_AT_ONCE, BodyLimits, RefusedError, allow_connections

logger = logging.getLogger("explorer")


class HomePages(PageKind):
    """The page at /, which the site's name links to, and in an export the one in the place of those left out."""

    def routes(self) -> Sequence[Route]:
        """Return the routes of the two pages."""
        return [Route("/", self.home), *([Route(f"/{LEFT_OUT}", self.left_out)] if self.site.frozen else [])]

    def home(self, request: Request) -> Response:
        """Show the places and the questions that their pages answer."""
        return self.site.page(request, "Overview", Part(template="home.html"))

    def left_out(self, request: Request) -> Response:
        """Say that an export holds only so many files."""
        return self.site.page(request, "Left out", Part(template=LEFT_OUT))


_HOLDS_S = 60


class PicturePages(PageKind):
    """Small pictures at /picture?uri=...&size=..."""

    def routes(self) -> Sequence[Route]:
        """Return the one route, also without a folder of images: pages then show grey squares."""
        return [Route(PICTURE, self.picture)]

    def picture(self, request: Request) -> Response:
        """Return a picture as JPEG; for a missing or broken one a grey one, with the reason in a header."""
        size = request.query_params.get("size", "")
        number = int(size[:5]) if size.isascii() and size.isdigit() else THUMBNAIL
        found = self.site.pictures.get(request.query_params.get("uri", ""), number)
        tag = f'"{hashlib.sha256(found.jpeg).hexdigest()[:32]}"'
        headers = {"ETag": tag, "Cache-Control": f"private, max-age={_HOLDS_S}"}
        if found.problem:
            headers["X-Picture-Problem"] = found.problem.encode("ascii", "replace").decode()
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(found.jpeg, media_type="image/jpeg", headers=headers)


KINDS: tuple[type[PageKind], ...] = (
    HomePages,
    StorePages,
    ImagePages,
    PicturePages,
    RunPages,
    ImpressionPages,
    ModelPages,
)
"""All kinds of pages, in the order of the navigation."""
_POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def application(site: Site) -> Starlette:
    """Make the application of a site."""
    kinds = [kind(site) for kind in KINDS if not kind.needs or getattr(site.places, kind.needs) is not None]
    site.nav = [kind.nav for kind in kinds if kind.nav is not None]
    site.questions = [question for kind in kinds for question in kind.questions]
    routes: list[BaseRoute] = [route for kind in kinds for route in kind.routes()]
    routes.append(Route("/static/{name}", static))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            for kind in kinds:
                kind.close()
            site.close()

    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=_with_headers)],
        exception_handlers={
            kind: lambda request, error: _failed(site, request, error)
            for kind in (HTTPException, UserError, RefusedError, Exception)
        },
    )


def static(request: Request) -> Response:
    """Return a file of the package: style, htmx, or the charts' library from its own package."""
    name = request.path_params["name"]
    if name == "plotly.min.js":
        file: Path | None = Path(str(files("plotly") / "package_data" / name))
    else:
        folder = Path(str(files("explorer") / "static"))
        file = next((each for each in folder.iterdir() if each.name == name), None)
    if file is None:
        raise HTTPException(404, Problem.NO_FILE.of(name[:60]))
    return FileResponse(file, headers={"Cache-Control": "private, max-age=3600"})


async def _with_headers(request: Request, respond: Callable[[Request], Awaitable[Response]]) -> Response:
    response = await respond(request)
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    if response.headers.get("content-type", "").startswith("text/html"):
        response.headers.setdefault("Cache-Control", "no-store")
    return response


def _failed(site: Site, request: Request, error: Exception) -> Response:
    """Turn an error into a page: 404 for a missing thing, 400 for an invalid request, 500 for a bug.

    A body over a limit gets the status of the limit. If htmx asks for a part of a page, the part is the message, with
    status 200, as htmx shows no other status.
    """
    if isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, RefusedError):
        status, message = error.status, str(error)
    elif isinstance(error, UserError):
        status, message = 404 if isinstance(error, NotHereError) else 400, one_line(error)
    else:
        status, message = 500, Problem.BUG.of(type(error).__name__)
        logger.error("bug: %s\n%s", error, "".join(traceback.format_tb(error.__traceback__)).rstrip())
    title = "Not found" if status == 404 else "Error"
    response = site.page(request, title, Part(template="error.html", values={"message": message}), status=status)
    response.headers.update(HEADERS)
    if "HX-Request" in request.headers:
        response.status_code = 200
        response.headers["HX-Reselect"] = "[role=alert]"
    return response


LOGIN, COOKIE = "/login", "explorer"
_STAYS_S = 12 * 3600


class HostGuard:
    """ASGI middleware that only accepts the server's own host names, and forms of its own pages.

    So a page of another site can neither reach a server on loopback by a name of its own (DNS rebinding), nor send it a
    form.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] | None) -> None:
        """`hosts`: names without ports; None if the server listens on all addresses and may have any name."""
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        host = request.headers.get("host", "")
        if self._hosts is not None and (urlsplit(f"//{host}").hostname or "") not in self._hosts:
            await _refused(400, Problem.OTHER_HOST)(scope, receive, send)
        elif request.method != "GET" and not _is_own(request.headers.get("origin"), host):
            await _refused(403, Problem.FOREIGN_FORM)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class LoginGuard:
    """ASGI middleware that requires a token, as `Authorization: Bearer` or as the cookie of a login."""

    def __init__(self, app: ASGIApp, site: Site, tokens: list[str], *, secure: bool) -> None:
        """`tokens` may change later. `secure`: the server has TLS, so the cookie is restricted to it."""
        self._app, self._site, self._tokens, self._secure = app, site, tokens, secure
        self._secret = secrets.token_bytes(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        if request.url.path == LOGIN:
            await (await self._login(request))(scope, receive, send)
        elif request.url.path.startswith("/static/") or self._allows(request):
            await self._app(scope, receive, send)
        elif "text/html" in request.headers.get("accept", ""):
            await RedirectResponse(LOGIN, 303, headers=HEADERS)(scope, receive, send)
        else:
            headers = {"WWW-Authenticate": "Bearer"}
            await _refused(401, Problem.NO_TOKEN, headers)(scope, receive, send)

    def _allows(self, request: Request) -> bool:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and matches_token(token.strip().encode(), self._tokens):
            return True
        cookie = request.cookies.get(COOKIE, "")
        return matches_token(cookie.encode(), [self._cookie(token) for token in self._tokens])

    def _cookie(self, token: str) -> str:
        """The value of the cookie: useless for another server, and after this one has ended."""
        return hmac.new(self._secret, token.encode(), hashlib.sha256).hexdigest()

    async def _login(self, request: Request) -> Response:
        if request.method != "POST":
            return self._form(request, 200, "")
        try:
            async with request.form(max_files=0, max_fields=1) as form:
                token = str(form.get("token", "")).strip()
        except MultiPartException:
            token = ""
        if not matches_token(token.encode(), self._tokens):
            return self._form(request, 401, Problem.OTHER_TOKEN.of())
        answer = RedirectResponse("/", 303, headers=HEADERS)
        answer.set_cookie(
            COOKIE, self._cookie(token), max_age=_STAYS_S, httponly=True, samesite="strict", secure=self._secure
        )
        return answer

    def _form(self, request: Request, status: int, problem: str) -> HTMLResponse:
        form = self._site.page(
            request, "Token", Part(template="login.html", values={"refused": problem}), status=status
        )
        form.headers.update(HEADERS)
        return form


def names_of(host: str) -> tuple[str, ...] | None:
    """List the host names of a server on this address; None: any, as it listens on all addresses."""
    if host in ("0.0.0.0", "::"):
        return None
    return (*LOOPBACKS, host.lower()) if host in LOOPBACKS else (host.lower(),)


def _is_own(origin: str | None, host: str) -> bool:
    """Return whether a form is from a page of this server. Programs other than browsers send no origin."""
    return origin is None or urlsplit(origin).netloc == host


def _refused(status: int, problem: Problem, headers: dict[str, str] | None = None) -> Response:
    return Response(problem.of(), status, headers=HEADERS | (headers or {}), media_type="text/plain")


_LARGEST_KEPT = 1 << 20
_NO_HUGE_PAGES = 41  # number of prctl(2)


def spare_memory() -> None:
    """Return freed memory to the system at once, and take no huge pages; call it before other threads start.

    By default numpy asks for huge pages, so that the few rows in use of a large ID table take the memory of all its
    rows, and torch keeps code for 1,024 shapes of bfloat16 products, 0.5 MB each.
    Nothing happens on a system without these calls.
    """
    os.environ.setdefault("LRU_CACHE_CAPACITY", "32")  # torch's own in front of oneDNN's
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    bound_freed_memory(_LARGEST_KEPT)
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_NO_HUGE_PAGES, 1, 0, 0, 0)


def serve(settings: ExplorerSettings) -> None:
    """Listen and answer until a signal.

    Raises ServerSettingsError or TokenFileError for a file that does not work, ListenError if the port is taken.
    """
    spare_memory()
    configure_logging("explorer")
    check_files(settings)
    site = Site(settings)
    app = application(site)
    credentials = Credentials(settings)
    guarded = (
        app
        if credentials.tokens is None
        else LoginGuard(app, site, credentials.tokens, secure=settings.tls_cert is not None)
    )
    with listen(settings) as listener:
        if settings.runs is not None:  # its import takes two seconds, for which the first page would wait
            import_module("trainer.runs.saved")
        allow_connections()
        sys.stderr.write(f"open {url_of(settings, listener)} (Ctrl-C ends)\n")
        limited = BodyLimits(
            HostGuard(guarded, names_of(settings.host)),
            max_bytes=DRAINED * MOST_BYTES,
            max_held_bytes=BODIES_AT_ONCE * MOST_BYTES,
            timeout_s=settings.read_timeout_s,
            way_out="send a smaller file",
        )
        SecuredServer(settings, credentials, limited).run(sockets=[listener])
