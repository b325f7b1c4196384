"""The listening socket of a server, and a uvicorn that stops quietly at a signal and reloads certificates."""

import asyncio
import contextlib
import ctypes
import signal
import socket
import struct
from collections.abc import Iterator
from typing import Any

import uvicorn
import uvloop

from serving.errors import ListenError
from serving.http.limits import limit_writes, protocol_with
from serving.http.security import Credentials
from serving.http.settings import AccessSettings

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


def listen(settings: AccessSettings) -> socket.socket:
    """Open the listening socket. Raises ListenError if the port is taken."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, number)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        limit_writes(listener, settings.read_timeout_s)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as failure:
        raise ListenError(
            f"cannot listen on --host {settings.host} --port {settings.port}: {failure.strerror}; choose another, or "
            "stop the program that listens there"
        ) from None
    return listener


def stop_connecting(listener: socket.socket) -> None:
    """Let the kernel refuse new connections to this socket; those already established can still be accepted.

    Closing the socket instead would reset the connections that wait to be accepted, and lose their requests. A client
    whose SYN is dropped sends it again after a second. Does nothing on a system without such filters.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in _DROP_SYN))
    with contextlib.suppress(OSError):
        listener.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(_DROP_SYN), ctypes.addressof(program))
        )


def url_of(settings: AccessSettings, listener: socket.socket) -> str:
    """Return the address at which the socket listens, with its actual port."""
    host, port = listener.getsockname()[:2]
    return f"{settings.scheme}://[{host}]:{port}" if ":" in host else f"{settings.scheme}://{host}:{port}"


def uvicorn_config(settings: AccessSettings, credentials: Credentials, app: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for an ASGI application."""
    tls = None
    if (context := credentials.context) is not None:
        tls = lambda config, default: context  # noqa: E731
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
        ssl_context_factory=tls,
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

    def __init__(self, config: uvicorn.Config, credentials: Credentials, tls_timeout_s: float) -> None:
        super().__init__(config)
        self._credentials, self._tls_timeout_s = credentials, tls_timeout_s

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer until a signal."""
        with asyncio.Runner(loop_factory=lambda: _TimedLoop(self._tls_timeout_s)) as runner:
            runner.run(self.serve(sockets))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals until the server has stopped, and do not raise them again afterwards."""
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def on_tick(self, counter: int) -> bool:
        """Look for renewed certificates and tokens."""
        if counter % _TICKS_TO_REFRESH == 0:
            self._credentials.refresh()
        return await super().on_tick(counter)
