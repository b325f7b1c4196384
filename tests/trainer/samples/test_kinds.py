"""Columns of every kind: from samples to batches, schemas, runs and vectors of ads; and each mistake in them."""

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

from tests.cli import invoke
from tests.trainer.conftest import Places, make_places, sample_table
from tests.trainer.samples.reading import reader_of, replaced, rewrite
from tests.trainer.whole_runs import run_alone
from trainer.comm import SoloComm
from trainer.config import load_config
from trainer.errors import DataError, SchemaError
from trainer.evaluate import app as evaluate_app
from trainer.prerank.adindex import ad_vectors, ads_of_samples, ads_of_table, reader_of_tests, towers, user_vectors
from trainer.runs.open import open_run
from trainer.runs.saved import open_trained
from trainer.samples.index import open_index
from trainer.samples.reader import Batch, SampleReader
from trainer.schema import Field, Schema, load_schema
from trainer.schema.__main__ import app as schema_app
from trainer.schema.fields import schema_text

WEIGHTS = {"behavior_item": "behavior_item_weight", "ad_category": "ad_category_weight"}
MORE = (
    Field(name="behavior_age", side="user", kind="multi_id", buckets="log2", beside="behavior_item"),
    Field(name="behavior_photos", side="user", kind="content", gallery="mean"),
    Field(name="height", side="user", kind="dense"),
    Field(name="ad_photos", side="ad", kind="content", gallery="mean"),
    Field(name="ad_words", side="ad", kind="multi_id", weights="ad_words_weight"),
    Field(name="ad_price", side="ad", kind="dense", transform="log1p"),
    Field(name="ad_pair", side="ad", kind="id", columns=("ad_item", "ad_scene"), context=True),
    Field(name="ad_tags", side="ad", kind="multi_id", columns=("ad_first", "ad_second")),
)
SCHEMA = Schema(fields=(*(f.model_copy(update={"weights": WEIGHTS.get(f.name)}) for f in load_schema().fields), *MORE))
"""The packaged one with weights, galleries, ages, numbers and crossed columns."""


def gallery_of(image: int) -> list[int]:
    """None to three images of those with a feature."""
    return [1_000 + (image * step) % 50 for step in range(1, 4)][: image % 4]


def words_of(item: int) -> list[int]:
    """None to two words of an ad."""
    return [item * 3 + n for n in range(item % 3)]


def ad_columns(items: list[int]) -> dict[str, list[Any]]:
    """All of ads beside the packaged schema's columns, by their items."""
    words = [words_of(item) for item in items]
    return {
        "ad_photos": [gallery_of(item + 1_000) for item in items],
        "ad_words": words,
        "ad_words_weight": [[1.0 + word % 2 for word in each] for each in words],
        "ad_price": [1.3 ** (item * 7 % 31) for item in items],
        "ad_category_weight": [1 + item % 2 / 2 for item in items],
        "ad_first": [[1, item % 7] for item in items],
        "ad_second": [[2, 3] for _ in items],
    }


def with_every_kind(table: pa.Table) -> pa.Table:
    """The table with a column of every kind."""
    behaviors, ads = (table[name].to_pylist() for name in ("behavior_item", "ad_item"))
    by_row = [ad_columns(row) for row in ads]
    columns: dict[str, list[Any]] = {
        "behavior_age": [[60 * 4**place for place in range(len(row))] for row in behaviors],
        "behavior_photos": [[gallery_of(item + 1_000) for item in row] for row in behaviors],
        "behavior_item_weight": [[item % 4 - 1.0 for item in row] for row in behaviors],
        "height": [150.5 + user for user in table["user"].to_pylist()],
        **{name: [row[name] for row in by_row] for name in by_row[0]},
    }
    for name, values in columns.items():
        depth = 0 if name == "height" else 1 + (name in ("behavior_photos", "ad_photos", "ad_first", "ad_second"))
        depth += name.startswith("ad_words")
        kind = pa.float64() if name == "height" or name.endswith(("weight", "price")) else pa.int64()
        for _ in range(depth):
            kind = pa.list_(kind)
        table = table.append_column(name, pa.array(values, kind))
    return table


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Places:
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


@pytest.mark.long
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


@pytest.mark.long
def test_inspect_finds_them_and_check_reads_them(kinds: Places, tmp_path: Path) -> None:
    samples, path = kinds.folder / "samples", tmp_path / "schema.yaml"
    for arguments in (["inspect", samples, "--out", path], ["check", path, samples]):
        invoke(schema_app, *arguments, code=0)
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


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.usefixtures("undrawn")
def test_evaluation_of_galleries_has_no_slice_of_single_images(kinds: Places) -> None:
    run = kinds.folder / "runs" / "towers"
    invoke(evaluate_app, run, code=0)
    sliced = json.loads((run / "evaluation" / "report.json").read_text())["sliced_by"]
    assert "history" in sliced


@pytest.mark.long
def test_an_image_in_many_galleries_is_asked_for_once(kinds: Places) -> None:
    settings = ["run.resume=latest", "train.max_steps=9"]
    config = load_config(kinds.folder / "runs/towers/config.yaml", settings)
    with contextlib.closing(open_run(config, SoloComm())) as run:
        prepared = run.engine.prepare(next(run.train_reader.batches()))
        index_N = prepared.request.fields["ad_photos"].index_N
        assert len(np.unique(index_N)) < 50 < len(index_N)


ROW, FILE = 17, "day=2026-01-02.parquet"


def right() -> pa.Table:
    """Samples with a column of every kind."""
    return with_every_kind(sample_table(20))


def written(folder: Path, table: pa.Table) -> Path:
    (folder / "train").mkdir()
    pq.write_table(table, folder / "train" / FILE, row_group_size=7)
    return folder


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def cast(name: str, kind: Any) -> Callable[[pa.Table], pa.Table]:
    return lambda table: with_column(table, name, table[name].cast(kind))


def as_column(name: str, other: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: with_column(table, name, table[other])


def test_samples_of_every_kind_are_read(tmp_path: Path) -> None:
    """So that what is wrong below is what the row says."""
    (batch,) = reader_of(written(tmp_path, right()), schema=SCHEMA, batch_size=1_000).batches()
    assert batch.num_samples == len(right()["label"].combine_chunks().flatten())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: table.drop_columns(["user", "ad_scene"]), "column ad_scene is missing, expected list<integer>"),
        (lambda table: table.drop_columns(["ad_photos"]), "ad_photos is missing, expected list<list<integer>> (or"),
        (cast("user", pa.bool_()), "column user is bool, expected integer (or string)"),
        (cast("user", pa.float64()), "column user is double"),
        (as_column("ad_item", "user"), "column ad_item is int64, expected list<integer>"),
        (as_column("user", "ad_item"), "column user is list<"),
        (as_column("ad_photos", "ad_item"), "column ad_photos is list<element: int64>, expected"),
        (as_column("ad_category_weight", "ad_words"), "column ad_category_weight is list<element: list<"),
        (lambda table: table.append_column("user", table["user"]), "column user is in it 2 times"),
    ],
)
def test_columns_are_refused_before_reading(tmp_path: Path, change: Callable[[pa.Table], pa.Table], told: str) -> None:
    with pytest.raises(SchemaError) as caught:
        open_index(SoloComm(), str(written(tmp_path, change(right()))), "train", SCHEMA)
    assert told in str(caught.value) and FILE in str(caught.value)


VALUES: list[tuple[str, Callable[[Any], Any], str]] = [
    ("label", lambda row: [2] * len(row), "column label has 2; a label is 0 or 1"),
    ("label", lambda row: [-1] * len(row), "column label has -1; a label is 0 or 1"),
    ("label", lambda row: [], "column label is an empty list"),
    ("label", lambda row: None, "column label is null"),
    ("label", lambda row: [None] * len(row), "column label has a null in its list"),
    ("ad_image", lambda row: [*row, 1], "each impression needs one entry in both"),
    ("behavior_image", lambda row: None, "column behavior_image is null"),
    ("behavior_image", lambda row: [1] * 9, "column behavior_image has 9 entries, behavior_item has"),
    ("behavior_category", lambda row: [1] * 9, "each behaviour needs one entry in both"),
    ("behavior_item", lambda row: [1, None], "column behavior_item has a null in its list"),
    ("user", lambda row: None, "column user is null"),
    ("ad_photos", lambda row: [*row, []], "column ad_photos has"),
    ("ad_photos", lambda row: [None, *row[1:]], "column ad_photos has a null in its list"),
    ("behavior_photos", lambda row: [*row, []], "each behaviour needs one entry in both"),
    ("behavior_age", lambda row: [*row, 5], "entries, behavior_item has"),
    ("behavior_item_weight", lambda row: [*row, 1.0], "each value needs one entry in both"),
    ("ad_words_weight", lambda row: [[*row[0], 1.0], *row[1:]], "entries, ad_words has"),
    ("ad_words_weight", lambda row: [*row, []], "each impression needs one entry in both"),
    ("behavior_item_weight", lambda row: [float("nan")] * 9, "column behavior_item_weight has nan"),
    ("ad_category_weight", lambda row: [float("inf")] * len(row), "column ad_category_weight has inf"),
    ("behavior_item_weight", lambda row: [None], "has a null in its list"),
    ("behavior_item_weight", lambda row: None, "column behavior_item_weight is null"),
    ("height", lambda row: float("nan"), "column height has nan"),
    ("ad_second", lambda row: [[1], *row[1:]], "column ad_second has 1 entries, ad_first has 2; each crossed"),
]


def told_of(folder: Path, table: pa.Table, column: str, value: Callable[[Any], Any]) -> str:
    """What a reader says where the value of a row is another one."""
    values = table[column].to_pylist()
    values[ROW] = value(values[ROW])
    table = with_column(table, column, pa.array(values, table.schema.field(column).type))
    with pytest.raises(DataError) as caught:
        list(reader_of(written(folder, table), schema=SCHEMA).batches())
    return str(caught.value)


@pytest.mark.parametrize(("column", "value", "told"), VALUES)
def test_values_are_named(tmp_path: Path, column: str, value: Callable[[Any], Any], told: str) -> None:
    said = told_of(tmp_path, right(), column, value)
    assert f"{FILE}, row {ROW}: " in said and told in said


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("ad_item", lambda row: [None, *row[1:]], "column ad_item has a null in its list"),
        ("user", lambda row: None, "column user is null"),
        ("behavior_category", lambda row: [*row, "a"], "each behaviour needs one entry in both"),
    ],
)
def test_values_among_texts_are_named(tmp_path: Path, column: str, value: Callable[[Any], Any], told: str) -> None:
    table = replaced(right(), ("user", "ad_item", "behavior_category"), pa.string(), lambda _, number: f"i{number}")
    said = told_of(tmp_path, table, column, value)
    assert f"{FILE}, row {ROW}: " in said and told in said
