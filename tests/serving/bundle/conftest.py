"""Small trained runs of many kinds, each exported once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from featurestore import ExtractorSpec, FeatureRows, FeatureStore, StoreInfo
from featurestore.log import manifest_path
from featurestore.parsing import parse_json
from featurestore.storage.storage import Storage
from serving.bundle.export import ExportOptions, export_model
from serving.bundle.files import WrittenFiles
from serving.bundle.manifest import NETWORK, BundleManifest
from tests.featurestore.storage.test_paths import sealed
from tests.trainer.conftest import Places, make_places
from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.main import train
from trainer.runs.saved import SavedRun
from trainer.schema import DEFAULT_SCHEMA

EXACT = "{kind: exact, max_rows: 24, admit_after: 2}"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float64": {"model__compute_dtype": "float64"},
    "learned": {"data__missing": "learned", "optim__ids": "rowwise_adagrad"},
    "ids_only": {"model__images": "none", "optim__ids": "rowwise_adagrad"},
    "two_networks": {"model__shared_image_model": "false"},
    "numbers": {"schema": "numbers"},
    "contents": {"schema": "contents", "data__missing": "learned"},
    "exact": {"model__tables": f"{{user: {EXACT}, item: {EXACT}, image: 64, category: 16, scene: 16}}"},
}
"""Settings of a run, by name; `schema` names fields of `FIELDS` that it has besides the packaged ones."""

FIELDS: dict[str, list[dict[str, Any]]] = {
    "contents": [
        {"name": f"{side}_text", "side": of, "kind": "content", "store": "texts", "width": 3, "column": f"{side}_image"}
        for side, of in (("behavior", "user"), ("ad", "ad"))
    ],
    "numbers": [
        {"name": "ad_price", "side": "ad", "kind": "dense", "transform": "standardize"},
        {"name": "ad_price_bucket", "side": "ad", "kind": "id", "column": "ad_price", "buckets": 6, "width": 5},
    ],
}


@dataclass(frozen=True)
class Exported:
    """A run and its bundle."""

    places: Places
    run: Path
    url: str
    manifest: BundleManifest


def write_schema(path: Path, extra: str | None) -> None:
    values = yaml.safe_load(DEFAULT_SCHEMA.read_text())
    values["fields"] += FIELDS.get(extra or "", [])
    path.write_text(yaml.safe_dump(values))


def add_prices(places: Places) -> None:
    """A column of real numbers in each file of samples."""
    random = np.random.default_rng(3)
    for path in sorted((places.folder / "samples").glob("*/*.parquet")):
        table = pq.read_table(path)
        offsets = table["label"].combine_chunks().offsets
        prices = pa.array(random.lognormal(size=offsets[-1].as_py()).astype(np.float32))
        pq.write_table(
            table.append_column("ad_price", pa.ListArray.from_arrays(offsets, prices)), path, row_group_size=7
        )


def add_texts(places: Places) -> None:
    """A second content of every item but the last, 7 numbers in int8's place: bfloat16, and eight shards."""
    extractor = ExtractorSpec(
        backbone="drawn", layer="texts", weights_digest="0", preprocessing="none", compute_dtype="float32"
    )
    store = FeatureStore.create(places.folder / "texts", StoreInfo(num_shards=8, dim=7, extractor=extractor))
    features_ND = np.random.default_rng(6).normal(size=(49, 7)).astype(np.float32)
    store.put(FeatureRows.of([f"item/{n}" for n in range(49)], features_ND, keys=np.arange(1_000, 1_049)))


def train_run(places: Places, name: str, schema: str | None = None, **changes: Any) -> Path:
    """Train one epoch: all training samples once."""
    path = places.folder / f"schema-{name}.yaml"
    write_schema(path, schema)
    own: dict[str, Any] = {"run__name": name, "train__max_steps": 23, "data__missing": "zeros", **changes}
    own |= {"data__schema_file": path}
    if schema == "contents":
        own["data__stores"] = f"{{texts: {places.folder / 'texts'}}}"
    config = load_config(settings=places.settings(**own))
    train(config, SoloComm())
    return Path(config.run.dir) / name


def no_network(saved: SavedRun, files: WrittenFiles) -> None:
    """In the place of the network, where a test looks at everything else."""
    files.write(NETWORK, b"none")


def export(url: object, run: Path, **options: Any) -> BundleManifest:
    """Export a run without its network."""
    return export_model(str(url), ExportOptions(run=run, **options), network=no_network).manifest


def forge(url: object, version: int, **fields: Any) -> None:
    """Seal the manifest of a version again, with other values in some of its fields."""
    storage, path = Storage(str(url)), manifest_path(version)
    values = {**parse_json(storage.read_bytes(path)), **fields}
    values.pop("digest")
    storage.write_bytes(path, sealed(values))


@pytest.fixture(scope="session")
def bundle_places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Samples with prices, images without those of items 3 and 45, and texts."""
    places = make_places(tmp_path_factory.mktemp("bundles"))
    add_prices(places)
    add_texts(places)
    FeatureStore.open(places.folder / "features").delete([1_003, 1_045])
    return places


@pytest.fixture(scope="session")
def exported(bundle_places: Places) -> Callable[[str], Exported]:
    """Trains and exports a variant, once for all tests, which only read it."""
    known: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in known:
            run = train_run(bundle_places, name, **VARIANTS[name])
            url = str(bundle_places.folder / "models" / name)
            known[name] = Exported(bundle_places, run, url, export(url, run))
        return known[name]

    return get
