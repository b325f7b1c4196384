"""Columns of every kind: numbers and their transforms, from samples to batches, schemas, runs and vectors of ads."""

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.cli import invoke
from tests.raised import raises
from tests.trainer.conftest import Places, make_places
from tests.trainer.samples.reading import ad_columns, reader_of, rewrite, with_every_kind
from tests.trainer.whole_runs import run_alone
from trainer.comm import SoloComm
from trainer.config import ModelConfig
from trainer.engine.wiring import table_shapes
from trainer.errors import ConfigError, OverflowingValueError
from trainer.prerank.adindex import ad_vectors, ads_of_samples, ads_of_table, origin_of, towers, user_vectors
from trainer.problems import Problem
from trainer.runs import open as opening
from trainer.runs.saved import open_trained
from trainer.samples.columns import bucket_ids, dense_values
from trainer.samples.index import open_index
from trainer.schema.__main__ import app as schema_app
from trainer.schema.fields import Field, Schema, load_schema, schema_text

WEIGHTS = {"behavior_item": "behavior_item_weight", "ad_category": "ad_category_weight"}
MORE = (
    Field(name="behavior_age", side="user", kind="multi_id", buckets="log2", beside="behavior_item"),
    Field(name="behavior_notes", side="user", kind="multi_id", table="ad_words"),
    Field(name="height", side="user", kind="dense"),
    Field(name="ad_words", side="ad", kind="multi_id", weights="ad_words_weight"),
    Field(name="ad_price", side="ad", kind="dense", transform="log1p"),
    Field(name="ad_pair", side="ad", kind="id", columns=("ad_item", "ad_scene"), context=True),
    Field(name="ad_tags", side="ad", kind="multi_id", columns=("ad_first", "ad_second")),
)
SCHEMA = Schema(fields=(*(f.model_copy(update={"weights": WEIGHTS.get(f.name)}) for f in load_schema().fields), *MORE))
"""The packaged one with weights, ages, numbers and crossed columns."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Places with such samples, their schema, and a run of two towers on them."""
    places = make_places(tmp_path_factory.mktemp("kinds"))
    rewrite(places.folder / "samples", with_every_kind)
    (places.folder / "schema.yaml").write_text(schema_text(SCHEMA))
    run_alone(
        places, run__name="towers", train__max_steps=8, data__schema_file=places.folder / "schema.yaml",
        model__base="two_tower", model__tower_width=6, model__activation="prelu", model__compute_dtype="float32",
        model__tables="{user: 64, item: 64, image: 64, category: 16, scene: 16, ad_pair: 64, ad_tags: 64, ad_words: 64}"
    )  # fmt: skip
    return places


@pytest.mark.long
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_value_belongs_to_its_id(kinds: Places, num_ranks: int) -> None:
    seen = 0
    for rank in range(num_ranks):
        reader = reader_of(kinds.folder / "samples", rank, num_ranks, schema=SCHEMA, batch_size=64)
        for batch in reader.batches():
            items, ads = batch.fields["behavior_item"], batch.fields["ad_item"].values_N
            expected, words = ad_columns(ads.tolist()), batch.fields["ad_words"]
            assert words.values_N.tolist() == [word for each in expected["ad_words"] for word in each]
            assert words.lengths_M.tolist() == [len(each) for each in expected["ad_words"]]
            np.testing.assert_array_equal(batch.weights["behavior_item"], items.values_N % 4 - 1.0)
            np.testing.assert_array_equal(batch.weights["ad_words"], 1.0 + words.values_N % 2)
            np.testing.assert_array_equal(batch.weights["ad_category"], 1 + ads % 2 / 2)
            assert all(weights_N.dtype == np.float32 for weights_N in batch.weights.values())
            np.testing.assert_allclose(batch.dense["ad_price"][:, 0], np.log1p(expected["ad_price"]), rtol=1e-6)
            np.testing.assert_allclose(batch.dense["height"][:, 0], 150.5 + batch.fields["user"].values_N)
            assert set(batch.fields["behavior_notes"].lengths_M) <= {0, 1, 2}, "a list has a length of its own"
            place = [at for length in items.lengths_M for at in range(length)]
            np.testing.assert_array_equal(batch.fields["behavior_age"].values_N, 6 + 2 * np.array(place, np.int64))
            assert set(batch.fields["ad_tags"].lengths_M) <= {2}
            seen += batch.num_samples
    assert seen == reader.num_samples


NUMBERS = {
    "ad_price": ("dense", "log_standardize", None),
    "ad_rating": ("dense", "standardize", "mean"),
    "ad_rate": ("dense", None, "mean"),
    "income": ("dense", "log_standardize", "mean"),
    "height": ("dense", "log_standardize", None),
}


@pytest.mark.long
def test_inspect_finds_them_and_check_reads_them(kinds: Places, tmp_path: Path) -> None:
    samples, path = kinds.folder / "samples", tmp_path / "schema.yaml"
    for arguments in (["inspect", samples, "--out", path], ["check", path, samples]):
        invoke(schema_app, *arguments, code=0)
    found = {field.name: field for field in load_schema(path).fields}
    expected = {field.name: field for field in SCHEMA.fields}
    for name in ("behavior_age", "behavior_item", "ad_category"):
        assert found[name] == expected[name]
    weights = {name: field.weights for name, field in found.items() if field.weights}
    assert weights == WEIGHTS | {"ad_words": "ad_words_weight"}
    numbers = {name: (found[name].kind, found[name].transform, found[name].fill) for name in NUMBERS}
    assert numbers == NUMBERS, "missing ones are seen, in lists and NaN too: a run refuses both without fill"
    assert "ad_words_weight:" not in path.read_text() and "#   behavior_age:" not in path.read_text()


@pytest.mark.long
def test_user_times_ad_is_the_logit_and_a_table_gives_the_vectors_of_samples(kinds: Places, tmp_path: Path) -> None:
    samples = str(kinds.folder / "samples")
    with contextlib.closing(open_trained(kinds.folder / "runs/towers", SoloComm())) as trained:
        model = towers(trained)
        ads = ads_of_samples(samples, trained.schema, model.ad_fields)
        keys = ads.keys_N.tolist()
        expected = ad_vectors(trained, ads, batch_size=7)
        base = {"ad_item": keys, "ad_image": ads.keys_N + 1_000, "ad_category": ads.keys_N % 5}
        for name, rows in {"a": slice(0, 9), "b": slice(9, None)}.items():
            table = {column: values[rows] for column, values in (base | ad_columns(keys)).items()}
            pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
        listed = ads_of_table(str(tmp_path), trained.schema, model.ad_fields)
        for batch_size in (1, 50):
            np.testing.assert_allclose(ad_vectors(trained, listed, batch_size), expected, rtol=1e-4, atol=1e-6)
        assert len(np.unique(expected.round(4), axis=0)) == len(keys)
        vector_of = dict(zip(keys, expected, strict=True))
        with torch.no_grad():
            model.context.weight.zero_()
        index = open_index(trained.comm, samples, "test", trained.schema)
        reader = opening.test_reader(trained.config, trained.comm, index, trained.schema)
        for batch, users in user_vectors(trained, reader.batches()):
            vectors = np.array([vector_of[ad] for ad in batch.fields["ad_item"].values_N.tolist()])
            product = (users[batch.group_of_sample_B] * vectors).sum(axis=1) + origin_of(trained).bias
            logit = trained.engine.predict(trained.engine.prepare(batch))
            np.testing.assert_allclose(product, logit, rtol=0, atol=1e-5)


NAN = float("nan")


def dense(**settings: Any) -> Field:
    return Field(name="price", side="ad", kind="dense", **settings)


def log1p(x: float) -> float:
    return math.copysign(math.log1p(abs(x)), x)


@pytest.mark.parametrize(
    ("settings", "formula", "missing"),
    [
        ({}, lambda x: x, NAN),
        ({"fill": 2}, lambda x: x, 2),
        ({"fill": "mean", "mean": [5]}, lambda x: x, 5),
        ({"transform": "standardize", "mean": [3.5], "std": [0.7], "fill": "mean"}, lambda x: (x - 3.5) / 0.7, 0),
        ({"transform": "standardize", "mean": [5], "std": [2], "fill": 7}, lambda x: (x - 5) / 2, 1),
        ({"transform": "log1p", "fill": -3}, log1p, -math.log1p(3)),
        ({"transform": "log_standardize", "mean": [5], "std": [2], "fill": "mean"}, lambda x: (log1p(x) - 5) / 2, 0),
    ],
)
def test_formulas_and_what_stands_in_for_a_missing_number(settings: Any, formula: Any, missing: float) -> None:
    values = [-7.5, -1.0, 0.0, 0.3, 2.0, 1e6]
    found = dense_values(dense(**settings), np.array([*values, NAN], np.float32))
    assert (found.dtype, found.shape) == (np.float32, (7, 1))
    np.testing.assert_allclose(found[:, 0], [*map(formula, values), missing], rtol=1e-6)


def test_each_number_of_a_row_has_its_own_scale_and_one_that_becomes_infinite_is_named() -> None:
    field = dense(width=2, transform="standardize", mean=[1.0, -1.0], std=[2.0, 4.0], fill="mean")
    found = dense_values(field, np.array([3.0, NAN, 1.0, 7.0], np.float32))
    np.testing.assert_array_equal(found, [[1.0, 0.0], [0.0, 2.0]])
    with raises(OverflowingValueError, Problem.TOO_BIG, where="column price") as error:
        dense_values(field.model_copy(update={"std": (1.0, 0.18)}), np.array([3.4e38, 1, 1, -3.4e38], np.float32))
    value = error.value.values["value"]
    assert (error.value.column, error.value.row, value) == ("price", 1, pytest.approx(-3.4e38))


BOUNDED = Field(name="b", side="ad", kind="id", boundaries=[0, 10, 100], fill="bucket")
ODD = [-5.0, 0.0, 9.99, 10.0, 99.0, 100.0, 1e9, NAN]
AGE = Field(name="age", side="user", kind="multi_id", buckets="log2", table="age")
AGES = [-1, 0, 0.5, 1, 1.9, 2, 3, 4, 1023, 1024, 86_400, 2.0**30, 2.0**40]


@pytest.mark.parametrize(
    ("field", "numbers", "buckets", "ids"),
    [
        (BOUNDED, ODD, 5, [0, 1, 1, 2, 2, 3, 3, 4]),
        (BOUNDED.model_copy(update={"fill": 50.0}), [NAN], 5, [2]),
        (Field(name="b", side="ad", kind="id", boundaries=[0.1, 0.7, 1.3]), [0.1, 0.7, 1.3], 5, [1, 2, 3]),
        (AGE, AGES, 33, [0, 0, 0, 1, 1, 2, 2, 3, 10, 11, 17, 31, 31]),
    ],
    ids=["on a boundary", "filled", "rounded as the column is", "log2"],
)
def test_numbers_have_their_buckets(field: Field, numbers: list[float], buckets: int, ids: list[int]) -> None:
    assert bucket_ids(field, np.array(numbers, np.float32)).tolist() == ids
    assert field.num_buckets == buckets


def test_every_bucket_has_a_row_of_its_own() -> None:
    fields = (AGE, Field(name="ad_age", side="ad", kind="id", buckets=40, boundaries=[1, 2], table="age"))
    (shape,) = table_shapes(fields, ModelConfig(table_shards=8, id_width=3))
    shard, row = shape.place_of(np.arange(41))
    assert len(set(zip(shard.tolist(), row.tolist(), strict=True))) == 41
    assert (shape.num_rows, row.max() < shape.rows_per_shard) == (41, True)
    assert len(set(shape.shards_of(np.arange(41)).tolist())) == 8
    with raises(ConfigError, Problem.TABLE_HAS_ITS_ROWS, where="age", field="age"):
        table_shapes(fields, ModelConfig(tables={"age": 64}))
    item = Field(name="item", side="ad", kind="id", table="age")
    for together in ((item, *fields), (*fields, item)):
        with raises(ConfigError, Problem.TABLE_OF_BUCKETS, where="item", table="age"):
            table_shapes(together, ModelConfig(tables={"age": 64}))
