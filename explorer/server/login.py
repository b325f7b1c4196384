"""Who may look: with a file of tokens, anyone who sends one of them as the scorer wants it, or has typed it once."""

import hashlib
import hmac
import secrets
from urllib.parse import urlsplit

from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from explorer.html.site import Site
from explorer.server.app import HEADERS
from serving.http.security import LOOPBACKS, is_among

LOGIN, COOKIE = "/login", "explorer"
_STAYS_S = 12 * 3600


class HostGuard:
    """ASGI middleware that answers only to the names that the server is known by, and to its own forms.

    So a page of another site cannot reach a server on loopback by a name of its own (DNS rebinding), nor send it
    a form.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] | None) -> None:
        """`hosts`: names without ports; None where the server listens on all addresses and may have any name."""
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        host = request.headers.get("host", "")
        if self._hosts is not None and (urlsplit(f"//{host}").hostname or "") not in self._hosts:
            await _refused(400, "this server is not known by that name")(scope, receive, send)
        elif request.method != "GET" and not _is_own(request.headers.get("origin"), host):
            await _refused(403, "a form of another site")(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class LoginGuard:
    """ASGI middleware that lets in who sends a token as `Authorization: Bearer`, or has a cookie of a typed one."""

    def __init__(self, app: ASGIApp, site: Site, tokens: list[str], *, secure: bool) -> None:
        """`tokens` may change later. `secure`: the server has TLS, and so has the cookie."""
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
            await _refused(401, "no valid token", headers)(scope, receive, send)

    def _allows(self, request: Request) -> bool:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and is_among(token.strip().encode(), self._tokens):
            return True
        cookie = request.cookies.get(COOKIE, "")
        return is_among(cookie.encode(), [self._cookie(token) for token in self._tokens])

    def _cookie(self, token: str) -> str:
        """What the browser keeps: worthless to another server, and after this one has ended."""
        return hmac.new(self._secret, token.encode(), hashlib.sha256).hexdigest()

    async def _login(self, request: Request) -> Response:
        if request.method != "POST":
            return self._form(request, 200, "")
        try:
            async with request.form(max_files=0, max_fields=1) as form:
                token = str(form.get("token", "")).strip()
        except MultiPartException:
            token = ""
        if not is_among(token.encode(), self._tokens):
            return self._form(request, 401, "That is none of the server's tokens.")
        answer = RedirectResponse("/", 303, headers=HEADERS)
        answer.set_cookie(
            COOKIE, self._cookie(token), max_age=_STAYS_S, httponly=True, samesite="strict", secure=self._secure
        )
        return answer

    def _form(self, request: Request, status: int, problem: str) -> HTMLResponse:
        form = self._site.page(request, "login.html", title="Token", status=status, problem=problem)
        form.headers.update(HEADERS)
        return form


def names_of(host: str) -> tuple[str, ...] | None:
    """List the names by which a server on this address may be asked; None: any, as it listens on all addresses."""
    if host in ("0.0.0.0", "::"):
        return None
    return (*LOOPBACKS, host.lower()) if host in LOOPBACKS else (host.lower(),)


def _is_own(origin: str | None, host: str) -> bool:
    """Tell whether a form is of a page of this server. Programs that are no browsers send no origin."""
    return origin is None or urlsplit(origin).netloc == host


def _refused(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return Response(message, status, headers=HEADERS | (headers or {}), media_type="text/plain")
