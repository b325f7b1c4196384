"""Columns of every kind, from samples to batches, schemas, trained runs and vectors of ads."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from tests.trainer.samples.kinds import SCHEMA, WEIGHTS, ad_columns, gallery_of, with_every_kind
from tests.trainer.samples.reading import rewrite
from tests.trainer.whole_runs import run_alone
from trainer.comm import SoloComm
from trainer.config import load_config
from trainer.evaluate import app as evaluate_app
from trainer.prerank.adindex import ad_vectors, ads_of_samples, ads_of_table, reader_of_tests, towers, user_vectors
from trainer.runs.open import open_run
from trainer.runs.saved import open_trained
from trainer.samples.index import open_index
from trainer.samples.reader import Batch, SampleReader
from trainer.schema import load_schema
from trainer.schema.__main__ import app as schema_app
from trainer.schema.fields import schema_text

pytestmark = pytest.mark.long

Places = Any


@pytest.fixture(scope="module")
def kinds(make_places: Callable[[Path], Places], tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Places with such samples, their schema, and a run of two towers on them."""
    places = make_places(tmp_path_factory.mktemp("kinds"))
    rewrite(places.folder / "samples", with_every_kind)
    (places.folder / "schema.yaml").write_text(schema_text(SCHEMA))
    settings = {"train__max_steps": 8, "model__base": "two_tower", "model__tower_width": 6}
    settings |= {"model__compute_dtype": "float32", "data__schema_file": places.folder / "schema.yaml"}
    tables = "{user: 64, item: 64, image: 64, category: 16, scene: 16, ad_words: 64, ad_pair: 64, ad_tags: 64}"
    run_alone(places, run__name="towers", model__tables=tables, **settings)
    return places


def galleries(batch: Batch, name: str) -> list[list[list[int]]]:
    """Row by row, item by item, the keys of a field."""
    sizes, keys = batch.galleries[name], iter(batch.fields[name].values_N.tolist())
    counts = iter(sizes.values_N.tolist())
    rows = [[[next(keys) for _ in range(next(counts))] for _ in range(items)] for items in sizes.lengths_M]
    assert next(keys, None) is next(counts, None) is None
    assert [sum(map(len, row)) for row in rows] == batch.fields[name].lengths_M.tolist()
    return rows


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_value_belongs_to_its_id(kinds: Places, num_ranks: int) -> None:
    index, seen = open_index(SoloComm(), str(kinds.folder / "samples"), "train", SCHEMA), 0
    for rank in range(num_ranks):
        reader = SampleReader(index, SCHEMA, rank=rank, num_ranks=num_ranks, batch_size=64, seed=3, window=50)
        for batch in reader.batches():
            items, ads = batch.fields["behavior_item"], batch.fields["ad_item"].values_N
            expected, words = ad_columns(ads.tolist()), batch.fields["ad_words"]
            assert galleries(batch, "ad_photos") == [[each] for each in expected["ad_photos"]]
            shown = iter(items.values_N.tolist())
            photos = [[gallery_of(next(shown) + 1_000) for _ in range(length)] for length in items.lengths_M]
            assert galleries(batch, "behavior_photos") == photos
            assert words.values_N.tolist() == [word for each in expected["ad_words"] for word in each]
            assert words.lengths_M.tolist() == [len(each) for each in expected["ad_words"]]
            np.testing.assert_array_equal(batch.weights["behavior_item"], items.values_N % 4 - 1.0)
            np.testing.assert_array_equal(batch.weights["ad_words"], 1.0 + words.values_N % 2)
            np.testing.assert_array_equal(batch.weights["ad_category"], 1 + ads % 2 / 2)
            assert all(weights_N.dtype == np.float32 for weights_N in batch.weights.values())
            np.testing.assert_allclose(batch.dense["ad_price"][:, 0], np.log1p(expected["ad_price"]), rtol=1e-6)
            np.testing.assert_allclose(batch.dense["height"][:, 0], 150.5 + batch.fields["user"].values_N)
            place = [at for length in items.lengths_M for at in range(length)]
            np.testing.assert_array_equal(batch.fields["behavior_age"].values_N, 6 + 2 * np.array(place, np.int64))
            assert set(batch.fields["ad_tags"].lengths_M) <= {2}
            seen += batch.num_samples
    assert seen == index.num_samples


def test_inspect_finds_them_and_check_reads_them(kinds: Places, tmp_path: Path) -> None:
    samples, path = kinds.folder / "samples", tmp_path / "schema.yaml"
    for arguments in (["inspect", samples, "--out", path], ["check", path, samples]):
        done = CliRunner().invoke(schema_app, [str(each) for each in arguments])
        assert done.exit_code == 0, done.output
    found = {field.name: field for field in load_schema(path).fields}
    expected = {field.name: field for field in SCHEMA.fields}
    for name in ("behavior_age", "behavior_item", "ad_category"):
        assert found[name] == expected[name]
    assert {name: field.weights for name, field in found.items() if field.weights} == {
        **WEIGHTS,
        "ad_words": "ad_words_weight",
    }
    for name in ("ad_photos", "behavior_photos"):
        assert (found[name].kind, found[name].gallery, found[name].store) == ("content", "mean", "images")
    assert (found["ad_photos_id"].kind, found["ad_photos_id"].column) == ("multi_id", "ad_photos")
    assert (found["ad_price"].kind, found["ad_price"].transform) == ("dense", "log_standardize")
    assert "ad_words_weight:" not in path.read_text() and "#   behavior_age:" not in path.read_text()


def test_an_ads_vector_is_the_same_from_samples_and_from_a_table(kinds: Places, tmp_path: Path) -> None:
    samples = str(kinds.folder / "samples")
    with contextlib.closing(open_trained(kinds.folder / "runs/towers", SoloComm())) as trained:
        model = towers(trained)
        ads = ads_of_samples(samples, trained.schema, model.ad_fields)
        keys = ads.keys_N.tolist()
        expected = ad_vectors(trained, ads, batch_size=7)
        base = {"ad_item": keys, "ad_image": ads.keys_N + 1_000, "ad_category": ads.keys_N % 5}
        pq.write_table(pa.table(base | ad_columns(keys)), tmp_path / "ads.parquet")
        listed = ads_of_table(str(tmp_path / "ads.parquet"), trained.schema, model.ad_fields)
        for batch_size in (1, 50):
            np.testing.assert_allclose(ad_vectors(trained, listed, batch_size), expected, rtol=1e-4, atol=1e-6)
        assert len(np.unique(expected.round(4), axis=0)) == len(keys)
        vector_of = dict(zip(keys, expected, strict=True))
        assert model.context is not None
        with torch.no_grad():
            model.context.weight.zero_()
        for batch, users in user_vectors(trained, reader_of_tests(trained, samples).batches()):
            vectors = np.array([vector_of[ad] for ad in batch.fields["ad_item"].values_N.tolist()])
            product = (users[batch.group_of_sample_B] * vectors).sum(axis=1) + float(model.bias.detach())
            logit = trained.engine.predict(trained.engine.prepare(batch))
            np.testing.assert_allclose(product, logit, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_evaluation_of_galleries_has_no_slice_of_single_images(kinds: Places) -> None:
    run = kinds.folder / "runs" / "towers"
    done = CliRunner().invoke(evaluate_app, [str(run)])
    assert done.exit_code == 0, done.output
    sliced = json.loads((run / "evaluation" / "report.json").read_text())["sliced_by"]
    assert "history" in sliced


def test_an_image_in_many_galleries_is_asked_for_once(kinds: Places) -> None:
    settings = ["run.resume=latest", "train.max_steps=9"]
    config = load_config(kinds.folder / "runs/towers/config.yaml", settings)
    with contextlib.closing(open_run(config, SoloComm())) as run:
        prepared = run.engine.prepare(next(run.train_reader.batches()))
        index_N = prepared.request.fields["ad_photos"].index_N
        assert len(np.unique(index_N)) < 50 < len(index_N)
