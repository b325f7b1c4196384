"""Galleries: several images of an ad or behaviour, read, pooled, trained on, evaluated and exported."""

import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.trainer.checkpoints import tensors_of
from tests.trainer.samples.reading import rewrite
from tests.trainer.whole_runs import report_of, run_alone
from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.evaluate import app as evaluate_app
from trainer.exchange.vectors import FieldVectors
from trainer.main import train
from trainer.models.pooling import gallery_vectors
from trainer.prerank.vectors import ad_vectors, ads_of_samples, ads_of_table, towers
from trainer.runs.open import open_run
from trainer.runs.saved import open_trained
from trainer.samples.index import open_index
from trainer.samples.reader import Batch, SampleReader
from trainer.schema import DEFAULT_SCHEMA, Schema, load_schema
from trainer.schema.__main__ import app as schema_app

pytestmark = pytest.mark.long

IMAGES = ("ad_image", "behavior_image")
Places = Any


def gallery_of(image: int) -> list[int]:
    """None to three images of those with a feature."""
    return [1_000 + (image * step) % 50 for step in range(1, 4)][: image % 4]


def nested(table: pa.Table, gallery: Callable[[int], list[int]]) -> pa.Table:
    """The table with columns ad_gallery and behavior_gallery, a gallery for each image."""
    for column in IMAGES:
        rows = [[gallery(image) for image in row] for row in table[column].to_pylist()]
        name = column.replace("image", "gallery")
        table = table.append_column(name, pa.array(rows, pa.list_(pa.list_(pa.int64()))))
    return table


def schema_file(folder: Path, pooling: str = "mean") -> Path:
    """The packaged schema with galleries in the place of images; the images' IDs stay."""
    values = yaml.safe_load(DEFAULT_SCHEMA.read_text())
    for field in values["fields"]:
        if field["kind"] == "content":
            field |= {"column": field["name"].replace("image", "gallery"), "gallery": pooling}
    path = folder / f"schema-{pooling}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def placed(make_places: Callable[[Path], Places], folder: Path, gallery: Callable[[int], list[int]]) -> Places:
    places = make_places(folder)
    rewrite(places.folder / "samples", partial(nested, gallery=gallery))
    return places


def batches(folder: Path, schema: Schema, rank: int = 0, num_ranks: int = 1) -> list[Batch]:
    index = open_index(SoloComm(), str(folder), "train", schema)
    return list(SampleReader(index, schema, rank=rank, num_ranks=num_ranks, batch_size=50, seed=3).batches())


def galleries(batch: Batch, name: str) -> list[list[list[int]]]:
    """Row by row, item by item, the keys of a field."""
    sizes, keys = batch.galleries[name], iter(batch.fields[name].values_N.tolist())
    counts = iter(sizes.values_N.tolist())
    rows = [[[next(keys) for _ in range(next(counts))] for _ in range(items)] for items in sizes.lengths_M]
    assert next(keys, None) is next(counts, None) is None
    assert [sum(map(len, row)) for row in rows] == batch.fields[name].lengths_M.tolist()
    return rows


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_reading(num_ranks: int, make_places: Callable[[Path], Places], tmp_path: Path) -> None:
    places = placed(make_places, tmp_path / "places", gallery_of)
    schema = load_schema(schema_file(tmp_path))
    parts = [batches(places.folder / "samples", schema, rank, num_ranks) for rank in range(num_ranks)]
    for batch in (batch for part in parts for batch in part):
        images = iter(batch.fields["behavior_image_id"].values_N.tolist())
        expected = [[gallery_of(next(images)) for _ in range(n)] for n in batch.fields["behavior_image_id"].lengths_M]
        assert galleries(batch, "behavior_image") == expected
        shown = batch.fields["ad_image_id"].values_N.tolist()
        assert galleries(batch, "ad_image") == [[gallery_of(image)] for image in shown]
    assert any(len(batch.galleries["ad_image"].values_N) for batch in parts[-1])


def test_pooling() -> None:
    vectors_UV = torch.tensor([[1.0, -8.0], [3.0, 2.0], [8.0, 0.0]], requires_grad=True)
    images = FieldVectors(vectors_UV, torch.tensor([0, 1, 2, 2]), torch.tensor([3, 1]))
    sizes, lengths = torch.tensor([2, 0, 1, 1]), torch.tensor([3, 1])
    for pooling, first in (("mean", [2.0, -3.0]), ("max", [3.0, 2.0])):
        pooled = gallery_vectors(images, sizes, lengths, pooling)
        assert pooled.vectors_UV[pooled.index_N].tolist() == [first, [0.0, 0.0], [8.0, 0.0], [8.0, 0.0]]
        assert pooled.lengths_M.tolist() == [3, 1]
        pooled.vectors_UV.sum().backward()
    assert vectors_UV.grad.tolist() == [[0.5, 0.5], [1.5, 1.5], [4.0, 4.0]]


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_galleries_of_one_image_are_that_image(
    pooling: str, make_places: Callable[[Path], Places], tmp_path: Path
) -> None:
    places = placed(make_places, tmp_path / "places", lambda image: [image])
    trained = []
    for name, schema in (("images", DEFAULT_SCHEMA), ("galleries", schema_file(tmp_path, pooling))):
        settings = {"train__max_steps": 6, "data__schema_file": schema, "model__compute_dtype": "float64"}
        trained.append(run_alone(places, run__name=name, **settings))
    images, pooled = map(tensors_of, trained)
    found, expected = (report_of(run)["metrics"]["logloss"] for run in trained)
    assert found == pytest.approx(expected, rel=1e-9)
    for name, value in images.items():  # gradients of one image are summed in another order
        torch.testing.assert_close(pooled[name], value, rtol=1e-7, atol=1e-9)


def test_an_image_in_many_galleries_is_asked_for_once(make_places: Callable[[Path], Places], tmp_path: Path) -> None:
    places = placed(make_places, tmp_path / "places", lambda image: [1_001, 1_002, 1_001])
    settings = places.settings(run__name="run", data__schema_file=schema_file(tmp_path))
    with contextlib.closing(open_run(load_config(settings=settings), SoloComm())) as run:
        prepared = run.engine.prepare(next(run.train_reader.batches()))
        index_N = prepared.request.fields["ad_image"].index_N
        assert (len(np.unique(index_N)), len(index_N)) == (2, 96)
        run.engine.train_step(prepared)


@pytest.fixture(scope="module")
def trained_towers(make_places: Callable[[Path], Places], tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Places with galleries, and a two-tower run on them."""
    places = placed(make_places, tmp_path_factory.mktemp("galleries"), gallery_of)
    settings = {"train__max_steps": 8, "model__base": "two_tower", "model__tower_width": 6}
    settings |= {"model__compute_dtype": "float32", "data__schema_file": schema_file(places.folder)}
    run_alone(places, run__name="towers", **settings)
    return places


def test_vectors_of_ads_for_an_index(trained_towers: Places, tmp_path: Path) -> None:
    samples = str(trained_towers.folder / "samples")
    with contextlib.closing(open_trained(trained_towers.folder / "runs" / "towers", SoloComm())) as trained:
        fields = towers(trained).ad_fields
        ads = ads_of_samples(samples, trained.schema, fields)
        items = ads.keys_N.tolist()
        table = {
            "ad_item": items,
            "ad_image": [item + 1_000 for item in items],
            "ad_category": [item % 5 for item in items],
            "ad_gallery": [gallery_of(item + 1_000) for item in items],
        }
        pq.write_table(pa.table(table), tmp_path / "ads.parquet")
        listed = ads_of_table(str(tmp_path / "ads.parquet"), trained.schema, fields)
        found, expected = (ad_vectors(trained, each, batch_size=7) for each in (listed, ads))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        one_by_one = ad_vectors(trained, listed, batch_size=1)
        np.testing.assert_allclose(one_by_one, expected, rtol=1e-5, atol=1e-6)
        assert len(np.unique(found.round(4), axis=0)) == len(items)


@pytest.mark.usefixtures("undrawn")
def test_evaluation(trained_towers: Places) -> None:
    run = trained_towers.folder / "runs" / "towers"
    done = CliRunner().invoke(evaluate_app, [str(run)])
    assert done.exit_code == 0, done.output
    sliced = json.loads((run / "evaluation" / "report.json").read_text())["sliced_by"]
    assert "history" in sliced
    assert "image" not in sliced  # known and new are said of single images


def test_inspect_and_check(make_places: Callable[[Path], Places], tmp_path: Path) -> None:
    places = make_places(tmp_path / "places")

    def as_images(table: pa.Table) -> pa.Table:
        made = nested(table, gallery_of).drop_columns(list(IMAGES))
        return made.rename_columns([name.replace("gallery", "images") for name in made.column_names])

    samples, schema = places.folder / "samples", tmp_path / "schema.yaml"
    rewrite(samples, as_images)
    for arguments in (["inspect", samples, "--out", schema], ["check", schema, samples]):
        done = CliRunner().invoke(schema_app, [str(each) for each in arguments])
        assert done.exit_code == 0, done.output
    found = {field.name: field for field in load_schema(schema).fields}
    assert (found["ad_images"].kind, found["ad_images"].gallery) == ("content", "mean")
    assert (found["behavior_images"].kind, found["behavior_images"].gallery) == ("content", "mean")
    assert (found["ad_images_id"].kind, found["ad_images_id"].column) == ("multi_id", "ad_images")
    settings = places.settings(run__name="run", train__max_steps=2, data__schema_file=schema)
    tables = "{user: 64, item: 64, images: 64, category: 16, scene: 16, ad_serial: 64}"
    train(load_config(settings=[*settings, f"model.tables={tables}"]), SoloComm())
