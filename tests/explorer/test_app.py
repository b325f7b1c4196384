"""The application: errors as pages, headers, addresses and the files that stand for them, and who may look."""

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
from explorer.html.query import Paging
from explorer.html.site import NavItem, PageKind, Site, address, file_of, relative
from explorer.places import Places
from explorer.problems import Problem
from explorer.server import COOKIE, HostGuard, LoginGuard, application, names_of
from serving.http.limits import RefusedError
from serving.problems import Problem as ServingProblem
from tests.explorer.serving import client_of, serving
from tests.explorer.world import SCRIPT
from tests.raised import raises
from tests.serving.http.processes import ROOT

ERRORS: dict[str, tuple[Exception, int]] = {
    "nothere": (NotHereError(Problem.NO_IMAGE_IN_SNAPSHOT, 5, 3), 404),
    "wrong": (ExplorerError(Problem.NOT_KEY, "<b>that</b>"), 400),
    "limit": (RefusedError(408, ServingProblem.LATE_BODY, 5), 408),
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
    with TestClient(client_of(Places(images="x")).app, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_pages(failing: TestClient, kind: str) -> None:
    error, status = ERRORS[kind]
    if kind != "bug":  # starlette raises a bug again after its page, which only the test's client keeps silent
        assert TestClient(failing.app).get(f"/fail/{kind}").status_code == status
    answer = failing.get(f"/fail/{kind}")
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


def test_every_answer_keeps_scripts_of_others_out_and_own_files_are_there(failing: TestClient) -> None:
    files = [f"/static/{name}" for name in ("style.css", "htmx.min.js", "charts.js", "plotly.min.js")]
    for path in ("/", "/nope", "/picture?uri=x", *files):
        answer = failing.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "eval" not in policy
        assert answer.status_code == (404 if path == "/nope" else 200) and len(answer.content) > 100


def test_the_kinds_are_closed_when_the_server_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "KINDS", (FailingPages,))
    before = FailingPages.closed
    with client_of(Places(images="x")):
        assert FailingPages.closed == before
    assert FailingPages.closed == before + 1


def test_the_first_page_has_the_questions_that_its_places_answer() -> None:
    of_store, of_runs = (client_of(places).get("/").text for places in (Places(store="x"), Places(runs="x")))
    for path in ("/store/arrived", "/store/broken"):
        assert f'href="{path}"' in of_store and f'href="{path}"' not in of_runs
    for path in ("/worth", "/impressions"):
        assert f'href="{path}"' in of_runs and f'href="{path}"' not in of_store
    assert "--runs" in of_store


def test_packages_that_are_missing_are_named_and_are_those_of_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    command.check_installed()
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "plotly" else object())
    with raises(ExplorerError, Problem.NOT_INSTALLED, value="plotly"):
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


@pytest.mark.long
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


@pytest.mark.parametrize(
    ("asked", "count", "paging"),
    [("", 10, (1, 3, 0)), ("page=3", 10, (3, 3, 8)), ("page=99", 10, (3, 3, 8)), ("page=1", 0, (1, 1, 0))],
)
def test_pages_of_a_list(asked: str, count: int, paging: tuple[int, int, int]) -> None:
    found = Paging.of(Request({"type": "http", "query_string": asked.encode()}), count, 4)
    assert (found.page, found.num_pages, found.first) == paging


def test_addresses_are_quoted_and_each_has_a_plain_file_of_its_own() -> None:
    assert address("/store", {"b": 2, "a": "x y&z", "c": None}) == "/store?a=x+y%26z&b=2"
    names = ["../../etc/passwd", SCRIPT, "a\"b'c&d", "\u202egpj.exe", "ü/ö.png", "x" * 5000, "a b\nc", "a/b", "a-b"]
    files = [file_of(address("/picture", {"uri": uri, "size": size})) for uri in names for size in (96, 160)]
    assert len(set(files)) == len(files)
    assert all(file.startswith("pictures/") and file.endswith(".jpg") and file.isascii() for file in files)
    assert all(len(file) < 100 and ".." not in file and file.count("/") == 1 for file in files)
    assert relative("static/style.css", "pages/a.html") == "../static/style.css"
    assert relative("pages/b.html", "pages/a.html") == "b.html"
    assert relative("pages/b.html", "index.html") == "pages/b.html"


TOKEN = "a-token-that-is-long-enough"
HTML = {"Accept": "text/html"}


@pytest.fixture
def tokens() -> list[str]:
    return ["another-token-of-the-file", TOKEN]


@pytest.fixture
def guarded(tokens: list[str]) -> TestClient:
    site = Site(Places(images="x"))
    login = LoginGuard(application(site), site, tokens, secure=False)
    return TestClient(HostGuard(login, names_of("127.0.0.1")), base_url="http://localhost", follow_redirects=False)


def test_pages_lead_to_the_form_and_programs_get_401(guarded: TestClient) -> None:
    page = guarded.get("/", headers=HTML)
    assert (page.status_code, page.headers["location"]) == (303, "/login")
    assert guarded.get("/picture?uri=a", headers={"Accept": "*/*"}).status_code == 401
    assert guarded.get("/static/style.css").status_code == 200


def test_a_typed_token_opens_the_pages_by_a_cookie_that_scripts_and_other_sites_cannot_use(guarded: TestClient) -> None:
    answer = guarded.post("/login", data={"token": f" {TOKEN} "})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert TOKEN not in cookie
    assert guarded.get("/", headers=HTML).status_code == 200


@pytest.mark.parametrize("token", ["wrong", "a" * 2_000_000])
def test_a_wrong_token_says_so(guarded: TestClient, token: str) -> None:
    answer = guarded.post("/login", data={"token": token})
    assert answer.status_code == 401
    assert Problem.OTHER_TOKEN in answer.text
    assert "set-cookie" not in answer.headers


def test_a_bearer_opens_the_pages_too(guarded: TestClient) -> None:
    assert guarded.get("/", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert guarded.get("/", headers={"Authorization": f"Basic {TOKEN}"}).status_code == 401


def test_a_cookie_ends_with_its_token_and_with_the_server(guarded: TestClient, tokens: list[str]) -> None:
    guarded.post("/login", data={"token": TOKEN})
    kept = guarded.cookies[COOKIE]
    tokens.remove(TOKEN)
    assert guarded.get("/", headers=HTML).status_code == 303
    site = Site(Places(images="x"))
    another = TestClient(LoginGuard(application(site), site, [TOKEN], secure=True), follow_redirects=False)
    assert another.get("/", headers=HTML | {"Cookie": f"{COOKIE}={kept}"}).status_code == 303
    assert "Secure" in another.post("/login", data={"token": TOKEN}).headers["set-cookie"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 400) for host in ("evil.example", "localhost.evil.example", "", "127.0.0.1.nip.io:8090")),
        *((host, 200) for host in ("localhost:8090", "127.0.0.1", "[::1]:8090", "LOCALHOST")),
    ],
)
def test_a_server_on_loopback_answers_to_its_own_names_alone(guarded: TestClient, host: str, status: int) -> None:
    assert guarded.get("/", headers={"Host": host, "Authorization": f"Bearer {TOKEN}"}).status_code == status


def test_a_form_of_another_site_is_refused(guarded: TestClient) -> None:
    for origin, status in (("http://evil.example", 403), ("null", 403), ("http://localhost", 303)):
        answer = guarded.post("/login", data={"token": TOKEN}, headers={"Origin": origin})
        assert answer.status_code == status


def test_a_server_on_all_addresses_may_have_any_name() -> None:
    assert names_of("0.0.0.0") is None
    assert names_of("10.1.2.3") == ("10.1.2.3",)
