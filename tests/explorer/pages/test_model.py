"""The page of a published model: its versions, the vectors of the one in use, and models that are not there."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from explorer.export import export
from explorer.html.site import Site
from explorer.places import Places
from explorer.server import application
from serving.errors import BundleNotFoundError
from tests.explorer.world import World


def places_of(world: World) -> Places:
    return Places(store=str(world.store), runs=str(world.runs), model=str(world.model))


def test_what_is_published(world: World) -> None:
    with TestClient(application(Site(places_of(world)))) as client:
        text = client.get("/model").text
        assert "Version 1 is in use" in text
        assert "step-00000012" in text
        assert '<b class="good">in use</b> since' in text
        assert re.search(r"<td>AUC 0\.\d{4}; GAUC 0\.\d{4}; log loss \d\.\d{4}</td>", text)
        assert "gauc_impressions" not in text
        assert "Model</a>" in client.get("/").text


def test_a_model_that_is_not_there(world: World, tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError):
        replace(places_of(world), model=str(tmp_path)).check()


def test_a_model_that_goes_away(world: World, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.model, model)
    with TestClient(application(Site(replace(places_of(world), model=str(model))))) as client:
        assert client.get("/model").status_code == 200
        shutil.rmtree(model)
        answer = client.get("/model")
        assert answer.status_code == 400
        assert "has no published model" in answer.text


def test_an_export_has_the_page(world: World, tmp_path: Path) -> None:
    exported = export(Places(model=str(world.model)), tmp_path / "pages", 100, lambda done, known: None)
    assert exported.errors == []
    page = next((tmp_path / "pages" / "pages").glob("model-*.html")).read_text()
    assert "Version 1 is in use" in page
    assert "hx-" not in page
