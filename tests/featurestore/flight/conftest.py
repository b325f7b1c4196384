"""Servers as processes of their own: as people start them, or quicker, as forks of a small process."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import pytest

from featurestore import FeatureStore
from featurestore.__main__ import main
from tests.fuse import small_process

ROOT = Path(__file__).parents[3]


class Answering:
    """A server that answers, and what it says."""

    def __init__(self, output: TextIO) -> None:
        self.lines = [output.readline()]
        self.address = self.lines[0].partition(" ")[0]
        self._said = threading.Condition()
        self._reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._reader.start()

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def wait_for(self, text: str, timeout_s: float = 60) -> str:
        """Wait for a line with a text, and return it."""
        with self._said:
            assert self._said.wait_for(lambda: any(text in line for line in self.lines), timeout_s), self.lines
            return next(line for line in self.lines if text in line)

    def _read(self, output: TextIO) -> None:
        for line in output:
            with self._said:
                self.lines.append(line)
                self._said.notify_all()


class ServerProcess(Answering):
    """A `python -m featurestore serve`."""

    def __init__(self, *words: str | Path) -> None:
        command = [sys.executable, "-m", "featurestore", "serve", *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        super().__init__(self.process.stdout)
        assert self.address.startswith("grpc"), (self.lines, self.process.stderr.read())

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


class SmallServer(Answering):
    """The same command in a small process."""

    def __init__(self, pipe: Path, *words: str | Path) -> None:
        os.mkfifo(pipe)
        self.process = small_process(serve_in_here, pipe, list(map(str, words)))
        self.process.start()
        super().__init__(pipe.open())
        assert self.address.startswith("grpc"), self.lines

    def end(self) -> None:
        """Let it end, as when a person stops it."""
        self.process.terminate()
        self.process.join(60)
        assert self.process.exitcode == 0


def serve_in_here(pipe: Path, words: Sequence[str]) -> None:
    sys.stdout = pipe.open("w")
    sys.argv = ["featurestore", "serve", *words]
    main()


Serve = Callable[..., ServerProcess]
ServeSmall = Callable[..., SmallServer]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers of stores; at the end they are killed."""
    with contextlib.ExitStack() as stack:

        def start(store: FeatureStore, *words: str | Path) -> ServerProcess:
            server = ServerProcess(store.url, "--port", "0", "--cache-dir", tmp_path / "cache", *words)
            stack.callback(lambda: (server.process.kill(), server.process.wait()))
            return server

        yield start


@pytest.fixture
def serve_small(tmp_path: Path) -> Iterator[ServeSmall]:
    """The same where it is no matter how they start and die: each takes a quarter of the time."""
    servers: list[SmallServer] = []

    def start(store: FeatureStore, *words: str | Path) -> SmallServer:
        pipe = tmp_path / f"said-{len(servers)}"
        servers.append(SmallServer(pipe, store.url, "--port", "0", "--cache-dir", tmp_path / "cache", *words))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.join()
