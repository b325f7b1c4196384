"""Clients that are slow, never read, send too much, or are a thousand: a real server process with a fake model."""

import json
import socket
import time
from collections.abc import Iterator

import pytest

from tests.serving.http.fakes import write_state
from tests.serving.http.processes import ServerProcess, fake_server, post_head

pytestmark = pytest.mark.services

ONE = json.dumps({"candidates": {"ad_item": [1, 2]}}).encode()
MANY = json.dumps({"candidates": {"ad_item": list(range(9_000))}}).encode()
READ_TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("connections")
    with fake_server(write_state(folder, version=3), folder, read_timeout_s=READ_TIMEOUT_S, max_body_mb=1.0) as server:
        yield server


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


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


@pytest.mark.parametrize("sent", [b"", b"POST /v1/sc", post_head(100)[:-10]], ids=["nothing", "line", "headers"])
def test_a_client_whose_headers_do_not_come_is_closed(server: ServerProcess, sent: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(sent)
        assert is_answering(server)
        start_s = time.monotonic()
        assert read_all(connection) == b""
        assert time.monotonic() - start_s < READ_TIMEOUT_S + 5


def test_a_client_whose_next_headers_do_not_come_is_closed(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(post_head(len(ONE)) + ONE)
        assert read_answer(connection).startswith(b"HTTP/1.1 200")
        connection.sendall(b"POST /v1/sc")
        assert read_all(connection) == b""


def test_a_client_whose_body_comes_too_slowly_gets_408(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(post_head(100))
        for _ in range(30):
            try:
                connection.sendall(b" ")
            except ConnectionError:
                break
            time.sleep(0.1)
        assert read_all(connection).startswith(b"HTTP/1.1 408")
    assert is_answering(server)


def test_a_client_that_goes_away_in_its_body_is_no_error_of_the_server(server: ServerProcess) -> None:
    for _ in range(20):
        with server.connect() as connection:
            connection.sendall(post_head(100) + b"{")
    assert is_answering(server)
    assert "bug" not in server.log()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_gigabyte_is_refused_without_being_read(server: ServerProcess, chunked: bool) -> None:
    before_mb = server.memory_mb()
    head = post_head(10**9)
    if chunked:
        head = head.replace(b"Content-Length: 1000000000", b"Transfer-Encoding: chunked")
    part = b"%x\r\n%s\r\n" % (1 << 16, b" " * (1 << 16)) if chunked else b" " * (1 << 16)
    sent = 0
    with server.connect() as connection:
        connection.sendall(head)
        try:
            while sent < 10**9:
                sent += connection.send(part)
        except ConnectionError:
            pass
    assert sent < 50e6
    assert server.memory_mb() - before_mb < 50
    with server.connect() as connection:  # one that waits for the answer gets it
        connection.sendall(head if not chunked else head + part * 20)
        assert b"413" in connection.recv(100)
    assert is_answering(server)


def test_a_client_that_never_reads_is_closed_and_holds_up_nobody(server: ServerProcess) -> None:
    before_mb = server.memory_mb()
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        request, sent = post_head(len(MANY)) + MANY, 0
        deadline = time.monotonic() + 30
        closed = False
        while not closed and time.monotonic() < deadline:
            try:
                sent += connection.send(request[sent % len(request) :])
            except BlockingIOError:
                time.sleep(0.05)
            except ConnectionError:
                closed = True
        assert closed
    assert server.memory_mb() - before_mb < 50
    assert is_answering(server)


def test_a_thousand_connections_are_kept_and_answered(server: ServerProcess) -> None:
    connections: list[socket.socket] = []
    try:
        for _ in range(1_000):
            connections.append(server.connect())
            connections[-1].sendall(post_head(len(ONE)) + ONE)
            assert read_answer(connections[-1]).startswith(b"HTTP/1.1 200")
        assert is_answering(server)
        for connection in connections:
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: scorer\r\n\r\n")
        assert all(read_answer(connection).startswith(b"HTTP/1.1 200") for connection in connections)
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.parametrize(
    "text", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\0" * 1000, b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_no_http_is_refused(server: ServerProcess, text: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(text)
        assert b"200" not in read_all(connection)[:30]
    assert is_answering(server)


def test_two_requests_at_once_on_a_connection_are_answered_in_order(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(b"".join(post_head(len(body)) + body for body in (ONE, b"{", ONE)))
        codes = []
        found = b""
        while found.count(b"HTTP/1.1") < 3 or not found.endswith(b"}"):
            found += connection.recv(1 << 16)
        codes = [part[:3] for part in found.split(b"HTTP/1.1 ")[1:]]
        assert codes == [b"200", b"400", b"200"]
