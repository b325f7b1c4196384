"""Files that jobs make of a run: E's numbers of every image, and scores; as a person types it, whole or absent."""

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from featurestore import FeatureRows, FeatureStore
from featurestore.upkeep.remake import remake
from jobs.export_embeddings import app
from jobs.score import app as score_app
from tests.cli import invoke, printed, said
from tests.ranks import StandingRanks
from tests.trainer.conftest import Places, make_places
from tests.trainer.samples.reading import replaced, written
from tests.trainer.whole_runs import run_alone
from trainer.comm import SoloComm
from trainer.evaluation.predict import predict_run
from trainer.runs import saved as export
from trainer.runs.saved import open_trained, read_run
from trainer.samples.survey import write_part
from trainer.schema.fields import DEFAULT_SCHEMA

pytestmark = pytest.mark.long  # they train whole runs
NEW = 1_077
WORDY = ("user", "ad_item", "behavior_item")
done = partial(printed, app)
failed = partial(said, app, code=2)
scored = partial(printed, score_app)


def train_run(places: Places, name: str, **changes: Any) -> Path:
    own = {"run__name": name, "train__max_steps": 2, "data__missing": "zeros", "model__compute_dtype": "float32"}
    return run_alone(places, **{**own, **changes})


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A run, and samples and a store that have changed since.

    The test has two files; the store has four shards, an image more, two gone, and one with another feature.
    """
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
    test = places.folder / "samples" / "test"
    table = pq.read_table(test / "day=2026-01-01.parquet", partitioning=None)
    pq.write_table(table.slice(40), test / "day=2026-01-02.parquet", row_group_size=7)
    pq.write_table(table.slice(0, 40), test / "day=2026-01-01.parquet", row_group_size=7)
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
    np.testing.assert_allclose([found[key] for key in wanted], [*wanted.values()], rtol=1e-5, atol=1e-7)


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
    assert "data/runs" in failed()
    for folder, name in (("data/runs/daily", "2026-01-02"), ("data/runs", "older"), ("data/runs", "newer")):
        run = train_run(places, name, train__max_steps=1, run__dir=folder)
    assert "run          data/runs/newer, step-00000001" in done()
    assert_same(read(tmp_path / "data" / "visual.parquet"), expected(run, places))
    train_run(places, "2026-01-03", train__max_steps=1, run__dir="data/runs/daily")
    assert "run          data/runs/daily/2026-01-03, step-00000001" in done()


def test_mistakes(places: Places, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.parquet"
    none = places.folder / "runs" / "none"
    assert "model.images=none" in failed("--run", none, "--out", out)
    assert "step-00000002" in failed("--run", run, "--checkpoint", 7, "--out", out)
    assert not out.exists()
    two = ["--run", places.folder / "runs" / "two", "--out", tmp_path / "v.parquet"]
    assert "images, ads" in failed(*two) and "--network text" in failed(*two, "--network", "text")
    assert " images;" in failed("--run", run, "--network", "text", "--out", two[-1])


def impressions(folder: Path) -> list[dict[str, Any]]:
    """What the rows have to be, in plain loops over the files."""
    found = []
    for path in sorted((folder / "test").glob("*.parquet")):
        for row, group in enumerate(pq.read_table(path, partitioning=None).to_pylist()):
            for place, (ad, label) in enumerate(zip(group["ad_item"], group["label"], strict=True)):
                where = {"file": f"test/{path.name}", "row": row, "place": place}
                found.append({"user": group["user"], "ad": ad, "time": group["timestamp"], "label": label, **where})
    return found


def test_every_impression_has_its_score(places: Places, run: Path, tmp_path: Path) -> None:
    train = places.folder / "samples" / "train"
    away = train.rename(tmp_path / "train")
    try:  # training samples are not needed
        text = scored("--run", run, "--out", tmp_path / "scores.parquet")
    finally:
        away.rename(train)
    scores = pq.read_table(tmp_path / "scores.parquet")
    logit_N = scores["logit"].to_numpy()
    assert scores.drop_columns(["logit", "probability"]).to_pylist() == impressions(places.folder / "samples")
    np.testing.assert_array_equal(logit_N, predict_run(run).logit_N.astype(np.float32))
    assert np.ptp(logit_N) > 0.01
    np.testing.assert_allclose(scores["probability"].to_numpy(), 1 / (1 + np.exp(-logit_N)), rtol=1e-6)
    about = json.loads(scores.schema.metadata[b"scores"])
    assert (about["run"], about["checkpoint"], about["missing"]) == (str(run), "step-00000002", "zeros")
    assert about["stores"]["images"]["version"] == 1
    assert f"{len(scores):,} impressions" in text and f"written to   {tmp_path / 'scores.parquet'}" in text


def test_two_ranks_write_the_same_scores(run: Path, tmp_path: Path, two_ranks_of_each: StandingRanks) -> None:
    scored("--run", run, "--out", tmp_path / "one.parquet")
    assert " on 2 ranks" in two_ranks_of_each.run("-m", "jobs.score", "--run", run, "--out", tmp_path / "two.parquet")
    one, two = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("one", "two"))
    assert two.schema.equals(one.schema, check_metadata=True)
    others = [name for name in one.column_names if name not in ("logit", "probability")]
    assert two.select(others).equals(one.select(others))
    np.testing.assert_allclose(two["logit"].to_numpy(), one["logit"].to_numpy(), rtol=0, atol=1e-6)


def test_texts_of_scores_stay_texts_and_those_of_ids_come_from_the_dictionary(run: Path, tmp_path: Path) -> None:
    """Where one file has texts, the numbers of the other are written as texts too."""
    places = make_places(tmp_path / "wordy")
    test = places.folder / "samples" / "test"
    table = pq.read_table(test / "day=2026-01-01.parquet", partitioning=None)
    wordy = replaced(table, WORDY, pa.string(), written).drop_columns(["timestamp"])
    pq.write_table(wordy, test / "day=2026-01-02.parquet")
    scored("--run", run, "--samples", places.folder / "samples", "--out", tmp_path / "scores.parquet")
    scores = pq.read_table(tmp_path / "scores.parquet")
    half = len(scores) // 2
    numbers, words = scores.slice(0, half), scores.slice(half)
    assert words["user"].to_pylist() == [f"user ü{user}" for user in numbers["user"].to_pylist()]
    assert words["ad"].to_pylist() == [f"item ü{ad}" for ad in numbers["ad"].to_pylist()]
    assert words["time"].null_count == half and numbers["time"].null_count == 0
    places = make_places(tmp_path / "numbers")
    wanted = impressions(places.folder / "samples")
    users, ads = ({each[name] for each in wanted} for name in ("user", "ad"))
    texts = {ad: f"SKU-{ad}" for ad in sorted(ads - users)[1:]}
    write_part(places.folder / "samples" / "ids.parquet", texts)
    scored("--run", run, "--samples", places.folder / "samples", "--out", tmp_path / "scores.parquet")
    scores = pq.read_table(tmp_path / "scores.parquet")
    assert texts and scores["user"].to_pylist() == [each["user"] for each in wanted], "users have no texts: numbers"
    assert scores["ad"].to_pylist() == [texts.get(each["ad"], str(each["ad"])) for each in wanted]


def test_a_failed_score_leaves_the_file_as_it_was(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored("--run", run, "--out", tmp_path / "scores.parquet")
    before = (tmp_path / "scores.parquet").read_bytes()
    monkeypatch.setattr("trainer.evaluation.predict.ScoreFile.add", Mock(side_effect=OSError("the disk is gone")))
    invoke(score_app, "--run", run, "--out", tmp_path / "scores.parquet", code=1)
    assert (tmp_path / "scores.parquet").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]
