"""The export as a person types it: E's own numbers of every image, files that are whole or absent, and mistakes."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from featurestore import FeatureRows, FeatureStore
from featurestore.upkeep.remake import remake
from jobs.export_embeddings import app
from tests.cli import printed, said
from tests.trainer.conftest import Places, make_places
from tests.trainer.whole_runs import run_alone
from trainer.comm import SoloComm
from trainer.runs import saved as export
from trainer.runs.saved import open_trained, read_run
from trainer.schema.fields import DEFAULT_SCHEMA

pytestmark = pytest.mark.long  # they train whole runs
NEW = 1_077
done = partial(printed, app)
failed = partial(said, app, code=2)


def train_run(places: Places, name: str, **changes: Any) -> Path:
    own = {"run__name": name, "train__max_steps": 2, "data__missing": "zeros", **changes}
    return run_alone(places, **own)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A run, and a store of four shards that has changed since: an image more, two gone, one with another feature."""
    places = make_places(tmp_path_factory.mktemp("places"))
    train_run(places, "both")
    train_run(places, "none", model__images="none")
    schema, of_ad = places.folder / "two.yaml", "side: ad, kind: content, store: "
    schema.write_text(DEFAULT_SCHEMA.read_text().replace(f"{of_ad}images", f"{of_ad}ads"))
    stores = f"{{ads: {places.folder / 'features'}}}"
    train_run(places, "two", data__schema_file=schema, data__stores=stores)
    store = FeatureStore.open(places.folder / "features")
    store.delete([1_001, 1_045])
    features_ND = np.random.default_rng(9).normal(size=(2, 16)).astype(np.float32)
    store.put(FeatureRows.of(["item/3", "new"], features_ND, keys=np.array([1_003, NEW])))
    return places


@pytest.fixture
def run(places: Places) -> Path:
    return places.folder / "runs" / "both"


def expected(run: Path, places: Places, store: str = "images", **options: Any) -> dict[int, list[float]]:
    """What the service of a rank, with the whole run opened, makes of every key."""
    trained = open_trained(run, SoloComm(), **options)
    service = trained.engine.services[store]
    keys = FeatureStore.open(places.folder / "features").snapshot(trained.store_version).keys()
    with torch.no_grad():
        visual_QV = service.embed(service.gather(keys)).numpy()
    trained.close()
    return dict(zip(keys.tolist(), visual_QV.tolist(), strict=True))


def read(path: Path) -> dict[int, list[float]]:
    rows = pq.read_table(path).to_pylist()
    found = {row["key"]: row["vector"] for row in rows}
    assert len(found) == len(rows)
    return found


def assert_same(found: dict[int, list[float]], wanted: dict[int, list[float]]) -> None:
    assert found.keys() == wanted.keys()
    for key, vector in wanted.items():
        np.testing.assert_allclose(found[key], vector, rtol=1e-5, atol=1e-7)


def test_every_image_gets_what_e_makes_of_it(run: Path, places: Places, tmp_path: Path) -> None:
    out = tmp_path / "visual.parquet"
    text = done("--run", run, "--out", out)
    found, wanted = read(out), expected(run, places)
    assert_same(found, wanted)
    assert set(found) == set(range(1_000, 1_050)) - {1_001, 1_045} | {NEW}
    assert len({tuple(vector) for vector in found.values()}) == 49
    uris = {row["key"]: row["uri"] for row in pq.read_table(out).to_pylist()}
    assert (uris[1_000], uris[1_003], uris[NEW]) == ("item/0", "item/3", "new")
    assert "images       49, 12 numbers each" in text
    assert f"features     snapshot 3 of {places.folder / 'features'}" in text
    schema, store = pq.read_schema(out), FeatureStore.open(places.folder / "features")
    assert str(schema.field("vector").type) == "fixed_size_list<element: float>[12]"
    about = json.loads(schema.metadata[b"visual_vectors"])
    assert about.pop("checkpoint_digest") == read_run(run).digest
    assert about == {
        "run": str(run), "checkpoint": "step-00000002", "network": "images", "dim": 12, "store": store.url,
        "snapshot": 3, "store_id": store.info.store_id, "commit_id": store.snapshot().manifest.commit_id,
    }  # fmt: skip


def test_another_snapshot_and_another_e(run: Path, places: Places, tmp_path: Path) -> None:
    done("--run", run, "--store-version", 1, "--out", tmp_path / "a.parquet")
    assert_same(read(tmp_path / "a.parquet"), expected(run, places, store_version=1))
    two = places.folder / "runs" / "two"
    for name in ("ads", "images"):
        done("--run", two, "--network", name, "--out", tmp_path / f"{name}.parquet")
        assert_same(read(tmp_path / f"{name}.parquet"), expected(two, places, name))
    assert read(tmp_path / "ads.parquet") != read(tmp_path / "images.parquet")


def test_components_of_a_compact_store_are_taken_as_the_run_took_them(places: Places, tmp_path: Path) -> None:
    remake(FeatureStore.open(places.folder / "features"), tmp_path / "features", dims=6, dtype="bfloat16")
    run = train_run(Places(tmp_path), "compact", data__samples=places.folder / "samples")
    done("--run", run, "--out", tmp_path / "v.parquet")
    found = read(tmp_path / "v.parquet")
    assert_same(found, expected(run, Places(tmp_path)))
    assert len(found) == 49 and len({tuple(vector) for vector in found.values()}) == 49


def test_e_takes_many_blocks_and_failures_leave_all(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard gives a block at least."""
    monkeypatch.setattr(export, "BATCH_ROWS", 25)
    done("--run", run, "--out", tmp_path / "v.parquet")
    metadata = pq.read_metadata(tmp_path / "v.parquet")
    counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    assert (sum(counts), len(counts)) == (49, 2)
    assert counts[0] >= 25
    out = tmp_path / "v.parquet"
    done("--run", run, "--out", out, "--store-version", 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tables = export.ImageNetwork.tables

    def broken(network: export.ImageNetwork) -> Any:
        yield next(tables(network))
        raise export.DataError("it broke")

    monkeypatch.setattr(export.ImageNetwork, "tables", broken)
    assert "error: it broke" in failed("--run", run, "--out", out, code=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_a_run_it_is_the_newest_one(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "data/runs has no run with a checkpoint; train one" in failed()
    for folder, name in (("data/runs/daily", "2026-01-02"), ("data/runs", "older"), ("data/runs", "newer")):
        run = train_run(places, name, train__max_steps=1, run__dir=folder)
    assert "run          data/runs/newer, step-00000001" in done()
    assert_same(read(tmp_path / "data" / "visual.parquet"), expected(run, places))
    train_run(places, "2026-01-03", train__max_steps=1, run__dir="data/runs/daily")
    assert "run          data/runs/daily/2026-01-03, step-00000001" in done()


def test_mistakes(places: Places, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.parquet"
    none = places.folder / "runs" / "none"
    assert "has model.images=none: it has no E for images" in failed("--run", none, "--out", out)
    assert "has step-00000002, and RUN" in failed("--run", run, "--checkpoint", 7, "--out", out)
    assert not out.exists()
    two = ["--run", places.folder / "runs" / "two", "--out", tmp_path / "v.parquet"]
    has = "has the networks images, ads; choose one by --network"
    assert has in failed(*two) and "--network text: " in failed(*two, "--network", "text")
    assert "has the networks images;" in failed("--run", run, "--network", "text", "--out", two[-1])
