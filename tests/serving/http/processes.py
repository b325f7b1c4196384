"""Real server processes on loopback, and raw connections to them."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).parents[3]
START_TIMEOUT_S = 120
LISTENING = re.compile(r"(?:listening on|open) (https?)://([\w.:\[\]]+):(\d+)/? ")


class ServerProcess:
    """A server in a process of its own, with its log in a file."""

    def __init__(self, command: list[str], folder: Path, verify: Any = True) -> None:
        self._log = folder / f"server-{time.monotonic_ns()}.log"
        search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env={**os.environ, "PYTHONPATH": search})
        self.scheme, self.host, port = self._await(LISTENING)
        self.port = int(port)
        self.url = f"{self.scheme}://{self.host}:{self.port}"
        self.client = httpx2.Client(base_url=self.url, verify=verify, timeout=30)

    def log(self) -> str:
        """What it has written so far."""
        return self._log.read_text()

    def wait_until_ready(self) -> None:
        """Wait until a model is warmed up."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx2.TransportError):
                if self.client.get("/v2/health/ready").status_code == 200:
                    return
            assert self.process.poll() is None, self.log()
            time.sleep(0.05)
        raise AssertionError(f"not ready: {self.log()}")

    def wait_for(self, words: str, count: int = 1) -> None:
        """Wait until the log has these words so many times."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.log().count(words) < count:
            assert time.monotonic() < deadline, self.log()
            assert self.process.poll() is None, self.log()
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def connect(self) -> socket.socket:
        """A raw connection."""
        return socket.create_connection((self.host, self.port), timeout=30)

    def memory_mb(self) -> float:
        """Resident memory of the process."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def _await(self, pattern: re.Pattern[str]) -> tuple[str, ...]:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (match := pattern.search(self.log())):
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        return match.groups()


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
    return (
        f"POST {path} HTTP/1.1\r\nHost: scorer\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()
