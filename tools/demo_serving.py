"""The last part of the demo: a scorer over HTTP, and a new picture that gets a score without a restart."""

import contextlib
import http.client
import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.errors import UserError

NUM_CANDIDATES, NUM_REQUESTS = 200, 200
_READY_S, _SWITCH_S, _STOP_S = 120, 60, 20


class ScorerError(UserError):
    """The scorer does not start, or does not answer as it should."""


@dataclass(frozen=True)
class Scorer:
    """A scorer that runs on this machine."""

    connection: http.client.HTTPConnection
    process: "subprocess.Popen[bytes]"

    def score(self, request: dict[str, Any]) -> dict[str, Any]:
        """Post one request, over a connection that stays open, and return the answer. Raises ScorerError."""
        try:
            answer = self._post(request)
        except ConnectionError:  # the scorer closes connections that are not used for some seconds
            self.connection.close()
            answer = self._post(request)
        body = answer.read()
        if answer.status != 200:
            raise ScorerError(f"the scorer answered {answer.status}: {body.decode()}")
        found: dict[str, Any] = json.loads(body)
        return found

    def _post(self, request: dict[str, Any]) -> http.client.HTTPResponse:
        self.connection.request("POST", "/v1/score", json.dumps(request), {"Content-Type": "application/json"})
        return self.connection.getresponse()

    def is_ready(self) -> bool:
        """Return whether the model is loaded and warmed up. Raises ScorerError if the process has ended."""
        if (code := self.process.poll()) is not None:
            raise ScorerError(f"the scorer ended with exit code {code}")
        try:
            self.connection.request("GET", "/v2/health/ready")
            answer = self.connection.getresponse()
            answer.read()
            return answer.status == 200
        except OSError:
            self.connection.close()
            return False


@contextlib.contextmanager
def running_scorer(model: Path, say: Callable[[str], None]) -> Iterator[Scorer]:
    """Start a scorer on a free port of loopback, wait until it is ready, and stop it at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "serving", str(model), "--port", str(port)]
    say(f"$ {shlex.join(command)} &")
    process = subprocess.Popen(command)
    try:
        scorer = Scorer(http.client.HTTPConnection("127.0.0.1", port, timeout=30), process)
        _wait(scorer.is_ready, _READY_S, "the scorer is not ready")
        yield scorer
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()


def request_of(samples: Path) -> dict[str, Any]:
    """Make a request for the test user with the longest history: the ads of the test samples are the candidates."""
    import pyarrow.parquet as pq  # --help needs none of it

    rows = pq.read_table(sorted((samples / "test").glob("*.parquet"))[0]).to_pylist()
    user = max(rows, key=lambda row: len(row["behavior_item"]))
    ads = [name for name in rows[0] if name.startswith("ad_")]
    shown = [each for row in rows for each in zip(*(row[ad] for ad in ads), strict=True)]
    chosen = [shown[place % len(shown)] for place in range(NUM_CANDIDATES)]
    return {
        "user": {name: value for name, value in user.items() if name == "user" or name.startswith("behavior_")},
        "candidates": dict(zip(ads, map(list, zip(*chosen, strict=True)), strict=True)),
    }


def latencies_ms(scorer: Scorer, request: dict[str, Any]) -> dict[str, float]:
    """Measure the seconds from a request to its answer, for one client: median and 99th percentile, in ms."""
    taken = []
    for _ in range(NUM_REQUESTS):
        start_s = time.perf_counter()
        scorer.score(request)
        taken.append(1000 * (time.perf_counter() - start_s))
    return {"p50_ms": float(np.percentile(taken, 50)), "p99_ms": float(np.percentile(taken, 99))}


def draw_new_picture(folder: Path) -> str:
    """Draw a picture that no store has seen into `folder`, and return its name there, which is its uri."""
    from pipeline.demo.items import draw_garment, plan_garments  # pyarrow: not for --help

    folder.mkdir(parents=True, exist_ok=True)
    seed = time.time_ns() % 2**32
    name = f"new-{seed}.jpg"
    (folder / name).write_bytes(draw_garment(plan_garments(1, seed)[0]))
    return name


def wait_for_picture(scorer: Scorer, request: dict[str, Any]) -> float:
    """Request scores until no candidate's image is missing, and return the first score. Raises ScorerError."""
    answer: dict[str, Any] = {}

    def is_known() -> bool:
        answer.update(scorer.score(request))
        return not answer["missing"].get("ad_image")

    _wait(is_known, _SWITCH_S, "the new picture is still missing")
    return float(answer["scores"][0])


def _wait(is_done: Callable[[], bool], limit_s: float, problem: str) -> None:
    start_s = time.monotonic()
    while not is_done():
        if time.monotonic() - start_s > limit_s:
            raise ScorerError(f"{problem} after {limit_s:g} seconds")
        time.sleep(0.2)
