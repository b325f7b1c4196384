"""Clients that are slow, never read, send too much, or are a thousand: a real server process with a fake model."""

import asyncio
import contextlib
import json
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from serving.http.limits import SMALL_BYTES, limit_writes, protocol_with
from serving.problems import Problem
from tests.explorer.serving import in_thread
from tests.raised import told
from tests.serving.http.fakes import write_state
from tests.serving.http.processes import CHUNKED, ServerProcess, codes_of, fake_server, post_head, read_all

pytestmark = pytest.mark.services

ONE = json.dumps({"candidates": {"ad_item": [1, 2]}}).encode()
MANY = json.dumps({"candidates": {"ad_item": list(range(9_000))}}).encode()
READ_TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("connections")
    with fake_server(write_state(folder, version=3), folder, read_timeout_s=READ_TIMEOUT_S, max_body_mb=1.0) as server:
        yield server


def read_answer(connection: socket.socket) -> bytes:
    """One answer of a connection that stays open."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += connection.recv(1 << 16)
    head, _, body = found.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(1 << 16)
    return head + b"\r\n\r\n" + body


def is_answering(server: ServerProcess) -> bool:
    start_s = time.monotonic()
    answer = server.client.post("/v1/score", content=ONE)
    return answer.status_code == 200 and time.monotonic() - start_s < 5


@pytest.mark.parametrize(
    ("answered", "sent"),
    [(0, b""), (0, b"POST /v1/sc"), (0, post_head(100)[:-10]), (1, b"POST /v1/sc"), (1, b"\r\n")],
    ids=["nothing", "line", "headers", "next line", "next empty line"],
)
def test_a_client_whose_headers_do_not_come_is_closed(server: ServerProcess, answered: int, sent: bytes) -> None:
    with server.connect() as connection:
        for _ in range(answered):
            connection.sendall(post_head(len(ONE)) + ONE)
            assert read_answer(connection).startswith(b"HTTP/1.1 200")
        connection.sendall(sent)
        assert is_answering(server)
        start_s = time.monotonic()
        assert read_all(connection) == b""
        assert time.monotonic() - start_s < READ_TIMEOUT_S + 5


def test_a_client_whose_body_comes_too_slowly_gets_408(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(post_head(100))
        with contextlib.suppress(ConnectionError):
            for _ in range(30):
                connection.sendall(b" ")
                time.sleep(0.1)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408") and Problem.LATE_BODY.of(READ_TIMEOUT_S).encode() in answer
    assert is_answering(server)


def test_a_client_that_goes_away_in_its_body_is_no_error_of_the_server(server: ServerProcess) -> None:
    for _ in range(20):
        with server.connect() as connection:
            connection.sendall(post_head(100) + b"{")
    assert is_answering(server)
    assert "bug" not in server.log()


def test_a_head_within_its_limits_is_answered(server: ServerProcess) -> None:
    headers = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 630) for number in range(100))
    assert 63_000 < len(headers) < 64_000
    with server.connect() as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\n" + headers + b"\r\n")
        assert read_answer(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("line", "code"), [(b"GET /v2/health/live", 200), (b"POST /nowhere", 404), (b"PUT /v1/score", 405)]
)
@pytest.mark.parametrize("length", [b"Content-Length: 1000000", b"Transfer-Encoding: chunked"])
def test_an_unread_body_ends_the_connection(server: ServerProcess, line: bytes, code: int, length: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(line + b" HTTP/1.1\r\n" + length + b"\r\n\r\n")
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 %d" % code)
        assert b"connection: close" in answer


def test_a_small_body_that_no_route_reads_keeps_the_connection(server: ServerProcess) -> None:
    with server.connect() as connection:
        for _ in range(2):
            connection.sendall(b"PUT /v1/score HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
            assert read_answer(connection).startswith(b"HTTP/1.1 405")


@pytest.mark.parametrize("bodies", [[ONE], [ONE, b"{", ONE]], ids=["one", "three"])
def test_a_client_that_ends_its_sending_gets_its_answers_in_order(server: ServerProcess, bodies: list[bytes]) -> None:
    with server.connect() as connection:
        connection.sendall(b"".join(post_head(len(body)) + body for body in bodies))
        connection.shutdown(socket.SHUT_WR)
        assert codes_of(connection) == [b"200" if body == ONE else b"400" for body in bodies]


@pytest.mark.parametrize(
    ("rest", "code"),
    [(b"\0" * 100, b"400"), (b"GET /" + b"a" * 70_000, b"431"), (b"GET /v2 HTTP/1.1\r\n\r\n" * 1_000, b"400")],
    ids=["no HTTP", "too large", "too many"],
)
def test_a_refusal_behind_requests_waits_for_their_answers(server: ServerProcess, rest: bytes, code: bytes) -> None:
    with server.connect() as connection:
        connection.sendall((post_head(len(ONE)) + ONE) * 3 + rest)
        codes = codes_of(connection)
        assert (codes[:3], codes[-1]) == ([b"200"] * 3, code)
        assert len(codes) < 20


@pytest.mark.parametrize("count", [1, 2])
def test_a_refused_connection_is_read_no_more(count: int) -> None:
    may_answer = threading.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # by which uvicorn lets the connection be read
        await asyncio.to_thread(may_answer.wait, 30)
        await PlainTextResponse("late")(scope, receive, send)

    sent = 0
    with ExitStack() as stack:
        url = stack.enter_context(in_thread(slow, http=protocol_with(30.0), lifespan="off"))
        address = "127.0.0.1", int(url.rpartition(":")[2])
        connection = stack.enter_context(socket.create_connection(address, timeout=1))
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n" * count + b"\0" * 100)
        with pytest.raises(TimeoutError):
            while sent < 50e6:
                sent += connection.send(b"a" * 100_000)
        may_answer.set()
        codes = codes_of(connection)
    assert codes == [b"200"] * count + [b"400"]


@pytest.mark.parametrize(("size", "count", "code"), [(1, 2_000, 400), (1, 900, 200), (300, 2_500, 200)])
def test_a_body_of_many_tiny_chunks_is_refused(server: ServerProcess, size: int, count: int, code: int) -> None:
    with server.connect() as connection:
        chunk = b"%x\r\n%s\r\n" % (size, b" " * size)
        connection.sendall(CHUNKED + chunk * count + b"%x\r\n%s\r\n0\r\n\r\n" % (len(ONE), ONE))
        assert read_answer(connection).startswith(b"HTTP/1.1 %d" % code)


def test_small_bodies_pass_and_the_slowest_large_one_is_refused(tmp_path: Path) -> None:
    """Sixteen clients send a body less two bytes each: all that may be in memory. A small one has waited longer."""
    with fake_server(write_state(tmp_path, version=3), tmp_path, max_body_mb=1.0) as server, ExitStack() as stack:
        small = stack.enter_context(server.connect())
        small.sendall(post_head(len(ONE)) + ONE[:-1])
        slow = [stack.enter_context(server.connect()) for _ in range(16)]
        for connection in slow:
            connection.sendall(post_head(1_000_000) + b" " * 999_998)
        assert all(is_answering(server) for _ in range(3))
        large = ONE + b" " * (900_000 - len(ONE))
        assert server.client.post("/v1/score", content=large).status_code == 200
        refused, _, _ = select.select(slow, [], [], 1)
        assert [read_all(connection)[:12] for connection in refused] == [b"HTTP/1.1 503"]
        steady = stack.enter_context(server.connect())  # takes longer than what has to bring 64,000 bytes
        steady.sendall(post_head(700_000 + len(ONE)))
        for _ in range(7):
            steady.sendall(b" " * 100_000)
            time.sleep(0.9)
        steady.sendall(ONE)
        assert read_answer(steady).startswith(b"HTTP/1.1 200")
        for connection in set(slow) - set(refused):  # by far sooner than the time for a body
            assert re.search(told(Problem.SLOW_BODY, size=SMALL_BYTES).encode(), read_all(connection))
        small.sendall(ONE[-1:])
        assert read_answer(small).startswith(b"HTTP/1.1 200")


def test_of_too_many_small_bodies_the_slowest_is_refused(tmp_path: Path) -> None:
    """Twenty clients hold more than sixteen full bodies; none of them is over the size that is always read."""
    with fake_server(write_state(tmp_path, version=3), tmp_path, max_body_mb=0.06) as server, ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(20)]
        for connection in slow:
            connection.sendall(post_head(60_000) + b" " * 50_000)
        assert is_answering(server)
        refused, _, _ = select.select(slow, [], [], 1)
        assert [read_all(connection)[:12] for connection in refused] == [b"HTTP/1.1 503"]


def test_a_client_that_never_reads_is_closed_and_holds_up_nobody(server: ServerProcess) -> None:
    before_mb = server.memory_mb()
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        request, sent, deadline = post_head(len(MANY)) + MANY, 0, time.monotonic() + 30
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                sent += connection.send(request[sent % len(request) :])
    assert server.memory_mb() - before_mb < 50
    assert is_answering(server)


def test_a_thousand_connections_are_kept_and_answered(server: ServerProcess) -> None:
    with ExitStack() as stack:
        connections = list[socket.socket]()
        for _ in range(1_000):
            connections.append(stack.enter_context(server.connect()))
            connections[-1].sendall(post_head(len(ONE)) + ONE)
            assert read_answer(connections[-1]).startswith(b"HTTP/1.1 200")
        assert is_answering(server)
        for connection in connections:
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: scorer\r\n\r\n")
        assert all(read_answer(connection).startswith(b"HTTP/1.1 200") for connection in connections)


def test_the_kernel_ends_a_client_that_reads_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        limit_writes(listener, 0.5)
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as connection:
            connection.settimeout(20)
            with pytest.raises(TimeoutError, match="Connection timed out"):
                while True:
                    connection.sendall(bytes(1 << 20))
