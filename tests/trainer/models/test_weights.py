"""Weights of ids: read with their ids, found by a look at samples, and the same in an ad index as in training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from tests.trainer.whole_runs import run_alone
from trainer.comm import SoloComm
from trainer.prerank.vectors import (
    ad_vectors,
    ads_of_samples,
    ads_of_table,
    reader_of_tests,
    towers,
    user_vectors,
)
from trainer.runs.saved import open_trained
from trainer.samples.index import open_index
from trainer.samples.reader import SampleReader
from trainer.schema import Field, Schema, load_schema
from trainer.schema.__main__ import app
from trainer.schema.fields import schema_text

WORDS = Field(name="ad_words", side="ad", kind="multi_id", weights="ad_words_weight")
Edit = Callable[[pa.Table], pa.Table]


def weighted_schema() -> Schema:
    """The packaged one, with weights of the behaviours' items, of the ad's category, and of its words."""
    weights = {"behavior_item": "behavior_item_weight", "ad_category": "ad_category_weight"}
    fields = [field.model_copy(update={"weights": weights.get(field.name)}) for field in load_schema().fields]
    return Schema(fields=(*fields, WORDS))


def with_weights(table: pa.Table) -> pa.Table:
    """The table with weights, a function of the ids, and 0 to 2 words an ad."""
    behaviors, ads = (table[name].to_pylist() for name in ("behavior_item", "ad_item"))
    words = [[[ad * 3 + n for n in range(ad % 3)] for ad in row] for row in ads]
    columns = {
        "behavior_item_weight": [[item % 4 - 1.0 for item in row] for row in behaviors],
        "ad_category_weight": [[1 + ad % 2 / 2 for ad in row] for row in ads],
        "ad_words": words,
        "ad_words_weight": [[[1.0 + word % 2 for word in each] for each in row] for row in words],
    }
    for name, values in columns.items():
        inner = pa.list_(pa.float32() if name.endswith("weight") else pa.int64())
        table = table.append_column(name, pa.array(values, pa.list_(inner) if "words" in name else inner))
    return table


def rewritten(folder: Path, edit: Edit) -> None:
    for path in folder.glob("*/*.parquet"):
        pq.write_table(edit(pq.read_table(path, partitioning=None)), path, row_group_size=7)


@pytest.fixture(scope="module")
def weighted(make_places: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Samples with weights, and a run of two towers on them."""
    places = make_places(tmp_path_factory.mktemp("weighted"))
    rewritten(places.folder / "samples", with_weights)
    (places.folder / "schema.yaml").write_text(schema_text(weighted_schema()))
    settings = {"data__schema_file": places.folder / "schema.yaml", "model__compute_dtype": "float32"}
    settings["model__tables"] = "{user: 64, item: 64, image: 64, category: 16, scene: 16, ad_words: 128}"
    run_alone(places, run__name="towers", model__base="two_tower", train__max_steps=12, **settings)
    return places


class TestReading:
    def test_weights_belong_to_their_ids(self, weighted: Any) -> None:
        schema = weighted_schema()
        index = open_index(SoloComm(), str(weighted.folder / "samples"), "train", schema)
        seen = 0
        for batch in SampleReader(index, schema, batch_size=64, seed=3, window=50).batches():
            items, words = batch.fields["behavior_item"], batch.fields["ad_words"]
            np.testing.assert_array_equal(batch.weights["behavior_item"], items.values_N % 4 - 1.0)
            np.testing.assert_array_equal(batch.weights["ad_words"], 1.0 + words.values_N % 2)
            np.testing.assert_array_equal(batch.weights["ad_category"], 1 + batch.fields["ad_item"].values_N % 2 / 2)
            assert all(weights_N.dtype == np.float32 for weights_N in batch.weights.values())
            seen += len(words.values_N)
        assert seen > 500


def test_inspect_finds_them(weighted: Any, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(weighted.folder / "samples")])
    (tmp_path / "schema.yaml").write_text(result.output)
    found = {field.name: field.weights for field in load_schema(tmp_path / "schema.yaml").fields if field.weights}
    assert found == {field.name: field.weights for field in weighted_schema().fields if field.weights}
    assert "ad_words_weight:" not in result.output


def test_an_ads_vector_is_the_same_from_samples_and_from_a_table(weighted: Any, tmp_path: Path) -> None:
    trained = open_trained(weighted.folder / "runs/towers", SoloComm())
    model, samples = towers(trained), str(weighted.folder / "samples")
    ads = ads_of_samples(samples, trained.schema, model.ad_fields)
    vector_of = dict(zip(ads.keys_N.tolist(), ad_vectors(trained, ads, batch_size=7), strict=True))
    words = [[ad * 3 + n for n in range(ad % 3)] for ad in ads.keys_N.tolist()]
    columns = {
        "ad_item": ads.keys_N, "ad_image": ads.keys_N + 1_000, "ad_category": ads.keys_N % 5,
        "ad_category_weight": 1 + ads.keys_N % 2 / 2, "ad_words": words,
        "ad_words_weight": pa.array([[1.0 + word % 2 for word in row] for row in words], pa.list_(pa.float64())),
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "ads.parquet")
    table = ads_of_table(str(tmp_path / "ads.parquet"), trained.schema, model.ad_fields)
    np.testing.assert_allclose(
        ad_vectors(trained, table, batch_size=50),
        [vector_of[key] for key in table.keys_N.tolist()],
        rtol=1e-4,
        atol=1e-6,
    )
    assert model.context is not None
    with torch.no_grad():
        model.context.weight.zero_()
    for batch, users in user_vectors(trained, reader_of_tests(trained, samples).batches()):
        vectors = np.array([vector_of[ad] for ad in batch.fields["ad_item"].values_N.tolist()])
        product = (users[batch.group_of_sample_B] * vectors).sum(axis=1) + float(model.bias.detach())
        logit = trained.engine.predict(trained.engine.prepare(batch))
        np.testing.assert_allclose(product, logit, rtol=1e-4, atol=1e-5)
    trained.close()
