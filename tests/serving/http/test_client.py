"""The client of one file: copied away from the project, it scores, waits, retries and says what was wrong."""

import importlib.util
import json
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from tests.cli import ran
from tests.commands.calls import ROOT

FILE = ROOT / "deploy" / "client" / "crossmedia_client.py"


@pytest.fixture(scope="module")
def client() -> ModuleType:
    spec = importlib.util.spec_from_file_location("crossmedia_client", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Answering(BaseHTTPRequestHandler):
    """Answers as a scorer, and notes what it was sent; after each second request it closes the connection, unsaid."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[tuple[str, str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append((self.path, self.headers.get("authorization", ""), body))
        if "requests" in body:
            self.answer(200, {"answers": [{"scores": [0.5]} for _ in body["requests"]]})
        elif body["user"].get("user") == "nobody":
            self.answer(400, {"error": "user is 'nobody'", "status": 400})
        else:
            self.answer(200, {"scores": [0.25] * len(body["candidates"]["ad_item"])})
        self.close_connection = len(self.seen) % 2 == 0

    def do_GET(self) -> None:
        status = 503 if self.path == "/v2/health/ready" else 200
        self.answer(status, {"user": {}, "candidates": {}})

    def answer(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    Answering.seen.clear()
    with HTTPServer(("127.0.0.1", 0), Answering) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()


def test_requests_are_as_the_page_says_and_closed_connections_opened_again(client: ModuleType, server: str) -> None:
    scorer = client.Scorer(f"{server}/", token="secret")
    for number in range(5):
        answer = scorer.score({"user": number}, {"ad_item": [1, 2]}, context={"ad_scene": 1}, logits=number == 4)
        assert answer["scores"] == [0.25, 0.25]
    request = {"user": {"user": 4}, "context": {"ad_scene": 1}, "candidates": {"ad_item": [1, 2]}}
    assert Answering.seen[-1] == ("/v1/score?logits=true", "Bearer secret", request)
    assert len(Answering.seen) == 5
    assert scorer.score_many([request, request]) == [{"scores": [0.5]}] * 2
    assert scorer.example() == {"user": {}, "candidates": {}}
    assert not scorer.is_ready()
    scorer.close()


def test_what_goes_wrong_is_one_error(client: ModuleType, server: str) -> None:
    scorer = client.Scorer(server)
    with pytest.raises(client.ScorerError, match="answers 400: user is 'nobody'") as refused:
        scorer.score({"user": "nobody"}, {"ad_item": [1]})
    assert refused.value.status == 400
    scorer.close()
    with pytest.raises(client.ScorerError, match="does not answer") as unanswered:
        client.Scorer("http://127.0.0.1:9", timeout_s=0.5).example()
    assert unanswered.value.status is None
    with pytest.raises(ValueError, match="is not an address of a scorer"):
        client.Scorer("127.0.0.1:8080")


def test_it_needs_no_other_package_and_is_what_its_package_installs(tmp_path: Path) -> None:
    (tmp_path / FILE.name).write_bytes(FILE.read_bytes())
    code = "import sys; sys.path.insert(0, '.'); import crossmedia_client; print(*sys.modules)"
    done = ran(sys.executable, "-I", "-S", "-c", code, cwd=tmp_path)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "crossmedia_client" in loaded, done.stderr
    assert loaded - set(sys.stdlib_module_names) - {"crossmedia_client", "__main__"} == set()
    project = tomllib.loads((FILE.parent / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["py-modules"] == [FILE.stem]
    assert "dependencies" not in project["project"]
