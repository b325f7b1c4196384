"""python -m serving check and jobs/score.py --model: equal to the run, in process and over HTTP; wrong options."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import Result

from featurestore import FeatureStore
from jobs.score import app as score_app
from serving.__main__ import app
from serving.http.app import Scoring
from serving.http.live import BundleSource
from serving.problems import Problem
from serving.settings import ServerSettings
from tests.cli import figures_of, invoke
from tests.explorer.serving import in_thread
from tests.raised import told
from tests.security.certificates import Certificate
from tests.serving.scoring.variants import Exported, Variants, export, train_run
from trainer.evaluation.predict import predict_run
from trainer.problems import Problem as TrainerProblem
from trainer.samples.survey import write_part

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def model(variants: Variants) -> Exported:
    return variants("contents")


def check(*options: object, code: int = 0) -> Result:
    return invoke(app, "check", *options, code=code)


def score(*options: object, code: int = 0) -> Result:
    return invoke(score_app, *options, code=code)


def test_a_bundle_equals_its_run(model: Exported, tmp_path: Path) -> None:
    figures = figures_of(app, tmp_path, "check", model.url)
    assert figures["impressions"] == len(predict_run(model.run).logit_N)
    assert 0 <= figures["mean"] <= figures["worst"] <= 1e-5
    few = figures_of(app, tmp_path, "check", model.url, "--impressions", 10)
    assert 10 <= few["impressions"] < figures["impressions"]


def test_a_bundle_of_other_vectors_does_not(model: Exported, tmp_path: Path) -> None:
    """Vectors that are not those of E, as after a commit by hand."""
    url = shutil.copytree(model.url, tmp_path / "model")
    (vectors,) = url.glob("bundles/*/vectors/images")
    FeatureStore.open(vectors).delete(np.arange(1_000, 1_010))
    found = check(url, code=1)
    assert re.search(told(Problem.TOO_FAR, most=1e-5), found.stderr) and "impression" in found.stdout
    check(url, "--tolerance", 100)


def test_a_run_in_bfloat16_has_the_tolerance_of_its_roundings(model: Exported, tmp_path: Path) -> None:
    run = train_run(model.places, "bfloat16", model__compute_dtype="bfloat16")
    export(run, url := str(tmp_path / "model"))
    figures = figures_of(app, tmp_path, "check", url)
    assert figures["tolerance"] == 0.01 >= figures["worst"]
    (vectors,) = Path(url).glob("bundles/*/vectors/images")
    FeatureStore.open(vectors).delete(np.arange(1_000, 1_049))
    check(url, code=1)


def test_another_checkpoint_is_refused(model: Exported, variants: Variants) -> None:
    found = check(model.url, "--run", variants("concat").run, code=1)
    assert re.search(told(Problem.OTHER_CHECKPOINT, version=1), found.stderr)


def test_a_file_of_scores_by_a_model_is_that_of_its_run(model: Exported, tmp_path: Path) -> None:
    samples = model.places.folder / "samples"
    done = score("--model", model.url, "--samples", samples, "--out", tmp_path / "model.parquet")
    assert f"model        {model.url}, version 1" in done.stdout
    score("--run", model.run, "--out", tmp_path / "run.parquet")
    of_model, of_run = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("model", "run"))
    scores = ["logit", "probability"]
    assert of_model.drop_columns(scores).equals(of_run.drop_columns(scores))
    np.testing.assert_allclose(of_model["logit"].to_numpy(), of_run["logit"].to_numpy(), rtol=0, atol=1e-5)
    assert json.loads(of_model.schema.metadata[b"scores"])["version"] == 1


def test_scores_by_a_model_have_the_texts_next_to_the_samples(model: Exported, tmp_path: Path) -> None:
    shutil.copytree(model.places.folder / "samples", samples := tmp_path / "samples")
    ads = pq.read_table(next((samples / "test").glob("*.parquet")), partitioning=None)["ad_item"].combine_chunks()
    write_part(samples / "ids.parquet", texts := {ad: f"SKU-{ad}" for ad in ads.flatten().to_pylist()})
    score("--model", model.url, "--samples", samples, "--out", tmp_path / "scores.parquet")
    assert set(pq.read_table(tmp_path / "scores.parquet")["ad"].to_pylist()) == set(texts.values())


def test_a_row_whose_logit_is_not_finite_ends_both_by_its_name(variants: Variants, tmp_path: Path) -> None:
    model = variants("inputs")
    file = tmp_path / "samples" / model.test_file.relative_to(model.places.folder / "samples")
    shutil.copytree(model.places.folder / "samples", tmp_path / "samples")
    shapes = model.table["ad_shape"].to_pylist()
    shapes[3][0] = [3.4e38, 0.0]
    place = model.table.column_names.index("ad_shape")
    pq.write_table(model.table.set_column(place, "ad_shape", pa.array(shapes)), file)
    samples = ("--samples", tmp_path / "samples")
    for options in (("--model", model.url), ("--run", model.run)):
        found = score(*options, *samples, "--out", tmp_path / "scores.parquet", code=1)
        assert re.search(r"column ad_shape(\[\d\])? has 3.4e\+38", found.stderr), found.stderr
    found = check(model.url, *samples, code=1)
    reason = told(TrainerProblem.TOO_BIG, where="the table, row 3: column ad_shape[0]", value=3.4e38)
    assert re.search(told(Problem.WRONG, where=f"{file}, from row 0", reason=re.compile(reason)), found.stderr)


@pytest.mark.services
def test_a_server_equals_the_run(model: Exported, tmp_path: Path) -> None:
    """Once its certificate is known."""
    settings, own = ServerSettings(model=model.url, name="ctr", cache_dir=tmp_path / "cache"), Certificate(tmp_path)
    scoring = Scoring(settings, BundleSource(settings))
    with in_thread(scoring.app(), ssl_certfile=own.both) as url:
        while not scoring.live.is_ready:
            assert scoring.failure is None
            time.sleep(0.01)
        found = check(model.url, "--url", url, "--ca", own.ca)
        assert f"answers by {url}" in found.stdout
        assert re.search(told(Problem.CERTIFICATE_REFUSED, where=url), check(model.url, "--url", url, code=1).stderr)
