"""The benchmark of serving at a tiny size: its figures are there, and the client counts what it waits for."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.serve.__main__ import app
from benchmarks.serve.client import as_many_as_it_can, at_rate, one_after_the_other


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_figures_are_written(tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    small = ["--images", "300", "--dim", "16", "--samples", "60", "--steps", "2", "--requests", "20", "--rounds", "1"]
    done = CliRunner().invoke(app, [*small, "--dir", str(tmp_path / "bench"), "--json", str(out)])
    assert done.exit_code == 0, done.output
    figures = json.loads(out.read_text())
    assert 0 < figures["http_p50_ms_200"] <= figures["http_p99_ms_200"]
    assert figures["vs_fastapi_eager_rps"] == figures["http_scorer_rps_200"] / figures["http_fastapi_rps_200"]


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
