"""A page is a list of parts: which are computed when, and what a page says in the place of one that is not there."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from explorer import server as app_module
from explorer.data.background import Task
from explorer.errors import ExplorerError, RequestError
from explorer.html.site import PageKind, Part
from explorer.places import Places
from explorer.problems import Problem
from featurestore.errors import CorruptFileError
from tests.explorer.serving import client_of

HTMX = {"HX-Request": "true"}


class SlowPages(PageKind):
    """A page with a quick part, "login", and a slow one, "error"."""

    asked: list[str]
    slow: dict[str, Any]

    def routes(self) -> Sequence[Route]:
        return [Route("/slow/{name}", self.page)]

    def page(self, request: Request) -> Response:
        def quick() -> dict[str, Any]:
            self.asked.append("quick")
            return {"refused": "said at once"}

        slow = Part(template="error.html", what="Reading", **self.slow)
        return self.site.page(request, "Slow", Part(template="login.html", values=quick), slow)


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> type[SlowPages]:
    kind = type("Pages", (SlowPages,), {"asked": [], "slow": {}})
    monkeypatch.setattr(app_module, "KINDS", (*app_module.KINDS, kind))
    return kind


@pytest.fixture
def pages(kind: type[SlowPages]) -> TestClient:
    return client_of(Places(images="x"))


def computed_by(kind: type[SlowPages], **values: object) -> dict[str, Any]:
    """Describe a part that writes down when it is computed."""

    def compute() -> dict[str, object]:
        kind.asked.append("slow")
        return {"message": "said later", **values}

    return {"values": compute, "is_quick": False}


def hx_of(html: str) -> list[tuple[str, str]]:
    return re.findall(r'<div id="(\w+)" hx-get="([^"]*)"', html)


def test_a_slow_part_is_asked_for_by_the_page_and_computed_alone(kind: type[SlowPages], pages: TestClient) -> None:
    kind.slow = computed_by(kind)
    shell = pages.get("/slow/a%20b?run=x&run=y").text
    assert kind.asked == ["quick"] and "said at once" in shell and "Reading …" in shell and "said later" not in shell
    assert hx_of(shell) == [("error", "/slow/a%20b?run=x&amp;run=y&amp;wait=error")]
    part = pages.get("/slow/a%20b?run=x&run=y&wait=error", headers=HTMX).text
    assert kind.asked == ["quick", "slow"]
    assert part.startswith('<div id="error">') and part.count("<div") == 1 and "said later" in part
    whole = pages.get("/slow/a?wait=error").text  # followed as a link, where no script runs
    assert "said at once" in whole and "said later" in whole and hx_of(whole) == []


def test_a_page_without_the_part_any_more_is_loaded_again(kind: type[SlowPages], pages: TestClient) -> None:
    kind.slow = computed_by(kind)
    answer = pages.get("/slow/a?wait=gone", headers=HTMX)
    assert answer.headers["HX-Refresh"] == "true" and answer.text == ""
    assert "HX-Refresh" not in pages.get("/slow/a?wait=gone").headers
    assert "HX-Refresh" not in pages.get("/fail?wait=gone", headers=HTMX).headers


def test_a_part_may_be_asked_for_again(kind: type[SlowPages], pages: TestClient) -> None:
    kind.slow = computed_by(kind, again_s=4) | {"is_quick": True}
    assert 'hx-trigger="load delay:4s"' in pages.get("/slow/a").text
    assert hx_of(pages.get("/slow/a?wait=error", headers=HTMX).text) == [("error", "/slow/a?wait=error")]


def test_a_part_with_a_task_shows_its_progress_until_it_ends(
    kind: type[SlowPages], pages: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    task: Task[str] = Task()
    task.tell("reads files", 3, 28)
    kind.slow = {"task": task, "values": lambda: {"message": task.result()}}
    monkeypatch.setattr("explorer.html.site._POLL_S", 0.01)
    for asked in ("", "?wait=error"):
        html = pages.get(f"/slow/a{asked}").text
        assert "Reading: reads files (3 of 28)" in html and hx_of(html) == [("error", "/slow/a?wait=error")]
    task.run(lambda task: "it has ended")
    html = pages.get("/slow/a").text
    assert "it has ended" in html and hx_of(html) == []


@pytest.mark.parametrize(
    ("error", "is_page", "status"),
    [
        (CorruptFileError(Problem.NOT_KEY, "<b>damaged</b>"), False, 200),
        (ExplorerError(Problem.ENDING), False, 200),
        (CorruptFileError(Problem.NOT_KEY, "<b>damaged</b>"), True, 400),
        (RequestError(Problem.NOT_KEY, "<b>that</b>"), False, 400),
    ],
)
def test_an_error_is_told_in_the_place_of_its_part(
    kind: type[SlowPages], pages: TestClient, error: Exception, is_page: bool, status: int
) -> None:
    """The page has the others; it fails with the part that it is for, and when what was asked is wrong."""

    def fail() -> dict[str, Any]:
        raise error

    kind.slow = {"values": fail, "is_page": is_page, "heading": "What is slow"}
    answer = pages.get("/slow/a")
    assert answer.status_code == status and 'role="alert"' in answer.text and "<b>" not in answer.text
    assert ("said at once" in answer.text) == ("<h2>What is slow</h2>" in answer.text) == (status == 200)
    part = pages.get("/slow/a?wait=error", headers=HTMX)
    assert part.status_code == 200 and 'role="alert"' in part.text


def test_an_export_has_all_parts_and_asks_for_none(kind: type[SlowPages]) -> None:
    kind.slow = computed_by(kind, again_s=4)
    html = client_of(Places(images="x"), frozen=True).get("/slow/a").text
    assert kind.asked == ["quick", "slow"] and "said later" in html and "hx-" not in html
