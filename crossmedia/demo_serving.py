"""The last part of the demo: a scorer over HTTP, and a new picture that gets a score without a restart."""

import contextlib
import http.client
import json
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crossmedia.problems import Problem
from featurestore.errors import UserError
from trainer.launch import ended, free_port

NUM_CANDIDATES, NUM_REQUESTS = 200, 200
_READY_S, _SWITCH_S = 300, 60


class ServerError(UserError):
    """A server does not start, or does not answer as it should."""


@dataclass(frozen=True)
class Scorer:
    """A scorer that runs on this machine."""

    connection: http.client.HTTPConnection

    def score(self, request: dict[str, Any]) -> dict[str, Any]:
        """Post one request, over a connection that stays open, and return the answer. Raises ServerError."""
        try:
            answer = self._post(request)
        except ConnectionError:  # the scorer closes connections that are not used for some seconds
            self.connection.close()
            answer = self._post(request)
        body = answer.read()
        if answer.status != 200:
            raise ServerError(Problem.REFUSED, answer.status, body.decode())
        found: dict[str, Any] = json.loads(body)
        return found

    def _post(self, request: dict[str, Any]) -> http.client.HTTPResponse:
        self.connection.request("POST", "/v1/score", json.dumps(request), {"Content-Type": "application/json"})
        return self.connection.getresponse()


@contextlib.contextmanager
def running(
    command: Sequence[str],
    port: int,
    ready: str,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Run `python COMMAND` from when it answers 200 at the path `ready` to the end of the block. Raises ServerError."""
    shown = f"python {shlex.join(command)}"
    process = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment)

    def is_ready() -> bool:
        if (code := process.poll()) is not None:
            raise ServerError(Problem.ENDED, shown, code)
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=10):
            return True
        return False

    with ended(process):
        _wait(is_ready, _READY_S, f"{shown} is not ready")
        yield


@contextlib.contextmanager
def running_scorer(model: Path, say: Callable[[str], None]) -> Iterator[Scorer]:
    """Run a scorer on a free port of loopback."""
    port = free_port()
    command = ["-m", "crossmedia", "serve", str(model), "--port", str(port)]
    say(f"$ python {shlex.join(command)} &")
    with running(command, port, "/v2/health/ready"):
        yield Scorer(http.client.HTTPConnection("127.0.0.1", port, timeout=30))


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
    """Request scores until no candidate's image is missing, and return the first score. Raises ServerError."""
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
            raise ServerError(Problem.TOO_SLOW, problem, limit_s)
        time.sleep(0.2)
