"""Switches under load: no request fails, and each answer is wholly of the version that it names."""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import orjson

from benchmarks.report import Section
from benchmarks.serve.client import Connection
from benchmarks.serve.servers import Server, started
from benchmarks.serve.speed import scorer
from benchmarks.serve.world import World
from featurestore.errors import UserError
from featurestore.storage.storage import Storage
from serving.bundle.log import use

_CANDIDATES, _BODIES, _CLIENTS = 50, 16, 2
_WAIT_S = 60.0
_ROUNDING = 1e-5


class SwitchError(UserError):
    """The server did not take the version over in time."""


def measure(world: World, switches: int) -> list[Section]:
    """Change between the two versions of model `both` so often, under load, and back to the first."""
    model = world.model("both")
    storage, bodies = Storage(str(model)), world.bodies(_CANDIDATES, _BODIES)
    use(storage, 1)
    command = [*scorer(world, "both"), "--poll-s", "0.1"]
    with started(command, world.folder / "switch.log") as server:
        expected = {version: _scores_of(server, storage, version, bodies) for version in (2, 1)}
        load = _Checked(server, bodies, expected)
        seconds = []
        with load.running():
            for version in itertools.islice(itertools.cycle((2, 1)), switches):
                start = time.monotonic()
                use(storage, version)
                _await(server, bodies[0], version)
                seconds.append(time.monotonic() - start)
    use(storage, 1)
    figures = {
        "switch_failed": load.failed,
        "switch_mixed": load.mixed,
        "switch_requests": load.requests,
        "switches": switches,
        "switch_s": float(np.median(seconds)),
    }
    return [Section("switches under load", figures)]


def _scores_of(server: Server, storage: Storage, version: int, bodies: list[bytes]) -> list[list[float]]:
    """Return the scores of one version, alone."""
    use(storage, version)
    _await(server, bodies[0], version)
    with Connection(server.port) as connection:
        return [orjson.loads(connection.post(body)[1])["scores"] for body in bodies]


def _await(server: Server, body: bytes, version: int) -> None:
    """Wait until the server answers with a version. Raises SwitchError."""
    end = time.monotonic() + _WAIT_S
    with Connection(server.port) as connection:
        while time.monotonic() < end:
            if orjson.loads(connection.post(body)[1])["version"] == version:
                return
            time.sleep(0.02)
    raise SwitchError(f"version {version} does not answer after {_WAIT_S:.0f} s")


class _Checked:
    """A load whose answers are compared with those that each version gives alone."""

    def __init__(self, server: Server, bodies: list[bytes], expected: dict[int, list[list[float]]]) -> None:
        self._server, self._bodies, self._expected = server, bodies, expected
        self._stop, self._lock = threading.Event(), threading.Lock()
        self.requests = self.failed = self.mixed = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Send requests while the block runs; their failures are counted, and what the client fails at is raised."""
        with ThreadPoolExecutor(_CLIENTS) as pool:
            clients = [pool.submit(self._work) for _ in range(_CLIENTS)]
            try:
                yield
            finally:
                self._stop.set()
        for client in clients:
            client.result()

    def _work(self) -> None:
        with Connection(self._server.port) as connection:
            for place in itertools.cycle(range(len(self._bodies))):
                if self._stop.is_set():
                    return
                status, answer = connection.post(self._bodies[place])
                answered = orjson.loads(answer)
                with self._lock:
                    self.requests += 1
                    self.failed += status != 200
                    self.mixed += status == 200 and not self._is_of_one_version(answered, place)

    def _is_of_one_version(self, answered: dict[str, Any], place: int) -> bool:
        expected = self._expected[answered["version"]][place]
        return np.allclose(answered["scores"], expected, rtol=0, atol=_ROUNDING)
