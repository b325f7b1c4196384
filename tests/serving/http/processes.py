"""Real server processes on loopback, and raw connections to them."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from tests.cli import wait_until

ROOT = Path(__file__).parents[3]
FoundT = TypeVar("FoundT")
START_TIMEOUT_S = 120
LISTENING = re.compile(r"(?:listening on|open) (https?)://([\w.:\[\]]+):(\d+)/? ")


class ServerProcess:
    """A server in a process of its own, with its log in a file."""

    def __init__(self, command: list[str], folder: Path, verify: Any = True) -> None:
        self._log = folder / f"server-{time.monotonic_ns()}.log"
        search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env={**os.environ, "PYTHONPATH": search})
        self.scheme, self.host, port = self.wait_until(lambda: LISTENING.search(self.log())).groups()
        self.port = int(port)
        self.url = f"{self.scheme}://{self.host}:{self.port}"
        self.client = httpx2.Client(base_url=self.url, verify=verify, timeout=30)

    def log(self) -> str:
        return self._log.read_text()

    def wait_until(self, holds: Callable[[], FoundT | None]) -> FoundT:
        """Wait until something is so, as long as the process runs; gives what was found."""
        return wait_until(holds, self.log, START_TIMEOUT_S, self.process, 0.02)

    def wait_until_ready(self) -> None:
        self.wait_until(self._is_ready)

    def wait_for(self, words: str, count: int = 1) -> None:
        """Wait until the log has these words so many times."""
        self.wait_until(lambda: self.log().count(words) >= count)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=30)

    def memory_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def _is_ready(self) -> bool:
        with contextlib.suppress(httpx2.TransportError):
            return self.client.get("/v2/health/ready").status_code == 200
        return False


@contextlib.contextmanager
def fake_server(
    state: Path, folder: Path, verify: Any = True, ready: bool = True, **settings: Any
) -> Iterator[ServerProcess]:
    """A server that answers with the fake model of a state file."""
    words = [f"{name}={value!r}" for name, value in settings.items()]
    command = [sys.executable, "-m", "tests.serving.http.fakes", str(state), *words]
    with ended(ServerProcess(command, folder, verify)) as server:
        if ready:
            server.wait_until_ready()
        yield server


@contextlib.contextmanager
def ended(server: ServerProcess) -> Iterator[ServerProcess]:
    """End the server with the block, whatever happens in it."""
    try:
        yield server
    finally:
        server.client.close()
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
            try:
                server.process.wait(20)
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()


def post_head(length: int, path: str = "/v1/score") -> bytes:
    """The headers of a JSON body of so many bytes."""
    head = f"POST {path} HTTP/1.1\r\nHost: scorer\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    return head.encode()


CHUNKED = post_head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def codes_of(connection: socket.socket) -> list[bytes]:
    """The status codes of all answers until the server closes the connection."""
    return [part[:3] for part in read_all(connection).split(b"HTTP/1.1 ")[1:]]


def send_on(connection: socket.socket, part: bytes, most: float) -> int:
    """Send the same again and again, until the server closes the connection or so many bytes are sent; how many."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < most:
            sent += connection.send(part)
    return sent
