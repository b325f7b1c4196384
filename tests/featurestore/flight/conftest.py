"""Servers as processes of their own, as people start them."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from featurestore import FeatureStore

ROOT = Path(__file__).parents[3]


class ServerProcess:
    """A `python -m featurestore serve` that answers."""

    def __init__(self, *words: str | Path) -> None:
        command = [sys.executable, "-m", "featurestore", "serve", *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        self.lines = [self.process.stdout.readline()]
        self.address = self.lines[0].partition(" ")[0]
        self._said = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.address.startswith("grpc"), (self.lines, self.process.stderr.read())

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def wait_for(self, text: str, timeout_s: float = 60) -> str:
        """Wait for a line with a text, and return it."""
        with self._said:
            assert self._said.wait_for(lambda: any(text in line for line in self.lines), timeout_s), self.lines
            return next(line for line in self.lines if text in line)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._said:
                self.lines.append(line)
                self._said.notify_all()


Serve = Callable[..., ServerProcess]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers of stores; at the end they are killed."""
    with contextlib.ExitStack() as stack:

        def start(store: FeatureStore, *words: str | Path) -> ServerProcess:
            server = ServerProcess(store.url, "--port", "0", "--cache-dir", tmp_path / "cache", *words)
            stack.callback(lambda: (server.process.kill(), server.process.wait()))
            return server

        yield start
