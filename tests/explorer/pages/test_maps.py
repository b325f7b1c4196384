"""The page of the map: a quick picture, then the better one, its file, and what may be asked for."""

import io
import re
import threading
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from explorer.data.map import projection
from explorer.errors import ExplorerError
from explorer.html.site import Site
from explorer.places import Places
from explorer.server.app import application
from tests.explorer.world import World


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """UMAP waits for it."""
    go = threading.Event()

    def project(vectors_NV: Any, tell: Any) -> Any:
        tell("lays them out")
        if not go.wait(60):
            raise ExplorerError("nobody let it go")
        return vectors_NV[:, :2].copy()

    monkeypatch.setattr(projection, "umap_in_process", project)
    return go


@pytest.fixture
def places(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Places(store=str(world.store), runs=str(world.runs), samples=str(world.samples), images=str(world.images))


@pytest.fixture
def pages(places: Places) -> Iterator[TestClient]:
    with TestClient(application(Site(places))) as client:
        yield client


def test_the_quick_map_is_there_before_the_better_one(pages: TestClient, go: threading.Event) -> None:
    html = pages.get("/map", params={"run": "both", "wait": "1"}).text
    assert "two principal components" in html
    part = unescape(re.search(r'hx-get="(/parts/map[^"]*)"', html)[1])  # type: ignore[index]
    assert 'name="shown" value="pca"' in html
    waiting = pages.get(part, params={"run": "both", "colour": "folder", "shown": "pca"})
    assert waiting.headers["HX-Retarget"] == "#map-status"
    assert "mapgrid" not in waiting.text
    go.set()
    for _ in range(600):
        whole = pages.get(part)
        if whole.status_code == 286:
            break
    assert whole.status_code == 286
    assert "laid out by UMAP" in whole.text
    assert whole.text.count("<li style=") == len(re.findall(r'<a href="/images/-?\d+"><img ', whole.text)) > 3
    assert "hx-get" not in pages.get("/map?run=both").text


def test_its_file_is_parquet(pages: TestClient, go: threading.Event) -> None:
    go.set()
    assert pages.get("/map/points.parquet?run=both-longer").status_code == 404
    html = pages.get("/map?run=both-longer&wait=1").text
    link = unescape(re.search(r'href="(/map/points.parquet[^"]*)"', html)[1])  # type: ignore[index]
    answer = pages.get(link)
    assert answer.headers["content-disposition"].startswith('attachment; filename="map-both-longer-')
    assert "uri" in pq.read_table(io.BytesIO(answer.content)).column_names
    assert re.search(r"embedding-atlas \S+\.parquet --x x --y y", html)


@pytest.mark.parametrize("colour", ["folder", "category", "ctr", "error"])
def test_each_colour_is_drawn(pages: TestClient, go: threading.Event, colour: str) -> None:
    go.set()
    html = pages.get("/map", params={"run": "both", "colour": colour, "wait": "1"}).text
    assert 'id="map"' in html
    assert "<script>alert" not in html
    assert "onerror=alert" not in re.sub(r"<script type=.*?</script>|\"[^\"]*\"", "", html)


def test_a_run_is_chosen_that_sees_images(pages: TestClient, go: threading.Event) -> None:
    html = pages.get("/map").text
    assert 'aria-current="true">run both</a>' in html
    assert "run=ids-only" not in html
    blind = pages.get("/map?run=ids-only&wait=1").text
    assert "has no E for images, so no map; choose another run" in blind
    assert "--" not in blind.partition("<main")[2]
    go.set()


def test_where_umap_fails_the_quick_map_stays(pages: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(vectors_NV: Any, tell: Any) -> Any:
        raise ExplorerError("UMAP ended with -9: killed")

    monkeypatch.setattr(projection, "umap_in_process", fail)
    pages.get("/map?run=both&wait=1")
    for _ in range(600):
        answer = pages.get("/parts/map?run=both")
        if answer.status_code == 286:
            break
    assert "UMAP ended with -9" in answer.text
    assert "mapgrid" in answer.text


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/map?run=nothing", 404),
        ("/map?colour=x", 400),
        ("/map/points.parquet?run=..", 404),
        ("/parts/map?run=a%2Fb", 404),
    ],
)
def test_addresses_that_do_not_work(pages: TestClient, address: str, status: int) -> None:
    assert pages.get(address).status_code == status


def test_runs_without_images_and_no_store(tmp_path: Path) -> None:
    with TestClient(application(Site(Places(runs=str(tmp_path))))) as pages:
        assert "nothing to lay out" in pages.get("/map").text
        assert pages.get("/parts/map").status_code == 404
