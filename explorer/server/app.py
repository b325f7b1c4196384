"""The application: all pages, errors as pages, and the headers that keep a hostile name or site from doing anything."""

import contextlib
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route

from explorer.errors import NotHereError
from explorer.html.site import Site
from explorer.pages.home import HomePages
from explorer.pages.images import ImagePages
from explorer.pages.impressions import ImpressionPages
from explorer.pages.kind import PageKind
from explorer.pages.maps import MapPages
from explorer.pages.pictures import PicturePages
from explorer.pages.runs import RunPages
from explorer.pages.scorer import ScorerPages
from explorer.pages.store import StorePages
from featurestore.errors import UserError
from featurestore.text import one_line
from serving.http.limits import RefusedError

logger = logging.getLogger("explorer")

KINDS: tuple[type[PageKind], ...] = (
    HomePages,
    StorePages,
    ImagePages,
    PicturePages,
    MapPages,
    RunPages,
    ImpressionPages,
    ScorerPages,
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
    kinds = [kind(site) for kind in KINDS]
    site.nav = [item for kind in kinds if (item := kind.nav) is not None]
    site.questions = [question for kind in kinds if kind.nav is not None for question in kind.questions]
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
            HTTPException: lambda request, error: _failed(site, request, error),
            UserError: lambda request, error: _failed(site, request, error),
            RefusedError: lambda request, error: _failed(site, request, error),
            Exception: lambda request, error: _failed(site, request, error),
        },
    )


def static(request: Request) -> Response:
    """Give a file of the package: style, htmx, or the charts' library out of its own package."""
    name = request.path_params["name"]
    file = static_file(name)
    if file is None:
        raise HTTPException(404, f"no file {name[:60]!r}")
    return FileResponse(file, headers={"Cache-Control": "private, max-age=3600"})


def static_file(name: str) -> Path | None:
    """Find a file that pages load; None where there is none of this name."""
    if name == "plotly.min.js":
        return Path(str(files("plotly") / "package_data" / name))
    folder = Path(str(files("explorer") / "static"))
    return next((each for each in folder.iterdir() if each.name == name), None)


async def _with_headers(request: Request, respond: Callable[[Request], Awaitable[Response]]) -> Response:
    response = await respond(request)
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    if response.headers.get("content-type", "").startswith("text/html"):
        response.headers.setdefault("Cache-Control", "no-store")
    return response


def _failed(site: Site, request: Request, error: Exception) -> Response:
    """Turn an error into a page: 404 for what is not there, 400 for what does not work, 500 for a bug.

    A body that a limit stopped has the status of the limit.
    """
    if isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, RefusedError):
        status, message = error.status, error.message
    elif isinstance(error, UserError):
        status, message = 404 if isinstance(error, NotHereError) else 400, one_line(error)
    else:
        status, message = 500, f"an error in the explorer ({type(error).__name__}): its log says where"
        logger.error("bug: %s\n%s", error, "".join(traceback.format_tb(error.__traceback__)).rstrip())
    response = site.page(
        request, "error.html", title="Not found" if status == 404 else "Error", message=message, status=status
    )
    response.headers.update(HEADERS)
    return response
