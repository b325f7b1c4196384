"""Tests of who may look: names of the server, forms of other sites, tokens and cookies."""

import pytest
from starlette.testclient import TestClient

from explorer.html.site import Site
from explorer.places import Places
from explorer.server import COOKIE, HostGuard, LoginGuard, application, names_of

TOKEN = "a-token-that-is-long-enough"
HTML = {"Accept": "text/html"}


@pytest.fixture
def tokens() -> list[str]:
    return ["another-token-of-the-file", TOKEN]


@pytest.fixture
def client(tokens: list[str]) -> TestClient:
    site = Site(Places(images="x"))
    guarded = LoginGuard(application(site), site, tokens, secure=False)
    return TestClient(HostGuard(guarded, names_of("127.0.0.1")), base_url="http://localhost", follow_redirects=False)


def test_pages_lead_to_the_form_and_programs_get_401(client: TestClient) -> None:
    page = client.get("/", headers=HTML)
    assert (page.status_code, page.headers["location"]) == (303, "/login")
    assert client.get("/picture?uri=a", headers={"Accept": "*/*"}).status_code == 401
    assert client.get("/static/style.css").status_code == 200


def test_a_typed_token_opens_the_pages_by_a_cookie_that_scripts_and_other_sites_cannot_use(client: TestClient) -> None:
    answer = client.post("/login", data={"token": f" {TOKEN} "})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert TOKEN not in cookie
    assert client.get("/", headers=HTML).status_code == 200


@pytest.mark.parametrize("token", ["wrong", "a" * 2_000_000])
def test_a_wrong_token_says_so(client: TestClient, token: str) -> None:
    answer = client.post("/login", data={"token": token})
    assert answer.status_code == 401
    assert "not a token of the server" in answer.text
    assert "set-cookie" not in answer.headers


def test_a_bearer_opens_the_pages_too(client: TestClient) -> None:
    assert client.get("/", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert client.get("/", headers={"Authorization": f"Basic {TOKEN}"}).status_code == 401


def test_a_cookie_ends_with_its_token_and_with_the_server(client: TestClient, tokens: list[str]) -> None:
    client.post("/login", data={"token": TOKEN})
    kept = client.cookies[COOKIE]
    tokens.remove(TOKEN)
    assert client.get("/", headers=HTML).status_code == 303
    site = Site(Places(images="x"))
    another = TestClient(LoginGuard(application(site), site, [TOKEN], secure=True), follow_redirects=False)
    assert another.get("/", headers=HTML | {"Cookie": f"{COOKIE}={kept}"}).status_code == 303
    assert "Secure" in another.post("/login", data={"token": TOKEN}).headers["set-cookie"]


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.nip.io:8090"])
def test_other_names_of_a_server_on_loopback_are_refused(client: TestClient, host: str) -> None:
    answer = client.get("/", headers={"Host": host, "Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 400


@pytest.mark.parametrize("host", ["localhost:8090", "127.0.0.1", "[::1]:8090", "LOCALHOST"])
def test_its_own_names_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"Host": host, "Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_a_form_of_another_site_is_refused(client: TestClient) -> None:
    form = {"token": TOKEN}
    assert client.post("/login", data=form, headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.post("/login", data=form, headers={"Origin": "null"}).status_code == 403
    assert client.post("/login", data=form, headers={"Origin": "http://localhost"}).status_code == 303


def test_a_server_on_all_addresses_may_have_any_name() -> None:
    assert names_of("0.0.0.0") is None
    assert names_of("10.1.2.3") == ("10.1.2.3",)
