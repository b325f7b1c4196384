"""Servers as processes of their own, which are forks of a small one."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from featurestore import FeatureClient, FeatureStore, Lookup
from featurestore.__main__ import main
from featurestore.errors import UnavailableError
from tests.cli import wait_until
from tests.fuse import small_process


class ServerProcess:
    """The command in a small process, which starts in a quarter of the time of `python -m`; `lines`: what it says."""

    def __init__(self, pipe: Path, *words: str | Path) -> None:
        os.mkfifo(pipe)
        self.process = small_process(serve_in_here, pipe, list(map(str, words)))
        self.process.start()
        self._output = pipe.open()
        self.lines = [self._output.readline()]
        self.address = self.lines[0].partition(" ")[0]
        assert self.address.startswith("grpc"), self.lines
        self.port = int(self.address.rpartition(":")[2])
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._output:
            self.lines.append(line)

    def wait_for(self, text: str) -> None:
        """Wait for a line with a text."""
        wait_until(lambda: any(text in line for line in self.lines), lambda: str(self.lines), 60, pause_s=0.01)

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


def lookup_once_up(client: FeatureClient, keys_U: np.ndarray) -> Lookup:
    """Look up as soon as the server answers that was away."""
    end_s = time.monotonic() + 20
    while True:
        try:
            return client.lookup(keys_U)
        except UnavailableError:
            assert time.monotonic() < end_s
            time.sleep(0.1)
