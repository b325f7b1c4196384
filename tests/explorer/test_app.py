"""Tests of the application: errors as pages, and the headers of every answer."""

import configparser
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from explorer import __main__ as command
from explorer import server as app_module
from explorer.errors import ExplorerError, NotHereError
from explorer.html.site import NavItem, PageKind, Site
from explorer.places import Places
from explorer.server import application
from serving.http.limits import RefusedError
from tests.explorer.serving import serving
from tests.serving.http.processes import ROOT

ERRORS: dict[str, tuple[Exception, int]] = {
    "nothere": (NotHereError("no image 5 in snapshot 3"), 404),
    "wrong": (ExplorerError("<b>that</b> does not work"), 400),
    "limit": (RefusedError(408, "the body did not come"), 408),
    "bug": (ValueError("a secret of a user"), 500),
}


class FailingPages(PageKind):
    """Pages that fail."""

    closed = 0
    nav = NavItem("Failing", "/fail/nothere")

    def routes(self) -> Sequence[Route]:
        return [Route("/fail/{kind}", self.fail)]

    def fail(self, request: Request) -> Response:
        raise ERRORS[request.path_params["kind"]][0]

    def close(self) -> None:
        FailingPages.closed += 1


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr(app_module, "KINDS", (*app_module.KINDS, FailingPages))
    with TestClient(application(Site(Places(images="x"))), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_pages(failing: TestClient, kind: str) -> None:
    if kind != "bug":  # starlette raises a bug again after its page, which only the test's client keeps silent
        assert TestClient(failing.app).get(f"/fail/{kind}").status_code == ERRORS[kind][1]
    answer = failing.get(f"/fail/{kind}")
    error, status = ERRORS[kind]
    assert answer.status_code == status
    assert "<h1>" in answer.text and 'href="/"' in answer.text
    assert "<b>that" not in answer.text
    assert (str(error) in answer.text) == (kind in ("nothere", "limit"))
    assert "Content-Security-Policy" in answer.headers


def test_no_such_page_and_no_such_file(failing: TestClient) -> None:
    for path in ("/nope", "/static/nope", "/static/..%2f..%2fsetup.cfg", "/static/%2e%2e/__init__.py"):
        answer = failing.get(path)
        assert answer.status_code == 404, path
        assert "<h1>Not found</h1>" in answer.text
    assert failing.post("/").status_code == 405


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/runs/nothing", 404),
        ("/runs/..%2F..%2Fetc", 404),
        ("/runs/both/nothing", 404),
        ("/runs/compare?run=both", 400),
        ("/runs/compare", 400),
        ("/runs/compare?run=both&run=nothing", 404),
        ("/runs/compare?run=1&run=2&run=3&run=4&run=5&run=6&run=7", 400),
        ("/runs?page=x", 400),
        ("/runs?page=99", 200),
        ("/map?run=nothing", 404),
        ("/map?colour=x", 400),
        (f"/map/points/{24 * '0'}.parquet", 404),
        ("/map/points/%2e%2e%2fimages.parquet", 404),
        ("/map?run=a%2Fb", 404),
        ("/impressions/both/80?wait=why", 404),
        ("/impressions/both/-1?wait=why", 400),
        ("/impressions/both/" + "9" * 5000, 404),
        ("/impressions/both/0?ad=99&wait=why", 404),
        ("/impressions/both/0?ad=x&wait=why", 400),
        ("/impressions/nobody/0?wait=why", 404),
        ("/impressions/nobody/0", 404),
        ("/impressions/..%2F..%2Fboth/0?wait=why", 404),
        ("/impressions/%3Cscript%3E/0?wait=why", 404),
        ("/impressions?run=%3Cscript%3Ealert(1)%3C/script%3E", 404),
        ("/impressions?order=worst", 400),
        ("/impressions/both/0?wait=why&picture=99999999999999999999999", 400),
    ],
)
def test_addresses_that_do_not_work(pages: TestClient, address: str, status: int) -> None:
    answer = pages.get(address)
    assert answer.status_code == status
    assert 'role="alert"' in answer.text or status != 400
    assert "<script>alert" not in answer.text


def test_every_answer_keeps_scripts_of_others_out(failing: TestClient) -> None:
    for path in ("/", "/nope", "/picture?uri=x", "/static/style.css"):
        policy = failing.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "eval" not in policy


def test_the_files_of_pages_are_there(failing: TestClient) -> None:
    for name in ("style.css", "htmx.min.js", "charts.js", "plotly.min.js"):
        assert len(failing.get(f"/static/{name}").content) > 100, name


def test_the_kinds_are_closed_when_the_server_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(app_module, "KINDS", (FailingPages,))
    before = FailingPages.closed
    with TestClient(application(Site(Places(images=str(tmp_path))))):
        assert FailingPages.closed == before
    assert FailingPages.closed == before + 1


def test_the_first_page_has_the_questions_that_its_places_answer() -> None:
    texts = [TestClient(application(Site(places))).get("/").text for places in (Places(store="x"), Places(runs="x"))]
    for path, (with_store, with_runs) in {
        "/store/arrived": (True, False),
        "/store/broken": (True, False),
        "/worth": (False, True),
        "/impressions": (False, True),
    }.items():
        assert [f'href="{path}"' in text for text in texts] == [with_store, with_runs]
    assert "--runs" in texts[0]


def test_packages_that_are_missing_are_named_and_are_those_of_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    command.check_installed()
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "plotly" else object())
    with pytest.raises(ExplorerError, match=r"\(plotly\).*crossmedia\[explorer\]"):
        command.check_installed()
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extra = parser["options.extras_require"]["explorer"]
    distributions = {"python_multipart": "python-multipart"}
    needed = sorted(distributions.get(name, name) for name in command.NEEDED)
    assert sorted(line.partition(">")[0] for line in extra.split()) == needed


_SPARED = """
import os, sys
import serving.http.workers
from explorer.server import spare_memory
assert "torch" not in sys.modules
spare_memory()
sizes = [os.environ[name] for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")]
assert all(int(each) < 100 for each in sizes)  # of the code of 100 shapes, torch would keep 270 MB
"""


def test_servers_start_without_torch_and_let_it_keep_little() -> None:
    """Torch takes seconds and 200 MB, which the first page or the first model that needs it may wait for."""
    subprocess.run([sys.executable, "-c", _SPARED], check=True)


@pytest.mark.services
def test_a_server_spares_memory_and_requests_have_the_limits_of_the_scorer(tmp_path: Path) -> None:
    """Before anyone has sent a token, and on the connection that ends then."""
    long = b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n"
    form = b"Content-Type: application/x-www-form-urlencoded\r\n\r\n"
    (tmp_path / "tokens").write_text("0123456789abcdef0123\n")
    with serving(tmp_path, "--images", tmp_path, "--token-file", tmp_path / "tokens") as server:
        assert "THP_enabled:\t0" in Path(f"/proc/{server.process.pid}/status").read_text()
        for head, code in (
            (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", b"431"),
            (b"POST /login" + long + form, b"413"),
            (b"GET /login" + long + b"\r\n", b"200"),  # which is not read
        ):
            with server.connect() as connection:
                connection.sendall(head)
                answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
                assert answer.startswith(b"HTTP/1.1 " + code)
