"""Limits of a connection: how large a body may be, and how long a client may take to send and to read.

A body is refused at its first byte over the limit, or before any byte where its length was announced. A connection
whose request line and headers do not come in time is closed by a timer (`TimedProtocol`). A client that never reads
its answer is left to the kernel: TCP_USER_TIMEOUT closes a connection that has taken nothing for so long.
"""

import asyncio
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

WAY_OUT = "send fewer requests or candidates at a time, or let the server take more by --max-body-mb"
BODIES_AT_ONCE = 16
"""Full bodies that may be in memory at one time, in each worker."""
CLOSE = {"Connection": "close"}


class RefusedError(Exception):
    """An HTTP error that ends a request: `status`, one message for the client, and headers."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


@dataclass
class BodyReader:
    """Reads bodies within the limits; counts the bytes of all that are being read, so that memory has a bound."""

    max_bytes: int
    timeout_s: float
    held_bytes: int = 0

    async def read(self, request: Request) -> bytes:
        """Read a request's whole body. Raises RefusedError: 408, 411, 413, 415 or 503."""
        if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
            raise RefusedError(415, f"Content-Encoding is {encoding[:40]!r}: send the body uncompressed", CLOSE)
        announced = request.headers.get("content-length", "0")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > self.max_bytes:
            raise self._too_large(f"{announced[:20]} bytes")
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._read(request)
        except TimeoutError:
            raise RefusedError(
                408, f"the body did not come within {self.timeout_s:g} s: send it at once", CLOSE
            ) from None

    async def _read(self, request: Request) -> bytes:
        parts: list[bytes] = []
        size = 0
        try:
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                self.held_bytes += len(part)
                if size > self.max_bytes:
                    raise self._too_large(f"over {self.max_bytes:,} bytes")
                if self.held_bytes > BODIES_AT_ONCE * self.max_bytes:
                    raise RefusedError(
                        503, "too many large bodies are being read: try again", CLOSE | {"Retry-After": "1"}
                    )
        except ClientDisconnect:
            raise RefusedError(400, "the client closed the connection before the end of the body") from None
        finally:
            self.held_bytes -= size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_large(self, size: str) -> RefusedError:
        return RefusedError(413, f"the body has {size}; this server takes at most {self.max_bytes:,}: {WAY_OUT}", CLOSE)


class TimedProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, which also closes connections whose next request does not come in time.

    Uvicorn itself ends only those that are silent after an answer (timeout_keep_alive).
    """

    headers_timeout_s = 30.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def on_message_begin(self) -> None:
        self._arm()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._disarm()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(self.headers_timeout_s, self._close)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()


def protocol_with(headers_timeout_s: float) -> type[TimedProtocol]:
    """Make the protocol class with this timeout: uvicorn makes its protocols without arguments of ours."""
    return type("TimedProtocol", (TimedProtocol,), {"headers_timeout_s": headers_timeout_s})


def limit_writes(listener: socket.socket, timeout_s: float) -> None:
    """Let the kernel close connections of this socket that take nothing of what was sent for so long."""
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(timeout_s * 1000))


def allow_connections() -> None:
    """Raise this process's limit of open files, which connections are, to the most that it may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
