"""The page of the map: how far it is, then the map, its file, and what may be asked for."""

import io
import json
import re
import threading
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from explorer.data import map as maps
from explorer.data.background import Task
from explorer.data.map import make_map
from explorer.html import charts
from explorer.html.site import Site
from explorer.pages.maps import MapPages
from explorer.places import Places
from explorer.server import application
from featurestore import FeatureRows, FeatureStore
from tests.explorer.world import World
from tests.trainer.conftest import Places as Settings
from tests.trainer.whole_runs import run_alone
from trainer.runs.saved import network_widths, read_run
from trainer.schema.fields import DEFAULT_SCHEMA


def read(pages: TestClient, address: str) -> str:
    """Ask for a map until it is there, or says why there is none."""
    while "hx-get" in (text := pages.get(address, params=None).text):
        assert "The map is being made" in text
    return text


def test_the_map_is_polled_until_it_is_there(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def later(*args: Any) -> Any:
        assert go.wait(60)
        return make_map(*args)

    monkeypatch.setattr("explorer.pages.maps.make_map", later)
    monkeypatch.setattr("explorer.html.site._POLL_S", 0.5)
    with TestClient(application(Site(world.places()))) as pages:
        html = pages.get("/map", params={"run": "both"}).text
        assert "The map is being made" in html
        part = unescape(re.search(r'hx-get="(/map[^"]*)"', html)[1])  # type: ignore[index]
        waiting = pages.get(part).text
        assert "mapgrid" not in waiting
        assert part in unescape(waiting)
        go.set()
        whole = read(pages, part)
        assert "two principal components" in whole
        assert whole.count("<li style=") == len(re.findall(r'<a href="/images/-?\d+"><img ', whole)) > 3
        assert "hx-get" not in pages.get("/map?run=both").text


POINTS = r'href="(/map/points/[^"]*)" download="([^"]*)"'


def test_its_file_is_parquet_also_after_a_newer_snapshot(changing_world: World) -> None:
    with TestClient(application(Site(changing_world.places()))) as pages:
        html = read(pages, "/map?run=both-longer&wait=map")
        link, name = re.search(POINTS, html).groups()  # type: ignore[union-attr]
        store = FeatureStore.open(changing_world.store)
        store.put(FeatureRows.of(["new"], np.ones((1, store.info.dim), np.float32)))
        answer = pages.get(link)
    assert (answer.status_code, name) == (200, "map-both-longer.parquet")
    assert "uri" in pq.read_table(io.BytesIO(answer.content)).column_names
    assert re.search(r"embedding-atlas \S+\.parquet --vector vector", html)


@pytest.mark.parametrize("colour", ["folder", "category", "ctr"])
def test_each_colour_is_drawn(pages: TestClient, colour: str) -> None:
    html = read(pages, f"/map?run=both&colour={colour}&wait=map")
    assert 'id="map"' in html
    assert "<script>alert" not in html
    assert "onerror=alert" not in re.sub(r"<script type=.*?</script>|\"[^\"]*\"", "", html)


def figure_of(html: str) -> dict[str, Any]:
    """Read the figure of the map as the browser does."""
    found = re.search(r'data-plot="map">(.*?)</script>', html, re.S)
    assert found is not None
    figure: dict[str, Any] = json.loads(found[1])
    return figure


def test_points_have_pages_and_pictures_groups_and_a_legend(pages: TestClient, world: World) -> None:
    figure = figure_of(read(pages, "/map?run=both&colour=folder&wait=map"))
    assert figure["layout"]["showlegend"] and figure["zoom"]
    assert {"shoes", "new", "copies"} <= {trace["name"] for trace in figure["data"]}
    links = [each for trace in figure["data"] for each in trace["customdata"]]
    assert len(links) == 28
    for page, picture in links:
        assert pages.get(page).status_code == 200
        assert pages.get(picture).headers["content-type"] == "image/jpeg"
    names = {trace["name"] for trace in figure_of(read(pages, "/map?run=both&colour=category&wait=map"))["data"]}
    table = pq.read_table(world.samples / "test", partitioning=None)
    categories = {str(each) for row in table["ad_category"].to_pylist() for each in row}
    assert names - {"no category", "others"} <= categories and len(names) > 2
    with TestClient(application(Site(world.places(), frozen=True))) as frozen:
        traces = figure_of(frozen.get("/map").text)["data"]
        assert all(each == [None, None] for trace in traces for each in trace["customdata"])


def test_a_search_rings_the_points_that_it_finds(pages: TestClient) -> None:
    html = read(pages, "/map?run=both&q=SHOE-0&wait=map")
    (found,) = [trace for trace in figure_of(html)["data"] if trace["name"] == "found"]
    assert len(found["x"]) == 9 and all("shoe-0" in text for text in found["text"])
    assert '9 of all points have “SHOE-0” in their names: ringed <a href="#points">on the map</a>' in html
    before, _, after = html.partition("<h2>One image for each part of the map</h2>")
    assert before.count('<a href="/images/') == 9 and '<h2 id="points">' in after  # what is found comes first
    none = read(pages, "/map?run=both&q=nobody&wait=map")
    assert "0 of all points" in none
    assert not [trace for trace in figure_of(none)["data"] if trace["name"] == "found"]


def test_a_run_is_chosen_that_sees_images(pages: TestClient) -> None:
    html = pages.get("/map").text
    assert 'aria-current="true">run both</a>' in html
    assert "run=ids-only" not in html
    blind = read(pages, "/map?run=ids-only&wait=map")
    assert "has no E for images, so no map; choose another run" in blind
    assert "--" not in blind.partition("<main")[2]


def test_runs_without_images(tmp_path: Path) -> None:
    with TestClient(application(Site(Places(runs=str(tmp_path))))) as pages:
        assert "nothing to lay out" in pages.get("/map").text


def test_of_several_contents_each_has_its_map(world: World, tmp_path: Path) -> None:
    """A run with an E for the images of ads, and one for those of behaviours, of stores of their own."""
    schema, of_ad = tmp_path / "schema.yaml", "side: ad, kind: content, store: "
    schema.write_text(DEFAULT_SCHEMA.read_text().replace(f"{of_ad}images", f"{of_ad}ads"))
    two = {"data__schema_file": schema, "data__stores": f"{{ads: {world.folder / 'features'}}}"}
    two |= {"train__max_steps": 1, "data__missing": "zeros"}
    run_alone(Settings(world.folder), run__name="two", run__dir=tmp_path / "runs", **two)
    places = world.places(runs=tmp_path / "runs")
    with TestClient(application(Site(places))) as pages:
        html = read(pages, "/map?run=two&wait=map")
        found = {
            word: unescape(link)
            for link, word in re.findall(r'<a href="([^"]*network[^"]*)"[^>]*>(images|ads)</a>', html)
        }
        assert sorted(found) == sorted(network_widths(read_run(tmp_path / "runs" / "two")))
        assert html.count('aria-current="true">images<') == 1
        spots = []
        for name, link in found.items():
            html = read(pages, f"{link}&wait=map")
            assert f'aria-current="true">{name}</a>' in html
            file = re.search(POINTS, html)[1]  # type: ignore[index]
            spots.append(pq.read_table(io.BytesIO(pages.get(file).content))["x"].to_pylist())
        assert len(spots) == 2 and spots[0] != spots[1]
        other = read(pages, "/map?run=two&network=x&wait=map")
        assert "has no content &#39;x&#39;; it has images, ads" in other
    frozen = Site(places, frozen=True)
    with TestClient(application(frozen)) as pages:
        assert "hx-" not in pages.get("/map").text
    assert all(any(f"network={name}&" in each for each in frozen.linked) for name in found)


def test_images_that_the_store_has_not_lead_nowhere(world: World) -> None:
    places = world.places()
    with TestClient(application(Site(places))) as pages:
        assert 'href="/images/' in read(pages, "/map?run=both&wait=map")
    site = Site(places)
    links = MapPages(site)._links(has_pages=False)
    shown = {"points": make_map(places, "both", Task()), "run": "both", "network": None, "colour": "folder"}
    shown |= {"has_pages": False, "links": links, "query": "", "found": None, "problem": ""}
    text = site.text("/map", "map/part.html", maps=charts, laid_out=maps, **shown)
    assert "/images/" not in text
    assert "mapgrid" in text
