"""Tests of the first page: the questions that can be answered, and the places that are missing."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from explorer.html.site import Site
from explorer.places import Places
from explorer.server import application
from tests.explorer.world import World


def _home(places: Places) -> str:
    return TestClient(application(Site(places))).get("/").text


def test_questions_lead_to_pages_that_are_there(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    places = Places(store=str(world.store), runs=str(world.runs), samples=str(world.samples), images=str(world.images))
    with TestClient(application(site := Site(places))) as client:
        text = client.get("/").text
        assert {question.path for question in site.questions} >= {
            "/store/arrived",
            "/store/broken",
            "/worth",
            "/impressions",
        }
        for question in site.questions:
            assert question.words in text
            assert client.get(question.path).status_code == 200


def test_what_has_no_place_is_no_question(world: World) -> None:
    text = _home(Places(store=str(world.store)))
    assert "/store/broken" in text
    assert "/worth" not in text and "/impressions" not in text
    assert "--runs" in text
