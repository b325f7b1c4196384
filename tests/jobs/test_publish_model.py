"""The jobs export_model and publish_vectors as a person types them, with the network, also as compiled code."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer

from featurestore import FeatureRows, FeatureStore
from featurestore.storage.storage import Storage
from featurestore.upkeep.compaction import compact
from jobs import export_model, publish_vectors
from pipeline.problems import Problem
from serving.bundle import log
from serving.bundle.manifest import SAMPLE
from serving.network.served import PORTABLE, compiled_name
from serving.scoring.scorer import Scorer
from tests.cli import invoke
from tests.cli import printed as done
from tests.pages import check_page
from tests.raised import told
from tests.serving.scoring.variants import SERVED, compiled, shared_places, train_run
from tests.trainer.conftest import Places, make_places

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    places = make_places(tmp_path_factory.mktemp("places"))
    train_run(places, "both")
    train_run(places, "ids", **SERVED["images_none"])
    return places


@pytest.fixture(scope="module")
def text(places: Places) -> str:
    """What the job prints of the model that the tests below share."""
    run, out = places.folder / "runs" / "both", places.folder / "model"
    also = ("--json", places.folder / "export.json", "--html", places.folder / "export.html")
    return done(export_model.app, "--run", run, "--out", out, *also)


@pytest.fixture
def model(places: Places, text: str) -> str:
    return str(places.folder / "model")


def test_the_job_tells_what_it_published(places: Places, text: str, model: str, tmp_path: Path) -> None:
    assert "id rows      224 in 5 tables, 10,752 bytes" in text
    assert f"vectors      images: 50 images of snapshot 1 of {places.folder}/features, 12 numbers each" in text
    assert f"published    version 1 of {places.folder}/model, in use" in text
    figures = json.loads((places.folder / "export.json").read_text())
    assert (figures["version"], figures["in_use"], figures["metrics"]["impressions"]) == (1, True, 210)
    assert {file["name"] for file in figures["files"]} >= {"network.pt2", "ids-12.bin", SAMPLE}
    page = check_page((places.folder / "export.html").read_text(encoding="utf-8"))
    assert all(line[13:].strip() == page.value(line[:13].strip())[0] for line in text.splitlines())
    scorer = Scorer.open(model, cache_dir=tmp_path)
    assert 0 < pq.read_table(scorer.files.path(SAMPLE)).num_rows <= 64


def test_a_worse_model_is_published_and_not_put_in_use(
    places: Places, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its network is copied from the shared model: it would be written again as it is."""
    (written,) = Path(model).glob(f"bundles/*/{PORTABLE}")
    export = "serving.bundle.export.export_network"
    monkeypatch.setattr(export, lambda network, config, folder, **_: [Path(shutil.copy(written, folder))])
    out, json_file = tmp_path / "model", tmp_path / "export.json"
    good, bad = places.folder / "runs" / "ids", places.folder / "runs" / "bad"
    train_run(places, "bad", **SERVED["images_none"], optim__lr=1, optim__ids_lr=1, model__activation="prelu")
    assert "gate" not in done(export_model.app, "--run", good, "--out", out)  # nothing is in use yet
    refused = invoke(export_model.app, "--run", bad, "--out", out, "--json", json_file)
    assert refused.exit_code == export_model.REFUSED == 3
    assert f"published    version 2 of {out}, not in use yet" in refused.stdout
    (line,) = refused.stderr.splitlines()
    assert f"version 2 of {out} is not put in use: " in line
    assert "logloss is " in line
    figures = json.loads(json_file.read_text())
    assert (figures["in_use"], {each["gate"] for each in figures["gates"]}) == (False, {"gauc", "logloss"})
    assert log.version_in_use(Storage(str(out))) == 1
    assert "in use\n" in done(export_model.app, "--run", bad, "--out", out, "--no-gate")
    assert log.version_in_use(Storage(str(out))) == 3
    assert "gate         logloss is " in done(export_model.app, "--run", good, "--out", out)
    assert log.version_in_use(Storage(str(out))) == 4


@pytest.mark.timeout(900)
def test_compiled_code_of_this_machine_is_taken(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    made, text = compiled(shared_places(tmp_path_factory))
    assert f"compiled     {compiled_name()}" in text
    quick = Scorer.open(made.url, cache_dir=tmp_path)
    done(export_model.app, "--run", made.run, "--out", tmp_path / "portable")
    portable = Scorer.open(str(tmp_path / "portable"), cache_dir=tmp_path)
    assert quick.manifest.vectors and quick.network.note is None
    assert (quick.network.form, portable.network.form) == ("compiled", "portable")
    sample = pq.read_table(portable.files.path(SAMPLE))
    found = [np.concatenate([each.logits_C for each in b.score(sample)]) for b in (quick, portable)]
    np.testing.assert_allclose(*found, atol=1e-6)


def test_a_publish_tells_what_moved_and_when_to_compact(
    places: Places, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore.open(places.folder / "features")
    keys = np.array([1_050, 1_007, 1_008])
    features = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)
    store.put(FeatureRows.of([f"item/{key - 1_000}" for key in keys], features, keys=keys))
    store.delete([1_049])
    files = ("--json", tmp_path / "publish.json", "--html", tmp_path / "p.html")
    text = done(publish_vectors.app, "--model", model, *files)
    assert "vectors      images: of snapshot 3 of the features\n" in text
    assert "images       since snapshot 1: 1 new, 2 changed, 1 gone\n" in text
    assert "published    4 rows, " in text
    figures = json.loads((tmp_path / "publish.json").read_text())
    assert figures["stores"][0]["added"] == 1
    page = check_page((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert page.value("images")[0].startswith("since snapshot 1: 1 new, 2 changed, 1 gone")
    again = done(publish_vectors.app, "--model", model)
    assert "vectors      images: of snapshot 3 of the features already, nothing to do\n" in again
    monkeypatch.setattr("featurestore.upkeep.compaction.MAX_DELTAS", 1)

    def publish(number: float) -> str:
        features = np.full((1, 16), number, np.float32)
        store.put(FeatureRows.of(["item/20"], features, keys=np.array([1_020])))
        return done(publish_vectors.app, "--model", model)

    *_, last = [publish(number) for number in range(2)]
    advice = re.search("next         crossmedia store compact (.*)", last)
    assert advice is not None
    compact(FeatureStore.open(advice[1]), force=True)
    assert "store compact" not in publish(3.5)


def test_a_model_without_images(places: Places, tmp_path: Path) -> None:
    out = tmp_path / "model"
    run = places.folder / "runs" / "ids"
    text = done(export_model.app, "--run", run, "--out", out, "--no-use", "--sample-groups", 0)
    assert "note         the bundle has no test samples, so a scorer does not judge it: none were asked" in text
    assert f"published    version 1 of {out}, not in use yet" in text
    assert "the model sees no images" in done(publish_vectors.app, "--model", out, "--version", 1)
    assert str(out) in invoke(publish_vectors.app, "--model", out, code=2).stderr


def test_places_of_stores_are_told_apart() -> None:
    assert publish_vectors.store_places(["s3://a/b=c"], ["images"]) == {"images": "s3://a/b=c"}
    assert publish_vectors.store_places(["images=x", "texts=y"], ["images", "texts"]) == {"images": "x", "texts": "y"}
    with pytest.raises(typer.BadParameter, match=told(Problem.NO_SUCH_STORE, where="x", value="images, texts")):
        publish_vectors.store_places(["x"], ["images", "texts"])
    with pytest.raises(typer.BadParameter, match=told(Problem.NO_SUCH_STORE, where="x", value="no store")):
        publish_vectors.store_places(["x"], [])
