"""The pages of impressions over HTTP: what they show, what is typed into them, and what is not there any more."""

import html
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from explorer.data.impressions import impression_list
from explorer.data.impressions.open_runs import OpenedRun
from explorer.places import Places
from explorer.problems import Problem
from featurestore.format.datafile import FeatureRows
from featurestore.keys import key_of_uri
from featurestore.store import FeatureStore
from featurestore.upkeep.expiry import expire
from tests.explorer.serving import client_of
from tests.explorer.world import HOSTILE, PLAIN, UNKNOWN, World
from tests.trainer.conftest import Places as SamplePlaces
from tests.trainer.conftest import make_places
from tests.trainer.whole_runs import run_alone
from trainer.comm import SoloComm
from trainer.evaluation.predict import score_run
from trainer.runs.saved import RunSource

pytestmark = pytest.mark.long


def test_the_list_is_fetched_after_the_page_is_shown(world: World) -> None:
    with client_of(world.places()) as client:
        shell = client.get("/impressions").text
        assert 'hx-get="/impressions?wait=list"' in shell
        assert "Why " not in shell
        assert "Why " in client.get("/impressions?wait=list&run=both").text
        assert "Why " in client.get("/impressions").text  # it is known now
        assert "IDs alone" in client.get("/impressions?run=ids-only&wait=list").text


def test_the_scores_shown_are_those_of_the_job(pages: TestClient, world: World, tmp_path: Path) -> None:
    score_run(RunSource(world.runs / "both"), str(tmp_path / "scores.parquet"), SoloComm())
    names = ["row", "place", "probability", "label"]
    rows = list(zip(*pq.read_table(tmp_path / "scores.parquet", columns=names).to_pydict().values(), strict=True))
    expected = {(row, place): probability for row, place, probability, _ in rows}

    def listed(query: str) -> list[tuple[str, ...]]:
        text = pages.get(f"/impressions?wait=list&{query}").text
        return re.findall(r'href="/impressions/both/(\d+)\?ad=(\d+)".*?Why ([\d.]+) %\?', text, re.S)

    clicked = {(row, place) for row, place, _, label in rows if label == 1}
    assert {(int(row), int(place)) in clicked for row, place, _ in listed("clicked=yes")} == {True}
    assert {(int(row), int(place)) in clicked for row, place, _ in listed("clicked=no")} == {False}
    shown = listed("order=score")
    assert len(shown) == 24
    best = sorted(expected.values(), reverse=True)[:24]
    for (group, place, percent), probability in zip(shown, best, strict=True):
        assert expected[int(group), int(place)] == pytest.approx(probability, abs=1e-4)
        assert float(percent) == pytest.approx(100 * probability, abs=0.02)
    group, place = shown[0][:2]
    page = pages.get(f"/impressions/both/{group}?ad={place}&wait=why").text
    for (row, at), probability in expected.items():
        if row == int(group):
            near = {f"{100 * probability + change:.2f} %" for change in (-0.01, 0, 0.01)}
            assert any(each in page for each in near), (row, at, probability)
    assert "IDs only: ids-only" in page


@pytest.mark.parametrize(
    "query", ["", "order=raised&page=2", "order=lowered", "clicked=yes", "clicked=no&order=order", "page=99999999"]
)
def test_orders_and_filters(pages: TestClient, query: str) -> None:
    text = pages.get(f"/impressions?wait=list&{query}").text.partition('<div id="list">')[2]
    assert "Why " in text
    assert "This copy" not in text
    assert "clicked=yes" not in query or "not clicked" not in text
    assert "clicked=no" not in query or ">clicked<" not in text


def test_a_search_finds_users_ads_and_pictures(pages: TestClient, world: World) -> None:
    table = pq.read_table(world.samples / "test" / "day=2026-01-05.parquet", partitioning=None)
    user, ads = table["user"][3].as_py(), table["ad_item"].to_pylist()
    expected = sum(len(each) for each, name in zip(ads, table["user"].to_pylist(), strict=True) if name == user)
    expected += sum(item == user for each in ads for item in each)
    text = pages.get(f"/impressions?wait=list&q={user}").text
    assert re.search(r"<p>(\d+) of", text).group(1) in {str(n) for n in range(1, expected + 1)}  # type: ignore[union-attr]
    keys = [key for each in table["ad_image"].to_pylist() for key in each]
    for query in (PLAIN[0], str(key_of_uri(PLAIN[0]))):
        shown = pages.get("/impressions", params={"wait": "list", "q": query}).text
        assert f"<p>{keys.count(key_of_uri(PLAIN[0]))} of" in shown
        assert "have it in their" not in shown
    assert "No impression is like that" in pages.get("/impressions?wait=list&q=nobody%20at%20all").text


def own_of(page: str) -> str:
    """Cut out what a page says of the ad with the picture that was typed; empty where it says nothing."""
    return page.partition("Yours:")[2].partition("</li>")[0]


def send(pages: TestClient, run: str, ad: str, data: bytes) -> Any:
    """Send a picture for an ad of group 3."""
    return pages.post(f"/impressions/{run}/3/sent", data={"ad": ad}, files={"picture": ("x.jpg", data)})


@pytest.mark.parametrize("run", ["both", "ids-only"])
@pytest.mark.parametrize(
    ("typed", "is_known"),
    [
        *((each, True) for each in (PLAIN[3], str(key_of_uri(PLAIN[3])), HOSTILE[0])),
        *((each, False) for each in (UNKNOWN, "5", "../../etc/passwd", "nope.jpg", "<script>alert(1)</script>")),
    ],
)
def test_a_picture_is_typed(pages: TestClient, run: str, typed: str, is_known: bool) -> None:
    """One of the store has a score, and others do not."""
    text = pages.get(f"/impressions/{run}/3", params={"picture": typed, "wait": "why"}).text
    own = own_of(text)
    assert (bool(re.search(r"[\d.]+ %", own)), own != "") == (is_known, is_known)
    assert (Problem.NO_IMAGE_OF_NAME in html.unescape(text)) == (not is_known) and "missing image" not in own
    assert html.escape(typed) in text or is_known
    assert "<script>alert" not in text


def test_sentences(pages: TestClient) -> None:
    wrong = html.unescape(pages.get("/impressions/both/3?ad=abc&wait=why").text)
    assert Problem.NOT_WHOLE.of("ad", "abc", 0) in wrong
    text = pages.get("/impressions/both/3?ad=1&wait=why").text
    assert '<form method="get" action="/impressions/both/3#another-picture">' in text
    assert "Effect of the removed part</th>" in text
    assert "every image missing</th>" in text  # not: not trained for it
    for each in (text, pages.get("/impressions?run=both&wait=list").text):
        assert "While it was trained, this run met images without a feature" in each
    assert re.search(r"without images [\d.]+ %, rank \d+ \(", text)


def test_a_picture_is_sent(pages: TestClient, world: World) -> None:
    """The picture of an image of the store: the ad gets what it gets with the look of that image."""
    known = pages.get("/impressions/both/3", params={"picture": PLAIN[5], "ad": 1, "wait": "why"}).text
    (expected,) = re.findall(r"look alone ([\d.]+) %", own_of(known))
    assert 'action="/impressions/both/3/sent"' in known
    answer = send(pages, "both", "1", (world.images / PLAIN[5]).read_bytes())
    assert answer.status_code == 200
    (found,) = re.findall(r"With your picture the ad would get ([\d.]+) %", answer.text)
    assert float(found) == pytest.approx(float(expected), abs=0.02)
    assert "data:image/jpeg;base64," in answer.text
    assert re.findall(r"Yours:</b> look alone ([\d.]+) %", answer.text) == [found]
    assert "Without any picture it would get" in answer.text and "forecast" not in answer.text


def test_scores_without_images_of_a_run_that_has_not_met_any_are_not_called_a_forecast(
    pages: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenedRun, "knows_missing", property(lambda opened: False))
    monkeypatch.setattr("trainer.runs.saved.SavedRun.met_missing_often", property(lambda saved: False))
    listed = pages.get("/impressions?run=both&wait=list").text
    assert "A score without images is not a forecast" in listed and "without images, not a forecast:" in listed
    group = pages.get("/impressions/both/3?ad=1&wait=why").text
    assert "every image missing (not a forecast)</th>" in group and "is not a forecast" in group
    answer = send(pages, "both", "1", (world.images / PLAIN[5]).read_bytes()).text
    assert "is not a forecast" in answer and "Without any picture it would get" not in answer


@pytest.mark.parametrize(
    ("run", "ad", "is_picture", "status"),
    [
        ("both", "0", False, 400),
        ("both", "99", True, 404),
        ("both", "x", True, 400),
        ("ids-only", "0", True, 400),
        ("nobody", "0", True, 404),
    ],
)
def test_what_cannot_be_sent(pages: TestClient, world: World, run: str, ad: str, is_picture: bool, status: int) -> None:
    answer = send(pages, run, ad, (world.images / PLAIN[5]).read_bytes() if is_picture else b"no picture")
    assert answer.status_code == status
    assert 'role="alert"' in answer.text


def test_a_part_tells_what_went_wrong_as_htmx_shows_it(pages: TestClient) -> None:
    answer = pages.get("/impressions/both/80?wait=why", headers={"HX-Request": "true"})
    assert answer.headers["HX-Reselect"] == "[role=alert]"
    assert answer.status_code == 200
    assert Problem.NO_GROUP.of(80, 80) in answer.text


def test_no_runs_and_no_samples(world: World, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    answer = client_of(Places(runs=str(tmp_path / "runs"))).get("/impressions")
    assert answer.status_code == 200
    assert "has a checkpoint yet" in answer.text
    client = client_of(Places(store=str(world.store)))
    assert client.get("/impressions").status_code == 404
    assert "Impressions" not in client.get("/").text
    with client_of(world.places(samples=tmp_path / "nothing")) as client:
        assert client.get("/impressions/both/0?wait=why").status_code == 400
        listed = client.get("/impressions?wait=list")
        assert listed.status_code == 200
        assert "crossmedia samples" in listed.text


@pytest.fixture
def own_run(tmp_path: Path) -> SamplePlaces:
    """A store, samples and a run that a test may damage."""
    own = make_places(tmp_path / "own")
    run_alone(own, run__name="one", train__max_steps=3, data__missing="zeros")
    return own


def test_a_picture_newer_than_the_training_is_found_in_the_newest_snapshot_alone(own_run: SamplePlaces) -> None:
    """A copy of a picture that the training knew has the same look; once that snapshot has expired, pages say so."""
    store, places = FeatureStore.open(own_run.folder / "features"), Places(runs=str(own_run.folder / "runs"))
    table = pq.read_table(own_run.folder / "samples" / "test" / "day=2026-01-01.parquet", partitioning=None)
    known = table["ad_image"][2].as_py()[0]
    with client_of(places) as client:

        def page_of(picture: object, **asked: str) -> str:
            params = {"picture": str(picture), "ad": 0, "wait": "why", **asked}
            return client.get("/impressions/one/1", params=params).text

        def look_of(page: str) -> str:
            assert "missing image" not in own_of(page)
            return own_of(page).partition("look alone")[2].partition("%")[0]

        before = look_of(page_of(known))
        feature_1D = store.snapshot().codec.decode(store.snapshot().get([known]))
        store.put(FeatureRows.of(["new.jpg"], feature_1D, keys=np.array([key_of_uri("new.jpg")])))
        assert Problem.NO_IMAGE_OF_NAME in html.unescape(page_of("new.jpg"))
        assert look_of(page_of("new.jpg", snapshot="newest")) == look_of(page_of(known)) == before != ""
    expire(store, keep_last=1, keep_days=0, grace_days=0)
    with client_of(places) as client:
        answer = client.get("/impressions/one/0?wait=why")
        assert answer.status_code == 200
        assert "has expired" in answer.text
        assert 'href="/impressions/one/0?snapshot=newest"' in answer.text
        assert "has expired" in client.get("/impressions?wait=list").text
        newest = client.get("/impressions/one/0?snapshot=newest&wait=why").text
        assert "which is the newest one and not that of the training" in newest


def test_a_run_that_trains_on_and_samples_that_change(own_run: SamplePlaces) -> None:
    folder = own_run.folder
    with client_of(Places(runs=str(folder / "runs"))) as client:
        before = client.get("/impressions/one/1?wait=why").text
        run_alone(own_run, run__name="one", run__resume="latest", train__max_steps=9, data__missing="zeros")
        after = client.get("/impressions/one/1?wait=why").text
        notice = re.compile(r'class="notice">([^<]*)')
        assert notice.search(before).group(1) != notice.search(after).group(1)  # type: ignore[union-attr]
        file = folder / "samples" / "test" / "day=2026-01-01.parquet"
        table = pq.read_table(file, partitioning=None)
        pq.write_table(table.slice(0, 4), file)
        assert client.get("/impressions/one/50?wait=why").status_code in (400, 404)
        assert client.get("/impressions/one/3?wait=why").status_code == 200
        assert client.get("/impressions/one/50?wait=why").status_code == 404
        shutil.rmtree(folder / "runs" / "one")
        assert client.get("/impressions/one/1?wait=why").status_code == 404


def test_only_some_impressions_are_scored_but_all_are_searched(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pq.read_table(world.samples / "test" / "day=2026-01-05.parquet", partitioning=None)
    users, labels = table["user"].to_pylist(), table["label"].to_pylist()
    num_first = len(labels[0]) + len(labels[1])
    monkeypatch.setattr(impression_list, "MOST", num_first)
    monkeypatch.setattr(impression_list.score_first, "__defaults__", (num_first,))
    others = {*table["ad_item"][0].as_py(), *table["ad_item"][1].as_py(), *users[:2]}
    user = next(each for each in reversed(users) if each not in others)
    with client_of(world.places()) as client:
        text = client.get("/impressions?wait=list").text
        assert f"{num_first} of {num_first} impressions scored" in text
        assert "the first of" in text
        assert {int(n) for n in re.findall(r"/impressions/both/(\d+)\?", text)} == {0, 1}
        found = client.get(f"/impressions?wait=list&q={user}&order=order").text
    groups = [number for number, each in enumerate(users) if each == user]
    assert "those of this user" in found
    shown = sum(len(labels[number]) for number in groups)
    assert f"{shown} of {shown} impressions" in found
    assert {int(n) for n in re.findall(r"/impressions/both/(\d+)\?", found)} <= {*groups}
