"""Limits of a connection: how much a client may send, and how long it may take to send and to read.

`LimitedProtocol` limits request lines, headers and chunk lines, `BodyLimits` the bodies; docs/SECURITY.md has the table
of all limits. The kernel ends clients that do not read their answer: TCP_USER_TIMEOUT closes their connections.
"""

import asyncio
import resource
import socket

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.errors import ServingError
from serving.problems import Problem

BODIES_AT_ONCE = 16
"""Bodies of the largest size that may be in memory at the same time, in each worker."""
SMALL_BYTES = 64_000
"""A body up to this size is always read. A larger one has to bring as many bytes in each step."""
STEPS = 6
"""Steps of the time for a body."""
MAX_HEAD_BYTES = 64_000
"""Bytes of request line and headers together; and of chunk lines and trailers, above a sixteenth of the body."""
MAX_HEADERS = 100
MAX_PIPELINED = 16
"""Pipelined requests of a connection, which wait for the answers to earlier ones."""
MAX_CHUNKS = 1_000
"""Chunks of a body, plus one for each `CHUNK_BYTES` of it."""
CHUNK_BYTES = 256
CLOSE, AGAIN = {"Connection": "close"}, {"Retry-After": "1"}


class RefusedError(ServingError):
    """An HTTP error that ends a request, with a status, one message for the client, and headers."""

    def __init__(self, status: int, problem: Problem, *values: object, **headers: str) -> None:
        super().__init__(problem, *values)
        self.status, self.headers = status, headers


class BodyLimits:
    """ASGI middleware that limits size, time and rate of each body, and the bytes of all bodies being read.

    The application gets a RefusedError while it reads: 400 (the client left), 408, 413 or 503. If all bodies together
    exceed their limit, the slowest one is refused: the one that has waited longest for its last `SMALL_BYTES`,
    preferring larger bodies. So neither a new nor a fast one is refused.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_held_bytes: int, timeout_s: float, way_out: str) -> None:
        """`way_out`: advice for the client of a body over `max_bytes`."""
        self.app, self.max_bytes, self.timeout_s, self.way_out = app, max_bytes, timeout_s, way_out
        self._max_held_bytes, self._held_bytes = max_held_bytes, 0
        self._uploads: set[_Upload] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        upload = _Upload(self, scope, receive)
        try:
            await self.app(scope, upload.receive, send)
        except RefusedError as error:  # the application did not handle it
            await PlainTextResponse(str(error), error.status, error.headers)(scope, receive, send)
        finally:
            self.release(upload)

    def hold(self, upload: "_Upload", num_bytes: int) -> None:
        """Count the next bytes of a body; refuse the slowest body if all together have too many."""
        self._held_bytes += num_bytes
        self._uploads.add(upload)
        while self._held_bytes > self._max_held_bytes:
            slowest = min(self._uploads, key=lambda each: (each.size_bytes <= SMALL_BYTES, each.step_s))
            self.release(slowest)
            slowest.refuse()

    def release(self, upload: "_Upload") -> None:
        """Stop counting a body."""
        if upload in self._uploads:
            self._uploads.remove(upload)
            self._held_bytes -= upload.size_bytes


class _Upload:
    """A body that is being received."""

    def __init__(self, limits: BodyLimits, scope: Scope, receive: Receive) -> None:
        self._limits, self._scope, self._receive = limits, scope, receive
        self._loop = asyncio.get_running_loop()
        self._begin_s = self.step_s = self._loop.time()
        self._timeout: asyncio.Timeout | None = None
        self._is_whole = self._is_refused = False
        self.size_bytes = 0

    async def receive(self) -> Message:
        """Receive the next part. Raises RefusedError."""
        if self._is_whole:  # the next message says that the client left
            return await self._receive()
        if self.size_bytes == 0:
            announced = next((value for name, value in self._scope["headers"] if name == b"content-length"), b"0")
            if announced.isdigit() and int(announced[:20]) > self._limits.max_bytes:
                raise self._too_large(announced[:20].decode())
        try:
            async with asyncio.timeout_at(self._deadline_s()) as self._timeout:
                message = await self._receive()
        except TimeoutError:
            raise self._error() from None
        finally:
            self._timeout = None
        if self._is_refused:
            raise self._error()
        if message["type"] != "http.request":
            raise RefusedError(400, Problem.CLIENT_LEFT)
        self._is_whole = not message.get("more_body", False)
        if self._is_whole:
            self._limits.release(self)
        self._count(len(message.get("body", b"")))
        return message

    def refuse(self) -> None:
        """Make `receive` raise the error of too many bodies, at once if it is waiting."""
        self._is_refused = True
        if self._timeout is not None:
            self._timeout.reschedule(self._loop.time())

    def _count(self, num_bytes: int) -> None:
        before, self.size_bytes = self.size_bytes, self.size_bytes + num_bytes
        if self.size_bytes // SMALL_BYTES > before // SMALL_BYTES:
            self.step_s = self._loop.time()
        if not self._is_whole:
            self._limits.hold(self, num_bytes)
        if self._is_refused:
            raise self._error()
        if self.size_bytes > self._limits.max_bytes:
            raise self._too_large(f"over {self._limits.max_bytes:,}")

    def _deadline_s(self) -> float:
        end_s = self._begin_s + self._limits.timeout_s
        if self.size_bytes <= SMALL_BYTES:
            return end_s
        return min(end_s, self.step_s + self._limits.timeout_s / STEPS)

    def _error(self) -> RefusedError:
        if self._is_refused:
            return RefusedError(503, Problem.SLOWEST_BODY, **CLOSE, **AGAIN)
        timeout_s = self._limits.timeout_s
        if self._deadline_s() < self._begin_s + timeout_s:
            return RefusedError(408, Problem.SLOW_BODY, SMALL_BYTES, timeout_s / STEPS, **CLOSE)
        return RefusedError(408, Problem.LATE_BODY, timeout_s, **CLOSE)

    def _too_large(self, size: str) -> RefusedError:
        return RefusedError(413, Problem.OVER_MAX_BYTES, size, self._limits.max_bytes, self._limits.way_out, **CLOSE)


class LimitedProtocol(HttpToolsProtocol):
    """Uvicorn's protocol with limits on everything but bodies, and a timeout for connections without a request.

    Uvicorn itself only closes connections that are silent after an answer (timeout_keep_alive). httptools joins the
    parts of a header without a limit, so bytes are counted here as they arrive.
    """

    headers_timeout_s = 30.0
    _deadline: asyncio.TimerHandle | None = None
    _in_body = False
    _keeps_alive = True
    _num_chunks = _body_bytes = 0
    _framing_bytes = 0
    """Bytes received of the current head, or around the chunks of the current body."""
    _head_bytes = 0
    """Bytes of the parsed head, which may arrive in one read."""
    _refusal: tuple[int, str] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer complete requests after the client has ended its sending, then close. TLS has no half-open state."""
        if self._in_body or not self._is_answering() or self.scheme == "https":
            return False
        self.cycle.keep_alive = False
        return True

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        self._framing_bytes += len(data)
        super().data_received(data)
        if self._refusal is not None:
            return
        if self._framing_bytes > MAX_HEAD_BYTES:
            self._refusal = 431, Problem.OVER_MAX_HEAD_BYTES.of(MAX_HEAD_BYTES)
            self._refuse()
        elif self._framing_bytes and not self._in_body and self._deadline is None:
            self._arm()  # for empty lines, which are not a request

    def send_400_response(self, msg: str) -> None:
        """Answer a request that httptools could not parse, or that a limit below has stopped."""
        self._refusal = self._refusal or (400, msg)
        self._refuse()

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(400, Problem.OVER_MAX_PIPELINED, MAX_PIPELINED)
        self._arm()
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + len(b": \r\n"))
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._stop(431, Problem.OVER_MAX_HEADERS, MAX_HEADERS)

    def on_headers_complete(self) -> None:
        self._disarm()
        super().on_headers_complete()
        self._in_body = True
        self._num_chunks = self._body_bytes = self._framing_bytes = 0
        # Only a connection whose request is complete is kept alive: unread bytes would hold it open for ever.
        self._keeps_alive = self.cycle.keep_alive
        self.cycle.keep_alive = False

    def on_chunk_header(self) -> None:
        """Count a chunk; called by httptools, uvicorn does not define it."""
        self._num_chunks += 1
        if self._num_chunks > MAX_CHUNKS + self._body_bytes // CHUNK_BYTES:
            self._stop(400, Problem.OVER_MAX_CHUNKS, MAX_CHUNKS, CHUNK_BYTES)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._framing_bytes = max(0, self._framing_bytes - len(body) - len(body) // 16)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        self._framing_bytes = 0
        self.cycle.keep_alive = self._keeps_alive
        super().on_message_complete()

    def on_response_complete(self) -> None:
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last and self._refusal is not None and not self.transport.is_closing():
            self._refuse()

    def shutdown(self) -> None:
        self._keeps_alive = False
        super().shutdown()

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            self._stop(431, Problem.OVER_MAX_HEAD_BYTES, MAX_HEAD_BYTES)

    def _stop(self, status: int, problem: Problem, *values: object) -> None:
        """Stop httptools; `send_400_response` follows."""
        self._refusal = status, problem.of(*values)
        raise ValueError(problem)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self) -> None:
        """Send the refusal after the answers to all earlier requests, and close."""
        assert self._refusal is not None
        self._disarm()
        self.flow.read_paused = False  # so that reading is not resumed
        self.transport.pause_reading()
        if self._is_answering() and not self._in_body:
            return  # on_response_complete calls this again
        is_of_another = self._in_body and (self.pipeline or self.cycle.response_started)
        if not is_of_another:  # the client would take it for this answer
            status, message = self._refusal
            text = f"content-type: text/plain; charset=utf-8\r\ncontent-length: {len(message)}\r\nconnection: close\r\n"
            self.transport.write(b"".join([STATUS_LINE[status], text.encode(), b"\r\n", message.encode()]))
        self.transport.close()

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


def protocol_with(headers_timeout_s: float) -> type[LimitedProtocol]:
    """Return a protocol class with this timeout, as uvicorn creates its protocols without our arguments."""
    return type("LimitedProtocol", (LimitedProtocol,), {"headers_timeout_s": headers_timeout_s})


def limit_writes(listener: socket.socket, timeout_s: float) -> None:
    """Let the kernel close connections of this socket whose client has not read sent data for this time."""
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(timeout_s * 1000))


def allow_connections() -> None:
    """Raise this process's limit of open files, which include connections, to the allowed maximum."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
