"""The variants that are served: small trained runs of them, each with its bundle, made once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from featurestore import FeatureStore
from featurestore.storage.storage import Storage
from jobs.export_model import app as export_app
from serving.bundle.export import ExportOptions, export_model, write_network
from serving.bundle.log import read_version
from serving.bundle.manifest import BundleManifest
from tests.cli import invoke
from tests.running.shared import made_once, shared_folder
from tests.trainer.conftest import Places, drawn_store, make_places
from tests.trainer.samples.reading import rewrite
from tests.trainer.whole_runs import run_alone
from tests.variants import SERVED, TABLES
from trainer.schema.fields import DEFAULT_SCHEMA

INPUTS: list[dict[str, Any]] = [
    {"name": "ad_price", "side": "ad", "kind": "dense", "transform": "log_standardize", "fill": "mean"},
    {"name": "ad_shape", "side": "ad", "kind": "dense", "width": 2, "transform": "standardize"},
    {"name": "ad_price_bucket", "side": "ad", "kind": "id", "column": "ad_price", "buckets": 6, "fill": "bucket"},
    {"name": "ad_shop", "side": "ad", "kind": "id", "table": "shop", "width": 5},
    {"name": "ad_tags", "side": "ad", "kind": "multi_id", "table": "tags", "weights": "ad_tag_weights"},
    {"name": "ad_scene_item", "side": "ad", "kind": "id", "columns": ["ad_scene", "ad_shop"], "table": "scene_item"},
    {"name": "behavior_shop", "side": "user", "kind": "multi_id", "table": "shop", "width": 5},
    {"name": "behavior_both", "side": "user", "kind": "multi_id", "columns": ["behavior_item", "behavior_shop"]}
    | {"table": "both"},
    {"name": "behavior_age", "side": "user", "kind": "multi_id", "buckets": "log2", "beside": "behavior_item"}
    | {"width": 3},
]
TEXTS = [
    {"name": f"{side}_text", "side": of, "kind": "content", "store": "texts", "width": 3, "column": f"{side}_image"}
    for side, of in (("behavior", "user"), ("ad", "ad"))
]
GONE = (1_003, 1_045)
"""Images that have no feature, one of the training samples and one that only test samples have."""


@dataclass(frozen=True)
class Exported:
    """A run and its bundle."""

    run: Path
    url: str
    places: Places

    @property
    def manifest(self) -> BundleManifest:
        """Of the first version."""
        return read_version(Storage(self.url), 1)

    @property
    def test_file(self) -> Path:
        return self.places.folder / "samples" / "test" / "day=2026-01-01.parquet"

    @property
    def table(self) -> pa.Table:
        return pq.read_table(self.test_file, partitioning=None)


Variants = Callable[[str], Exported]
"""Gives a variant by its name."""


def placed(folder: Path) -> Places:
    """Samples with a column of every kind, images without two of them, and a second content."""
    places = make_places(folder)
    rewrite(places.folder / "samples", with_columns)
    features_ND = np.random.default_rng(6).normal(size=(49, 7))
    drawn_store(places.folder / "texts", features_ND, first_key=1_000, num_shards=8)
    FeatureStore.open(places.folder / "features").delete(GONE)
    return places


def with_columns(table: pa.Table) -> pa.Table:
    """Add a column of each kind to samples."""
    rows = table.to_pylist()
    ads, behaviors = ([row[f"{side}_item"] for row in rows] for side in ("ad", "behavior"))

    def added(name: str, lists: list[list[int]], value: Callable[[int], Any], kind: Any) -> None:
        nonlocal table
        values = [[value(item) for item in items] for items in lists]
        table = table.append_column(name, pa.array(values, pa.list_(kind)))

    added("ad_price", ads, lambda item: None if item % 7 == 0 else item**2 / 8, pa.float64())
    added("ad_shape", ads, lambda item: [item / 40, -item % 3], pa.list_(pa.float32()))
    added("ad_shop", ads, lambda item: f"shop ü{item % 9}", pa.string())
    added("ad_tags", ads, lambda item: list(range(item % 4)), pa.list_(pa.int64()))
    added("ad_tag_weights", ads, lambda item: [tag - 0.5 for tag in range(item % 4)], pa.list_(pa.float32()))
    added("behavior_shop", behaviors, lambda item: f"shop ü{item % 9}", pa.string())
    added("behavior_age", behaviors, lambda item: item * 20.0, pa.float32())
    return table


def write_schema(path: Path, extra: str | None) -> None:
    values = yaml.safe_load(DEFAULT_SCHEMA.read_text())
    values["fields"] += {"inputs": INPUTS, "contents": TEXTS}.get(extra or "", [])
    path.write_text(yaml.safe_dump(values))


def train_run(places: Places, name: str, schema: str | None = None, tables: str = TABLES, **changes: Any) -> Path:
    """Train for some steps, fast, so that logits differ."""
    path = places.folder / f"schema-{name}.yaml"
    write_schema(path, schema)
    own: dict[str, Any] = {
        "run__name": name,
        "train__max_steps": 23,  # all training samples once
        "optim__lr": 0.02,
        "data__missing": "zeros",
        "data__schema_file": path,
        "model__compute_dtype": "float32",
        "model__tables": f"{{{tables}}}",
        **changes,
    }
    if schema == "contents":
        own["data__stores"] = f"{{texts: {places.folder / 'texts'}}}"
    return run_alone(places, **own)


def export(run: Path, url: str, **options: Any) -> None:
    """Export a run as a person does, without compiled code."""
    export_model(url, ExportOptions(run=run, **options), network=partial(write_network))


def shared_places(factory: pytest.TempPathFactory) -> Places:
    """The samples and stores that all variants of this test run are trained on, in whichever process."""
    folder = shared_folder(factory, "variants")
    made_once(folder, "places", lambda: placed(folder))
    return Places(folder)


def trained(places: Places, name: str) -> Path:
    """Train a variant, unless another process of this test run has; gives its folder."""
    made_once(places.folder, f"run-{name}", lambda: train_run(places, name, **SERVED[name]))
    return places.folder / "runs" / name


def compiled(places: Places) -> tuple[Exported, str]:
    """Publish the variant that compiles quickest with compiled code, by the job; gives also what the job prints."""
    made, said = Exported(trained(places, "lr"), str(places.folder / "models" / "compiled"), places), "compiled.txt"

    def publish() -> None:
        done = invoke(export_app, "--run", made.run, "--out", made.url, "--compile", code=0)
        (places.folder / said).write_text(done.stdout)

    made_once(places.folder, "compiled", publish)
    return made, (places.folder / said).read_text()


def exported(places: Places, name: str, folder: str = "models", export: Callable[..., object] = export) -> Exported:
    """Train and export a variant into a folder, unless another process of this test run has."""
    run, url = trained(places, name), str(places.folder / folder / name)
    made_once(places.folder, f"{folder}-{name}", lambda: export(run=run, url=url))
    return Exported(run, url, places)
