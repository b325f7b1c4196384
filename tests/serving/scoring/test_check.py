"""python -m serving check and jobs/score.py --model: equal to the run, in process and over HTTP; wrong options."""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import Result

from featurestore import FeatureStore
from jobs.score import app as score_app
from serving.__main__ import app
from serving.http.app import Scoring
from serving.http.codec import ARROW
from serving.http.live import BundleSource
from serving.scoring.scorer import Scorer
from serving.settings import ServerSettings
from tests.cli import invoke
from tests.explorer.serving import in_thread
from tests.security.certificates import Certificate
from tests.serving.scoring.variants import Exported, export, train_run
from trainer.evaluation.predict import predict_run
from trainer.samples.columns import Rule
from trainer.samples.survey import write_part

pytestmark = pytest.mark.long

Variants = Callable[[str], Exported]


@pytest.fixture(scope="module")
def model(variants: Variants) -> Exported:
    return variants("contents")


def check(*options: object) -> Result:
    return invoke(app, "check", *options)


def score(*options: object) -> Result:
    return invoke(score_app, *options)


def test_a_bundle_equals_its_run(model: Exported, tmp_path: Path) -> None:
    found = check(model.url, "--json", tmp_path / "figures.json")
    assert found.exit_code == 0, found.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["impressions"] == len(predict_run(model.run).logit_N)
    assert 0 <= figures["mean"] <= figures["worst"] <= 1e-5
    fewer = check(model.url, "--impressions", 10, "--json", tmp_path / "figures.json")
    assert fewer.exit_code == 0
    assert 10 <= json.loads((tmp_path / "figures.json").read_text())["impressions"] < figures["impressions"]


def test_a_bundle_of_other_vectors_does_not(model: Exported, tmp_path: Path) -> None:
    """Vectors that are not those of E, as after a commit by hand."""
    url = tmp_path / "model"
    shutil.copytree(model.url, url)
    (vectors,) = url.glob("bundles/*/vectors/images")
    FeatureStore.open(vectors).delete(np.arange(1_000, 1_010))
    found = check(url)
    assert found.exit_code == 1, found.output
    assert "is more than --tolerance 1e-05" in found.stderr and "impression" in found.stdout
    assert check(url, "--tolerance", 100).exit_code == 0


def test_a_run_in_bfloat16_has_the_tolerance_of_its_roundings(model: Exported, tmp_path: Path) -> None:
    run = train_run(model.places, "bfloat16", model__compute_dtype="bfloat16")
    url, file = str(tmp_path / "model"), tmp_path / "figures.json"
    export(run, url)
    assert check(url, "--json", file).exit_code == 0
    figures = json.loads(file.read_text())
    assert figures["tolerance"] == 0.01 >= figures["worst"]
    (vectors,) = Path(url).glob("bundles/*/vectors/images")
    FeatureStore.open(vectors).delete(np.arange(1_000, 1_049))
    assert check(url).exit_code == 1


def test_another_checkpoint_is_refused(model: Exported, variants: Variants) -> None:
    found = check(model.url, "--run", variants("mlp_concat").run)
    assert found.exit_code == 1 and "is not the checkpoint that version 1 was made of" in found.stderr


def test_a_file_of_scores_by_a_model_is_that_of_its_run(model: Exported, tmp_path: Path) -> None:
    samples = model.places.folder / "samples"
    done = score("--model", model.url, "--samples", samples, "--out", tmp_path / "model.parquet")
    assert done.exit_code == 0 and f"model        {model.url}, version 1" in done.stdout, done.output
    assert score("--run", model.run, "--out", tmp_path / "run.parquet").exit_code == 0
    of_model, of_run = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("model", "run"))
    scores = ["logit", "probability"]
    assert of_model.drop_columns(scores).equals(of_run.drop_columns(scores))
    np.testing.assert_allclose(of_model["logit"].to_numpy(), of_run["logit"].to_numpy(), rtol=0, atol=1e-5)
    assert json.loads(of_model.schema.metadata[b"scores"])["version"] == 1


def test_scores_by_a_model_have_the_texts_next_to_the_samples(model: Exported, tmp_path: Path) -> None:
    shutil.copytree(model.places.folder / "samples", samples := tmp_path / "samples")
    ads = pq.read_table(next((samples / "test").glob("*.parquet")), partitioning=None)["ad_item"].combine_chunks()
    write_part(samples / "ids.parquet", texts := {ad: f"SKU-{ad}" for ad in ads.flatten().to_pylist()})
    done = score("--model", model.url, "--samples", samples, "--out", tmp_path / "scores.parquet")
    assert done.exit_code == 0, done.output
    assert set(pq.read_table(tmp_path / "scores.parquet")["ad"].to_pylist()) == set(texts.values())


def test_a_row_whose_logit_is_not_finite_ends_both_by_its_name(variants: Variants, tmp_path: Path) -> None:
    model = variants("din_inputs")
    file = tmp_path / "samples" / model.test_file.relative_to(model.places.folder / "samples")
    shutil.copytree(model.places.folder / "samples", tmp_path / "samples")
    shapes = model.table["ad_shape"].to_pylist()
    shapes[3][0] = [3.4e38, 0.0]
    place = model.table.column_names.index("ad_shape")
    pq.write_table(model.table.set_column(place, "ad_shape", pa.array(shapes)), file)
    for options in (("--model", model.url), ("--run", model.run)):
        found = score(*options, "--samples", tmp_path / "samples", "--out", tmp_path / "scores.parquet")
        assert found.exit_code == 1, found.output
        assert re.search(r"column ad_shape(\[\d\])? has 3.4e\+38", found.stderr), found.stderr
    found = check(model.url, "--samples", tmp_path / "samples")
    assert found.exit_code == 1 and f"{file}, from row 0: the table, row 3: column ad_shape" in found.stderr


def test_options_that_do_not_go_together(model: Exported) -> None:
    for options, word in (
        (("--model", model.url), "--samples"),
        (("--model", model.url, "--run", model.run), "--run"),
        (("--version", 1), "--version"),
    ):
        wrong = score(*options)
        assert wrong.exit_code == 2 and word in wrong.stderr, wrong.output


@pytest.fixture
def scoring(model: Exported, tmp_path: Path) -> Scoring:
    """What a server does, for a thread of this process."""
    settings = ServerSettings(model=model.url, name="ctr", cache_dir=tmp_path / "cache")
    return Scoring(settings, BundleSource(settings))


@contextlib.contextmanager
def answering(scoring: Scoring, **tls: object) -> Iterator[str]:
    """Serve it until its model is ready, and longer; gives its address."""
    with in_thread(scoring.app(), **tls) as url:
        while not scoring.live.is_ready:
            assert scoring.failure is None
            time.sleep(0.01)
        yield url


@pytest.mark.services
def test_a_request_too_large_for_a_transform_is_422_in_each_form(variants: Variants, tmp_path: Path) -> None:
    model = variants("din_inputs")
    settings = ServerSettings(model=model.url, name="ctr", cache_dir=tmp_path / "cache")
    with contextlib.closing(Scorer.open(model.url)) as scorer:
        rules = scorer.inputs.sources
        row = model.table.select(list(rules)).slice(0, 1)
        values = row.to_pylist()[0]
    good = {
        "user": {name: values[name] for name, rule in rules.items() if rule.side == "user"},
        "candidates": {name: values[name] for name, rule in rules.items() if rule.side == "ad"},
    }
    count = len(values["ad_shape"])
    poisoned = {**good, "candidates": {**good["candidates"], "ad_shape": [[3.4e38, 0.0]] * count}}
    shape = pa.array([poisoned["candidates"]["ad_shape"]], row.schema.field("ad_shape").type)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, row.schema) as writer:
        writer.write_table(row.set_column(row.column_names.index("ad_shape"), "ad_shape", shape))
    columns = poisoned["user"] | poisoned["candidates"]
    tensors = [each for name, value in columns.items() for each in tensors_of(name, value, rules[name])]
    scoring = Scoring(settings, BundleSource(settings))
    with answering(scoring) as url, httpx2.Client(base_url=url) as client:
        assert client.post("/v1/score", json=good).status_code == 200
        for path, content, kind in (
            ("/v1/score", orjson.dumps(poisoned), "application/json"),
            ("/v1/score", sink.getvalue().to_pybytes(), ARROW),
            ("/v2/models/ctr/infer", orjson.dumps({"inputs": tensors}), "application/json"),
        ):
            answer = client.post(path, content=content, headers={"content-type": kind})
            assert answer.status_code == 422 and "ad_shape" in answer.json()["error"], answer.text


def tensors_of(name: str, value: Any, rule: Rule) -> list[dict[str, Any]]:
    """The tensors of a column, a list of lists by its lengths."""
    values = value if rule.depth else [value]
    lengths = []
    if rule.depth == 2:
        count = {"name": f"{name}.lengths", "shape": [len(values)], "datatype": "INT64"}
        lengths = [count | {"data": [len(each) for each in values]}]
        values = [one for each in values for one in each]
    kind = "FP32" if rule.is_real else "BYTES" if {*map(type, values)} == {str} else "INT64"
    return [{"name": name, "shape": [len(values)], "datatype": kind, "data": values}, *lengths]


@pytest.mark.services
def test_a_server_equals_the_run(model: Exported, scoring: Scoring) -> None:
    with answering(scoring) as url:
        found = check(model.url, "--url", url)
        assert found.exit_code == 0 and f"answers by {url}" in found.stdout, found.output
    gone = check(model.url, "--url", url)
    assert gone.exit_code == 1 and "does not answer" in gone.stderr


@pytest.mark.services
def test_a_server_is_known_by_its_certificate(model: Exported, scoring: Scoring, tmp_path: Path) -> None:
    own = Certificate(tmp_path)
    with answering(scoring, ssl_certfile=own.both) as url:
        known = check(model.url, "--url", url, "--ca", own.ca)
        assert known.exit_code == 0, known.output
        unknown = check(model.url, "--url", url)
        assert unknown.exit_code == 1 and "its certificate is refused" in unknown.stderr
    wrong = check(model.url, "--url", url, "--ca", model.run / "report.json")
    assert wrong.exit_code == 2 and "it has no certificate" in " ".join(wrong.stderr.split())
