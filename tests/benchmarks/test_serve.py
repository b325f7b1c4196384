"""The benchmark of serving at a tiny size: its figures are there, and nothing failed or was of two versions."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import pytest
from typer.testing import CliRunner

from benchmarks.serve.__main__ import app
from benchmarks.serve.client import as_many_as_it_can, at_rate, one_after_the_other
from benchmarks.serve.variety import VariedBodies
from benchmarks.serve.world import World


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_figures_are_written(tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    small = ["--images", "300", "--dim", "16", "--samples", "60", "--steps", "2", "--requests", "20", "--rounds", "1"]
    short = ["--switches", "2", "--growth-requests", "300"]
    done = CliRunner().invoke(app, [*small, *short, "--dir", str(tmp_path / "bench"), "--json", str(out)])
    assert done.exit_code == 0, done.output
    figures = json.loads(out.read_text())
    assert 0 < figures["http_p50_ms_200"] <= figures["http_p99_ms_200"]
    assert figures["vs_fastapi_eager_rps"] == figures["http_scorer_rps_200"] / figures["http_fastapi_rps_200"]
    assert figures["vs_engine_rps"] == figures["http_scorer_rps_100"] / figures["http_engine_rps_100"]
    assert (figures["switch_failed"], figures["switch_mixed"], figures["rss_failed"]) == (0, 0, 0)
    assert figures["rss_wrongly_answered"] == 0
    assert figures["delta_images"] == 3 and figures["switch_requests"] > 0


class Slow(BaseHTTPRequestHandler):
    """Takes 20 ms a request; refuses bodies that say so."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        threading.Event().wait(0.02)
        self.send_response(503 if body == b"no" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""


@pytest.mark.services
def test_client() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        alone = one_after_the_other(port, [b"yes"], 5)
        assert alone.failed == 0 and alone.ms(50) >= 20 and 0 < alone.rps <= 50
        together = as_many_as_it_can(port, [b"yes", b"no"], 20, connections=4)
        assert together.failed == 10 and together.seconds >= 20 / 4 * 0.02
        # 200 a second are due, 50 are answered: a latency counts the time that a request waits for its turn.
        late = at_rate(port, [b"yes"], 20, rate=200, connections=1)
        assert late.ms(100) > 200
        server.shutdown()


class Logged:
    """A world of two users and five ads."""

    def logged(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        users = [{"user": number, "behavior_item": [1, 2, 3], "behavior_image": [7, 8, 9]} for number in range(2)]
        ads = {name: np.arange(5) for name in ("ad_item", "ad_image", "ad_category", "ad_scene")}
        return users, ads


def test_bodies_of_all_kinds() -> None:
    bodies = VariedBodies.of(cast(World, Logged()), 5_000)
    assert (len(bodies), len(bodies[4_000:])) == (5_000, 1_000)
    assert len(set(bodies)) > 4_000  # those without an id of their own come again
    assert bodies[4_000:][7] == bodies[4_007]
    sizes, is_new, is_empty, images = [], 0, 0, set()
    for number, body in enumerate(bodies):
        if bodies.refused(number, number + 1):
            continue
        request = orjson.loads(body)
        sizes.append(len(request["candidates"]["ad_item"]))
        is_new += request["user"]["user"] > 1
        is_empty += not request["user"]["behavior_item"]
        images |= set(request["candidates"]["ad_image"])
    assert (min(sizes), max(sizes) > 950, None in images) == (1, True, True)
    assert len(images) > 1_000  # ids that no other request has
    assert is_new > 2_000 and is_empty > 300
    assert bodies.refused(0, 5_000) == 5_000 - len(sizes) > 50
