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

from explorer.data.map import make_map
from explorer.html.site import Site
from explorer.places import Places
from explorer.problems import Problem
from explorer.server import application
from featurestore import FeatureRows, FeatureStore
from tests.explorer.serving import client_of, whole
from tests.explorer.world import World
from tests.trainer.conftest import Places as Settings
from tests.trainer.whole_runs import run_alone
from trainer.runs.saved import network_widths, read_run
from trainer.schema.fields import DEFAULT_SCHEMA


def test_the_map_is_polled_until_it_is_there(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def later(*args: Any) -> Any:
        assert go.wait(60)
        return make_map(*args)

    monkeypatch.setattr("explorer.pages.maps.make_map", later)
    monkeypatch.setattr("explorer.html.site._POLL_S", 0.5)
    with client_of(world.places()) as pages:
        html = pages.get("/map", params={"run": "both"}).text
        assert "The map is being made" in html
        part = unescape(re.search(r'hx-get="(/map[^"]*)"', html)[1])  # type: ignore[index]
        waiting = pages.get(part).text
        assert "mapgrid" not in waiting
        assert part in unescape(waiting)
        go.set()
        html = whole(pages, part)
        assert "two principal components" in html
        assert html.count("<li style=") == len(re.findall(r'<a href="/images/-?\d+"><img ', html)) > 3
        assert "hx-get" not in pages.get("/map?run=both").text


POINTS = r'href="(/map/points/[^"]*)" download="([^"]*)"'


def test_its_file_is_parquet_also_after_a_newer_snapshot(changing_world: World) -> None:
    with client_of(changing_world.places()) as pages:
        html = whole(pages, "/map?run=both-longer&wait=map")
        link, name = re.search(POINTS, html).groups()  # type: ignore[union-attr]
        store = FeatureStore.open(changing_world.store)
        store.put(FeatureRows.of(["new"], np.ones((1, store.info.dim), np.float32)))
        answer = pages.get(link)
    assert (answer.status_code, name) == (200, "map-both-longer.parquet")
    assert "uri" in pq.read_table(io.BytesIO(answer.content)).column_names
    assert re.search(r"embedding-atlas \S+\.parquet --vector vector", html)


@pytest.mark.parametrize("colour", ["folder", "category", "ctr"])
def test_each_colour_is_drawn(pages: TestClient, colour: str) -> None:
    html = whole(pages, f"/map?run=both&colour={colour}&wait=map")
    assert 'id="map"' in html
    assert "<script>alert" not in html
    assert "onerror=alert" not in re.sub(r"<script type=.*?</script>|\"[^\"]*\"", "", html)


def traces_of(html: str) -> list[dict[str, Any]]:
    """Read the traces of the map's figure as the browser does."""
    figure = json.loads(re.search(r'data-plot="map">(.*?)</script>', html, re.S)[1])  # type: ignore[index]
    assert figure["layout"]["showlegend"] and figure["zoom"]
    return figure["data"]


def test_points_have_pages_and_pictures_groups_and_a_legend(pages: TestClient, world: World) -> None:
    traces = traces_of(whole(pages, "/map?run=both&colour=folder&wait=map"))
    assert {"shoes", "new", "copies"} <= {trace["name"] for trace in traces}
    links = [each for trace in traces for each in trace["customdata"]]
    assert len(links) == 28
    for page, picture in links:
        assert pages.get(page).status_code == 200
        assert pages.get(picture).headers["content-type"] == "image/jpeg"
    names = {trace["name"] for trace in traces_of(whole(pages, "/map?run=both&colour=category&wait=map"))}
    table = pq.read_table(world.samples / "test", partitioning=None)
    categories = {str(each) for row in table["ad_category"].to_pylist() for each in row}
    assert names - {"no category", "others"} <= categories and len(names) > 2


def test_points_lead_nowhere_in_an_export_and_without_their_store(world: World) -> None:
    with client_of(world.places(), frozen=True) as frozen:
        traces = traces_of(frozen.get("/map").text)
        assert all(each == [None, None] for trace in traces for each in trace["customdata"])
    with client_of(world.places(store=None)) as pages:
        html = whole(pages, "/map?run=both&wait=map")
        assert "mapgrid" in html and "/images/" not in html


def test_a_search_rings_the_points_that_it_finds(pages: TestClient) -> None:
    html = whole(pages, "/map?run=both&q=SHOE-0&wait=map")
    (found,) = [trace for trace in traces_of(html) if trace["name"] == "found"]
    assert len(found["x"]) == 9 and all("shoe-0" in text for text in found["text"])
    assert '9 of all points have “SHOE-0” in their names: ringed <a href="#points">on the map</a>' in html
    before, _, after = html.partition("<h2>One image for each part of the map</h2>")
    assert before.count('<a href="/images/') == 9 and '<h2 id="points">' in after  # what is found comes first
    none = whole(pages, "/map?run=both&q=nobody&wait=map")
    assert "0 of all points" in none
    assert not [trace for trace in traces_of(none) if trace["name"] == "found"]


def test_a_run_is_chosen_that_sees_images(pages: TestClient, tmp_path: Path) -> None:
    html = pages.get("/map").text
    assert 'aria-current="true">run both</a>' in html
    assert "run=ids-only" not in html
    blind = whole(pages, "/map?run=ids-only&wait=map")
    assert Problem.NO_IMAGES.of("ids-only") in blind
    assert "--" not in blind.partition("<main")[2]
    assert "nothing to lay out" in client_of(Places(runs=str(tmp_path))).get("/map").text


def test_of_several_contents_each_has_its_map(world: World, tmp_path: Path) -> None:
    """A run with an E for the images of ads, and one for those of behaviours, of stores of their own."""
    schema, of_ad = tmp_path / "schema.yaml", "side: ad, kind: content, store: "
    schema.write_text(DEFAULT_SCHEMA.read_text().replace(f"{of_ad}images", f"{of_ad}ads"))
    two = {"data__schema_file": schema, "data__stores": f"{{ads: {world.folder / 'features'}}}"}
    two |= {"train__max_steps": 1, "data__missing": "zeros"}
    run_alone(Settings(world.folder), run__name="two", run__dir=tmp_path / "runs", **two)
    places = world.places(runs=tmp_path / "runs")
    with client_of(places) as pages:
        html = whole(pages, "/map?run=two&wait=map")
        links = re.findall(r'<a href="([^"]*network[^"]*)"[^>]*>(images|ads)</a>', html)
        assert sorted(name for _, name in links) == sorted(network_widths(read_run(tmp_path / "runs" / "two")))
        assert html.count('aria-current="true">images<') == 1
        spots = []
        for link, name in links:
            html = whole(pages, f"{unescape(link)}&wait=map")
            assert f'aria-current="true">{name}</a>' in html
            file = re.search(POINTS, html)[1]  # type: ignore[index]
            spots.append(pq.read_table(io.BytesIO(pages.get(file).content))["x"].to_pylist())
        assert len(spots) == 2 and spots[0] != spots[1]
        other = whole(pages, "/map?run=two&network=x&wait=map")
        assert Problem.NO_CONTENT.of("two", "x", "images, ads") in unescape(other)
    frozen = Site(places, frozen=True)
    with TestClient(application(frozen)) as pages:
        assert "hx-" not in pages.get("/map").text
    assert all(any(f"network={name}&" in each for each in frozen.linked) for _, name in links)
