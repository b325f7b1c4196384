"""The server with a real bundle: the scorer's scores in JSON and Arrow, newer vectors, and what the page shows.

Switches under load are in test_workers.py, what a switch refuses in test_app.py."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.store import FeatureStore
from featurestore.upkeep.expiry import expire
from serving.bundle.log import BundleIdentity
from serving.bundle.open import ModelVersion
from serving.http.live import BundleSource
from serving.scoring.request import Request
from serving.scoring.scorer import Scorer
from serving.scoring.sent import ARROW
from serving.settings import ServerSettings
from tests.cli import ran
from tests.fuzz.mutate import stream_of
from tests.serving.http.conftest import NEW_IMAGE, Published
from tests.serving.http.processes import ROOT, ServerProcess, ended

PAGE = ROOT / "docs" / "SERVE.md"
pytestmark = [pytest.mark.services, pytest.mark.long]

ADS = ("ad_item", "ad_image", "ad_category", "ad_scene")
USERS = ("user", "behavior_item", "behavior_image", "behavior_category")


def one_image(key: int) -> dict[str, Any]:
    user = {"user": 1, "behavior_item": [], "behavior_image": [], "behavior_category": []}
    return {"user": user, "candidates": {"ad_item": [1], "ad_image": [key], "ad_category": [1], "ad_scene": [0]}}


@pytest.fixture(scope="module")
def published(bundle: Published, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A copy of the bundle that the tests of this file change."""
    return Published(shutil.copytree(bundle.folder, tmp_path_factory.mktemp("changing") / "published"))


@pytest.fixture(scope="module")
def server(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("published-server")
    words = [published.url, "--port", "0", "--poll-s", "0.1", "--cache-dir", str(folder / "cache")]
    with ended(ServerProcess([sys.executable, "-m", "serving", "serve", *words], folder)) as server:
        server.wait_until_ready()
        yield server


def wait_for_vectors(server: ServerProcess, snapshot: int) -> None:
    server.wait_until(lambda: server.client.get("/").json()["vectors"]["images"] == snapshot)


def test_json_and_arrow_have_the_scorers_scores(server: ServerProcess, bundle: Published) -> None:
    table = pq.read_table(bundle.samples, columns=[*USERS, *ADS, "label"]).slice(0, 30)
    sides = {"user": USERS, "candidates": ADS}
    requests = [{side: {name: row[name] for name in sides[side]} for side in sides} for row in table.to_pylist()]
    scored = Scorer.open(bundle.url).score([Request(**each) for each in requests])
    together = server.client.post("/v1/score?logits=true", json=requests).json()["answers"]
    answer = server.client.post("/v1/score", content=stream_of(table), headers={"content-type": ARROW})
    by_arrow: list[Any] = pa.ipc.open_stream(answer.content).read_all()["logit"].to_pylist()
    for request, expected, answer, row in zip(requests, scored, together, by_arrow, strict=True):
        alone = server.client.post("/v1/score?logits=true", json=request).json()
        for found in (alone["logits"], answer["logits"], row):
            np.testing.assert_allclose(found, expected.logits_C, atol=1e-5)
        np.testing.assert_allclose(alone["scores"], expected.probabilities(), atol=1e-6)
        assert (alone["unknown"], alone["missing"]) == (answer["unknown"], answer["missing"])


def test_a_new_image_needs_no_restart_and_old_vectors_expire(server: ServerProcess, published: Published) -> None:
    def answer(key: int = NEW_IMAGE) -> dict[str, Any]:
        return server.client.post("/v1/score", json=one_image(key)).raise_for_status().json()

    first = answer()
    assert first["missing"] == {"ad_image": [0]}
    before = first["vectors"]["images"]
    published.add_image()
    wait_for_vectors(server, before + 1)
    later = answer()
    assert later["missing"] == {} and later["scores"] != first["scores"]
    # What the scorer has open goes away below it: it scores on, and then takes the newest vectors.
    for seed in (1, 2):
        published.add_image(seed=seed)
    version = ModelVersion.open(published.url)
    (of,) = version.manifest.vectors
    expire(FeatureStore.open(version.vectors_url(of)), keep_last=1, keep_days=0, grace_days=0)
    assert answer()
    wait_for_vectors(server, before + 3)
    assert answer(1_001)["missing"] == {}


def blocks(language: str) -> list[str]:
    """The blocks of code of docs/SERVE.md in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_what_the_page_shows_works(server: ServerProcess, published: Published, tmp_path: Path) -> None:
    """And what the server's first page says to try, copied as it is."""

    def in_shell(line: str) -> Any:
        return json.loads(ran("bash", "-c", line, cwd=tmp_path).stdout)

    request = json.loads(blocks("json")[0])
    expected = server.client.post("/v1/score", json=request).json()
    assert expected.keys() == json.loads(blocks("json")[1]).keys()
    assert expected["missing"] == {"behavior_image": [0], "ad_image": [2]}  # image 1003 is gone here
    (tmp_path / "request.json").write_text(json.dumps(request))
    assert in_shell(blocks("sh")[0].replace("localhost:8080", f"{server.host}:{server.port}")) == expected
    (to_try,) = re.findall(r'"try":"([^"]*)"', server.client.get("/").text)
    assert "$TOKEN" not in to_try and len(in_shell(to_try)["scores"]) == 3
    by_json, by_arrow, by_tensors = (
        code.replace("localhost:8080", f"{server.host}:{server.port}") for code in blocks("python")
    )
    names: dict[str, Any] = {"request": request}
    exec(by_json, names)
    assert names["scores"] == expected["scores"]
    names = {"samples": published.samples}
    exec(by_arrow, names)
    assert [len(scores) for scores in names["scores"]] == [len(each) for each in names["table"]["ad_item"].to_pylist()]
    names = {}
    exec(by_tensors, names)
    np.testing.assert_allclose(names["scores"][:2], expected["scores"][:2], atol=1e-6)  # the third has an image here


def test_newer_vectors_keep_the_network_and_the_rows(published: Published, tmp_path: Path) -> None:
    source = BundleSource(ServerSettings(model=published.url, name="ctr", cache_dir=tmp_path))
    first = source.open(source.newest(), None)
    published.add_image(NEW_IMAGE + 1)
    newest = source.newest()
    assert newest == BundleIdentity(1, {"images": first.identity.vectors["images"] + 1})
    second = source.open(newest, first)
    assert (second.identity, second.network, second.ids) == (newest, first.network, first.ids)
    first.close()
    assert np.isfinite(second.score([Request(**one_image(NEW_IMAGE))])[0].logits_C).all()
