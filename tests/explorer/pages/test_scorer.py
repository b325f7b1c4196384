"""The pages of the scorer: versions, a server that starts, its figures, and scores that are those of the run."""

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from explorer.data.scorer.child import ChildScorer
from explorer.errors import ExplorerError
from explorer.export import export
from explorer.html.site import Site
from explorer.pages.scorer import ScorerPages
from explorer.places import Places
from explorer.server import application
from featurestore.errors import TokenFileError
from serving.errors import BundleNotFoundError, ServingError
from serving.scoring.remote import RemoteScorer
from tests.explorer.world import World

pytestmark = pytest.mark.timeout(300)


def places_of(world: World) -> Places:
    return Places(
        store=str(world.store),
        runs=str(world.runs),
        samples=str(world.samples),
        images=str(world.images),
        model=str(world.model),
    )


@pytest.fixture(scope="module")
def served(world: World) -> Iterator[TestClient]:
    """The pages, with a scorer of their own that is ready."""
    with TestClient(application(Site(places_of(world)))) as client:
        assert "is started" in client.get("/scorer").text
        wait_ready(client)
        unasked = client.get("/scorer/part").text
        assert "No request to score has come" in unasked
        assert "<table" not in unasked
        yield client


def wait_ready(client: TestClient) -> None:
    end_s = time.monotonic() + 200
    while "starting" in (text := client.get("/scorer/part").text):
        assert 'hx-trigger="load delay:1s"' in text
        assert time.monotonic() < end_s
        time.sleep(0.2)


def child_of(served: TestClient) -> ChildScorer:
    """The scorer that the pages have started."""
    app: Any = served.app
    pages = next(route.endpoint.__self__ for route in app.routes if getattr(route, "path", "") == "/scorer")
    assert isinstance(pages, ScorerPages) and pages.child is not None
    return pages.child


def asking(served: TestClient, world: World, folder: Path) -> Places:
    """Places whose scorer is that of `served`, as a person names a running one."""
    scorer = child_of(served).scorer()
    assert scorer is not None
    tokens = folder / "tokens"
    tokens.write_text(f"{scorer.token}\n")
    return replace(places_of(world), scorer=scorer.url, scorer_token_file=tokens)


def test_what_is_published(served: TestClient) -> None:
    text = served.get("/scorer").text
    assert "Version 1 is in use" in text
    assert "step-00000012" in text
    assert '<b class="good">in use</b> since' in text
    assert re.search(r"<td>AUC 0\.\d{4}; GAUC 0\.\d{4}; log loss \d\.\d{4}</td>", text)
    assert "gauc_impressions" not in text
    assert "Scorer</a>" in served.get("/").text


def test_a_group_over_http_has_the_scores_of_the_run(served: TestClient, world: World) -> None:
    differences = most_ads = 0
    for number in range(4):
        answer = served.get(f"/scorer/impression/{number}?now=1")
        assert answer.status_code == 200
        assert "Its logits are those of run" in answer.text
        found = [float(each) for each in re.findall(r"logits differ by ([\d.e+-]+)", answer.text)]
        assert max(found) <= 1e-5
        differences += len(found)
        page = served.get(f"/impressions/both/{number}?now=1").text
        shown = set(re.findall(r"by the run ([\d.]+) %", answer.text))
        assert any(f"{each} %" in page for each in shown)
        assert "with another picture" in answer.text
        ads = answer.text.partition("The ads of this group")[2].partition("</ul>")[0]
        ranks = [int(each) for each in re.findall(r"<b>(\d+)\.</b>", ads)]
        assert ranks == list(range(1, len(ranks) + 1))
        scores = [float(each) for each in re.findall(r"over HTTP ([\d.]+) %", ads)]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == len(ranks)
        most_ads = max(most_ads, len(ranks))
        assert "Scores without images, and the attention of each behaviour, are not here" in answer.text
    assert differences > 4 * 12
    assert most_ads > 1
    shell = served.get("/scorer/impression/0").text
    assert 'hx-get="/scorer/impression/0/part?ad=0"' in shell
    assert "Score this group over HTTP" in served.get("/impressions/both/0?now=1").text
    assert "Score this group over HTTP" not in served.get("/impressions/ids-only/0?now=1").text


def test_figures_count_what_was_asked(served: TestClient) -> None:
    def answered() -> int:
        found = re.search(r"([\d,]+) answered 200", served.get("/scorer/part").text)
        return int(found.group(1)) if found else 0

    before = answered()
    served.get("/scorer/impression/2/part")
    text = served.get("/scorer/part").text
    assert "No request to score has come" not in text
    assert answered() in (before + 2, before + 3)  # the group, other pictures, and users without a behaviour, if any
    assert "Age of the vectors of images" in text
    for stage in ("read", "wait", "parse", "score", "encode"):
        assert f'<th scope="row">{stage}</th>' in text
    assert '<th scope="row">ad_image</th>' in text


@pytest.mark.parametrize("address", ["/scorer/impression/80", "/scorer/impression/x", "/scorer/impression/" + "9" * 99])
def test_groups_that_are_not_there(served: TestClient, address: str) -> None:
    assert served.get(f"{address}?now=1").status_code == 404
    if address.endswith("80"):
        part = served.get(f"{address}/part")
        assert part.status_code == 200
        assert "there is no sample group 80" in part.text


def test_a_running_scorer_is_asked(served: TestClient, world: World, tmp_path: Path) -> None:
    places = asking(served, world, tmp_path)
    places.check()
    with TestClient(application(Site(places))) as client:
        assert "Answers with" in client.get("/scorer/part").text
        assert "Its logits are those of run" in client.get("/scorer/impression/1?now=1").text
    without = replace(places, scorer_token_file=None)
    with TestClient(application(Site(without))) as client:
        assert "401" in client.get("/scorer/part").text
    gone = replace(places, scorer="http://127.0.0.1:1")
    with TestClient(application(Site(gone))) as client:
        part = client.get("/scorer/part")
        assert part.status_code == 200
        assert "does not answer" in part.text
        assert client.get("/scorer").status_code == httpx2.codes.OK


def test_options_that_do_not_go_together(world: World, tmp_path: Path) -> None:
    with pytest.raises(ExplorerError, match="--model"):
        Places(store=str(world.store), scorer="http://127.0.0.1:8080").check()
    with pytest.raises(ExplorerError, match="http://HOST:PORT"):
        replace(places_of(world), scorer="127.0.0.1:8080").check()
    with pytest.raises(ExplorerError, match="name it by --scorer"):
        replace(places_of(world), scorer_token_file=tmp_path / "tokens").check()
    with pytest.raises(TokenFileError):
        replace(places_of(world), scorer="http://127.0.0.1:1", scorer_token_file=tmp_path / "no").check()
    with pytest.raises(BundleNotFoundError):
        replace(places_of(world), model=str(tmp_path)).check()


def test_a_model_that_goes_away(world: World, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.model, model)
    with TestClient(
        application(Site(replace(places_of(world), model=str(model), scorer="http://127.0.0.1:1")))
    ) as client:
        assert client.get("/scorer").status_code == 200
        shutil.rmtree(model)
        answer = client.get("/scorer")
        assert answer.status_code == 400
        assert "has no published model" in answer.text
        assert client.get("/impressions/both/0?now=1").status_code == 200


def test_a_run_that_is_not_there_or_has_trained_on(served: TestClient, world: World, tmp_path: Path) -> None:
    asked = asking(served, world, tmp_path)
    (tmp_path / "empty").mkdir()
    with TestClient(application(Site(replace(asked, runs=str(tmp_path / "empty"))))) as client:
        assert "--runs has none of that name" in client.get("/scorer/impression/0/part").text
    shutil.copytree(world.runs / "both-longer", tmp_path / "runs" / "both")
    with TestClient(application(Site(replace(asked, runs=str(tmp_path / "runs"))))) as client:
        assert "has a newer checkpoint now" in client.get("/scorer/impression/0/part").text


def test_it_answers_with_its_token_alone_and_is_seen_to_be_killed(served: TestClient) -> None:
    """The last test of it."""
    child = child_of(served)
    pid, scorer = child.pid, child.scorer()
    assert pid is not None and scorer is not None
    assert scorer.url.startswith("http://127.0.0.1:")
    assert b"serving_model_version 1.0" in scorer.read("/metrics")
    with pytest.raises(ServingError, match="401"):
        RemoteScorer(scorer.url).read("/metrics")
    os.kill(pid, signal.SIGKILL)
    end_s = time.monotonic() + 60
    while child.state().phase != "ended":
        assert time.monotonic() < end_s
        time.sleep(0.02)
    assert child.scorer() is None


def test_an_export_starts_no_server(world: World, tmp_path: Path) -> None:
    places = Places(model=str(world.model))
    exported = export(places, tmp_path / "pages", 100, lambda done, known: None)
    assert exported.errors == []
    page = next((tmp_path / "pages" / "pages").glob("scorer-*.html")).read_text()
    assert "Version 1 is in use" in page
    assert "left out of this copy" in page
    assert "hx-" not in page
