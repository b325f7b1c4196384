"""What every server of the project shares: its socket, tokens, certificates, log, and a uvicorn that stops quietly.

A token is sent as `Authorization: Bearer TOKEN`; a file may hold several, one per line, so that a new one can be handed
out before the old one is removed. Files are checked before the server listens, so that a wrong one is an error at the
start instead of a failed handshake later, and read again when they change, so that a renewal needs no restart.
"""

import asyncio
import contextlib
import ctypes
import hashlib
import hmac
import logging
import signal
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
import uvicorn
import uvloop
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from featurestore.console.files import problem_of_dates, read_tokens
from featurestore.errors import TokenFileError
from serving.errors import ListenError, ServerSettingsError
from serving.http.limits import limit_writes, protocol_with
from serving.problems import Problem
from serving.settings import AccessSettings

logger = logging.getLogger("serving")
LOOPBACKS = ("127.0.0.1", "::1", "localhost")
OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")
BACKLOG = 2048
KEEP_ALIVE_S = 75
"""Longer than the minute after which proxies close idle connections, so that the server is not the first."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_TICKS_TO_REFRESH = 20
"""Number of ticks, ten per second."""
_SO_ATTACH_FILTER = 26
_DROP_SYN = (
    (0x30, 0, 0, 13),  # load the byte of flags of the TCP header
    (0x54, 0, 0, 0x12),  # keep the bits SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone begins a connection:
    (0x06, 0, 0, 0),  # drop it
    (0x06, 0, 0, 0xFFFFFFFF),  # let everything else through
)
"""A program for the kernel's packet filter (bpf(4)), one instruction per line."""


class TokenGuard:
    """ASGI middleware that answers 401 to requests without one of the tokens, except health checks."""

    def __init__(self, app: ASGIApp, tokens: list[str], on_refusal: Callable[[], None]) -> None:
        """`tokens` may change later."""
        self.app, self._tokens, self._on_refusal = app, tokens, on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._allows(scope):
            self._on_refusal()
            response = error_response(401, Problem.NO_TOKEN.of(), {"WWW-Authenticate": "Bearer", "Connection": "close"})
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, token = sent.partition(b" ")
        return matches_token(token.strip(), self._tokens) and kind.lower() == b"bearer"


def matches_token(token: bytes, tokens: Sequence[str]) -> bool:
    """Return whether the token is one of these, in constant time: all are compared."""
    digest = hashlib.sha256(token).digest()
    fits = [hmac.compare_digest(digest, hashlib.sha256(each.encode()).digest()) for each in tokens]
    return any(fits)


class Credentials:
    """The tokens and the TLS context of a server, read from their files; `refresh` reads changed files again."""

    def __init__(self, settings: AccessSettings) -> None:
        """Read the files. Raises ServerSettingsError, TokenFileError."""
        self._settings = settings
        self._seen = self._look()
        self.tokens = None if settings.token_file is None else read_tokens(settings.token_file)
        """Always the same list, whose tokens change."""
        self.context: ssl.SSLContext | None = None
        """Context of every handshake, which then uses the newest certificate."""
        if settings.tls_cert is not None:
            self.context = self._newest = tls_context(settings.tls_cert, settings.tls_key)
            self.context.sni_callback = self._choose

    def refresh(self) -> None:
        """Read changed files again; if one is wrong, the previous credentials stay in use."""
        seen, settings = self._look(), self._settings
        if seen == self._seen:
            return
        self._seen = seen
        try:
            if settings.tls_cert is not None:
                newest = tls_context(settings.tls_cert, settings.tls_key)
                _warn_of_dates(settings.tls_cert)
                self._newest = newest
            if settings.token_file is not None and self.tokens is not None:
                self.tokens[:] = read_tokens(settings.token_file)
        except (ServerSettingsError, TokenFileError) as error:
            logger.error("the previous certificate and tokens stay in use: %s", error)
            return
        logger.info("read certificate and tokens again, as a file of them has changed")

    def _choose(self, connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._newest

    def _look(self) -> list[tuple[Path, int, int, int]]:
        """Return inode, size and time of each file that can be read, to detect changes."""
        seen = []
        for file in (self._settings.token_file, self._settings.tls_cert, self._settings.tls_key):
            with contextlib.suppress(OSError):
                if file is not None:
                    found = file.stat()
                    seen.append((file, found.st_ino, found.st_size, found.st_mtime_ns))
        return seen


def check_files(settings: AccessSettings) -> None:
    """Check the files of tokens, certificate and key before the server listens.

    Raises ServerSettingsError, TokenFileError."""
    Credentials(settings)
    if settings.token_file is not None and settings.token_file.stat().st_mode & 0o004:
        logger.warning("every user of this machine can read %s: run chmod 600 on it", settings.token_file)
    if settings.tls_cert is not None:
        _warn_of_dates(settings.tls_cert)
    elif settings.tls_key is not None:
        raise ServerSettingsError(Problem.KEY_WITHOUT_CERTIFICATE)
    if settings.host not in LOOPBACKS and settings.token_file is None:
        logger.warning("no --token-file on %s: everyone who can reach this server can use it", settings.host)
    if settings.host not in LOOPBACKS and settings.tls_cert is None:
        logger.warning("no TLS on %s: requests can be read on the network", settings.host)


def tls_context(cert: Path, key: Path | None) -> ssl.SSLContext:
    """Create the server's TLS context from a certificate chain and its key, both PEM. Raises ServerSettingsError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except OSError as failure:  # of TLS too
        reason = getattr(failure, "reason", None) or failure.strerror or failure
        files = f"--tls-cert {cert}" + (f" --tls-key {key}" if key else "")
        raise ServerSettingsError(Problem.UNUSABLE_PEM, files, reason) from None
    return context


def _no_password() -> str:
    raise OSError("the key has a password")


def _warn_of_dates(file: Path) -> None:
    if problem := problem_of_dates(file):
        logger.warning("%s", problem)


def listen(settings: AccessSettings, option: str = "port") -> socket.socket:
    """Open a listening socket on the port that an option has. Raises ListenError if it is taken."""
    port = getattr(settings, option)
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            settings.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, number)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        limit_writes(listener, settings.read_timeout_s)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as failure:
        place = f"--host {settings.host} --{option.replace('_', '-')} {port}"
        raise ListenError(Problem.CANNOT_LISTEN, place, failure.strerror) from None
    return listener


def stop_connecting(listener: socket.socket) -> None:
    """Let the kernel refuse new connections to this socket; those already established can still be accepted.

    Closing the socket instead would reset the connections that wait to be accepted, and lose their requests. A client
    whose SYN is dropped sends it again after a second. Does nothing on a system without such filters.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in _DROP_SYN))
    packed = struct.pack("HP", len(_DROP_SYN), ctypes.addressof(program))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, packed)


def url_of(settings: AccessSettings, listener: socket.socket) -> str:
    """Return the address at which the socket listens, with its actual port."""
    scheme, (host, port, *_) = "http" if settings.tls_cert is None else "https", listener.getsockname()
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def uvicorn_config(settings: AccessSettings, credentials: Credentials | None, app: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for an ASGI application; without credentials it has no TLS."""
    context = credentials and credentials.context
    return uvicorn.Config(
        app,
        http=protocol_with(settings.read_timeout_s),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.drain_s,
        ssl_context_factory=(lambda config, default: context) if context else None,
    )


class _TimedLoop(uvloop.Loop):
    """uvloop's event loop, whose servers end TLS handshakes and closings that take too long.

    Uvicorn has no setting for these timeouts, and uvloop's are 60 and 30 s.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self._timeouts = {"ssl_handshake_timeout": timeout_s, "ssl_shutdown_timeout": timeout_s}

    async def create_server(self, *arguments: Any, **options: Any) -> asyncio.AbstractServer:  # type: ignore[override]
        if options.get("ssl") is not None:
            options |= self._timeouts
        return await super().create_server(*arguments, **options)


class SecuredServer(uvicorn.Server):
    """Uvicorn's server that reloads renewed certificates and tokens, and ends quietly after a signal."""

    def __init__(self, settings: AccessSettings, credentials: Credentials, app: ASGIApp) -> None:
        super().__init__(uvicorn_config(settings, credentials, app))
        self._credentials, self._tls_timeout_s = credentials, settings.read_timeout_s

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer until a signal."""
        with asyncio.Runner(loop_factory=lambda: _TimedLoop(self._tls_timeout_s)) as runner:
            runner.run(self.serve(sockets))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals until the server has stopped, and do not raise them again afterwards."""
        with signals_handled(self.handle_exit):
            yield

    async def on_tick(self, counter: int) -> bool:
        """Look for renewed certificates and tokens."""
        if counter % _TICKS_TO_REFRESH == 0:
            self._credentials.refresh()
        return await super().on_tick(counter)


@contextlib.contextmanager
def signals_handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGTERM and SIGINT by this function until the end of the block."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Make an answer of JSON."""
    return Response(orjson.dumps(value), status, headers=dict(headers or {}), media_type="application/json")


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Make the answer of an error."""
    return json_response({"error": message, "status": status}, status, headers)


def configure_logging(*others: str) -> None:
    """Send the logs of the server and of `others`, and uvicorn's warnings, to stderr, with the time in UTC."""
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(process)d %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    for name in ("serving", *others, "uvicorn"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.WARNING if name == "uvicorn" else logging.INFO)
