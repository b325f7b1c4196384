"""With a file of tokens: the pages ask for one, take a right one once, and tell nothing before."""

import pytest

from tests.explorer.browser.watching.chromium import NARROW, violations
from tests.explorer.serving import serving

TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def locked(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("locked")
    (folder / "tokens").write_text(f"another-token-of-somebody\n{TOKEN}\n")
    (folder / "tokens").chmod(0o600)
    with serving(folder, *world.options(), "--token-file", folder / "tokens") as server:
        yield server


def test_a_person_types_a_token_once(locked, tab):
    page = tab(f"{locked.url}/", width=NARROW)
    assert page.url == f"{locked.url}/login"
    assert violations(page) == ""
    page.get_by_label("Token").fill("wrong")
    page.seen.expected_status.add(401)
    page.keyboard.press("Enter")
    page.get_by_role("alert").wait_for()
    assert page.url == f"{locked.url}/login"
    assert violations(page) == ""
    page.seen.expected_status.clear()
    page.get_by_label("Token").fill(TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_url(f"{locked.url}/")
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"], TOKEN in cookie["value"]) == (True, "Strict", False)
    page.reload()
    assert page.url == f"{locked.url}/"


@pytest.mark.parametrize("path", ["/", "/picture?uri=shoes/shoe-00.jpg", "/nothing"])
@pytest.mark.parametrize("token", [None, "wrong", "", TOKEN[:-1]])
def test_without_a_token_nothing_is_told(locked, path, token):
    headers = {} if token is None else {"Authorization": f"Bearer {token}".strip(), "Cookie": f"explorer={token}"}
    answer = locked.client.get(path, headers=headers)
    assert (answer.status_code, answer.text) == (401, "no valid token")


def test_programs_send_it_as_to_the_scorer(locked):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert locked.client.get("/", headers=headers).status_code == 200
    assert locked.client.get("/picture?uri=shoes/shoe-00.jpg", headers=headers).headers["content-type"] == "image/jpeg"
