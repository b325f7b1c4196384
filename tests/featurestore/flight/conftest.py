"""Servers as processes of their own, which are forks of a small one."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import pytest

from featurestore import FeatureStore
from featurestore.__main__ import main
from tests.fuse import small_process


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
    """The command in a small process: it starts in a quarter of the time that `python -m` takes."""

    def __init__(self, pipe: Path, *words: str | Path) -> None:
        os.mkfifo(pipe)
        self.process = small_process(serve_in_here, pipe, list(map(str, words)))
        self.process.start()
        super().__init__(pipe.open())
        assert self.address.startswith("grpc"), self.lines

    def end(self, number: int = signal.SIGTERM) -> int | None:
        """Send a signal; return the exit code."""
        self.send(number)
        self.process.join(60)
        return self.process.exitcode

    def send(self, number: int) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


def serve_in_here(pipe: Path, words: Sequence[str]) -> None:
    sys.stdout = pipe.open("w")
    sys.argv = ["featurestore", "serve", *words]
    main()


Serve = Callable[..., ServerProcess]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers of stores; at the end they are killed."""
    servers: list[ServerProcess] = []

    def start(store: FeatureStore, *words: str | Path) -> ServerProcess:
        pipe = tmp_path / f"said-{len(servers)}"
        servers.append(ServerProcess(pipe, store.url, "--port", "0", "--cache-dir", tmp_path / "cache", *words))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.join()
