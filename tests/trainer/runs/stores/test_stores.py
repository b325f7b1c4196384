"""Runs on two contents an item, each in a store of its own; on channels, compact stores and imported vectors."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurestore.errors import AnotherStoreError
from featurestore.format.datafile import FeatureRows
from featurestore.spec import ExtractorSpec, Int8Spec, StoreInfo
from featurestore.store import FeatureStore, SnapshotId
from featurestore.upkeep.history import move_channel
from featurestore.upkeep.remake import remake
from jobs.export_embeddings import app as export_app
from tests.cli import invoke
from tests.featurestore.shardrows import read_shard
from tests.trainer.conftest import Places, drawn_store, make_places
from tests.trainer.whole_runs import run_alone as run_here
from trainer.comm import SoloComm
from trainer.compat import app as compat_app
from trainer.config import load_config
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.evaluate import app as evaluate_app
from trainer.main import train
from trainer.runs import checkpoint
from trainer.runs.checkpoint import read_state
from trainer.runs.folder import find_checkpoint
from trainer.runs.open import kind_of_features, store_places
from trainer.schema.fields import Schema, load_schema

SCHEMA = """
fields:
  - {name: user, side: user, kind: id}
  - {name: behavior_item, side: user, kind: multi_id, table: item}
  - {name: ad_item, side: ad, kind: id, table: item}
  - {name: behavior_image, side: user, kind: content}
  - {name: ad_image, side: ad, kind: content}
  - {name: behavior_title, side: user, kind: content, store: titles, width: 6, column: behavior_item}
  - {name: ad_title, side: ad, kind: content, store: titles, width: 6, column: ad_item}
"""


def make_titles(folder: Path) -> FeatureStore:
    """Features of the titles of items 0 to 49."""
    return drawn_store(folder, np.random.default_rng(8).normal(size=(50, 5)), name="titles", num_shards=8)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Samples, a store of images, 16 wide, and one of titles, 5 wide."""
    places = make_places(tmp_path_factory.mktemp("stores"))
    (places.folder / "schema.yaml").write_text(SCHEMA)
    make_titles(places.folder / "titles")
    return places


def settings_of(places: Places, **changes: Any) -> list[str]:
    own = {
        "data__schema_file": places.folder / "schema.yaml",
        "data__stores": f"{{titles: {places.folder / 'titles'}}}",
    }
    return list(places.settings(**{**own, "model__pooling": "multi_query", "train__max_steps": 6, **changes}))


def run_alone(places: Places, **changes: Any) -> dict[str, Any]:
    """The report of a run in this process."""
    config = load_config(settings=settings_of(places, **changes))
    train(config, SoloComm())
    report: dict[str, Any] = json.loads((Path(config.run.dir) / str(config.run.name) / "report.json").read_text())
    return report


def versions(report: dict[str, Any]) -> dict[str, int]:
    return {name: store["version"] for name, store in report["stores"].items()}


class TestRuns:
    def test_report_and_checkpoint_name_both(self, both: Places) -> None:
        assert versions(run_alone(both, run__name="one")) == {"images": 1, "titles": 1}
        state = read_state(find_checkpoint(both.folder / "runs" / "one"))
        assert {name: kind["dim"] for name, kind in state.origin.stores.items()} == {"images": 16, "titles": 5}
        assert state.stores["titles"].url == str(both.folder / "titles")

    @pytest.mark.long
    def test_resumption_opens_the_recorded_snapshots(self, both: Places, tmp_path: Path) -> None:
        titles = make_titles(tmp_path / "titles")
        stores = {"data__stores": f"{{titles: {tmp_path / 'titles'}}}", "run__name": "again"}
        run_alone(both, **stores)
        titles.delete(list(range(0, 50, 2)))
        again = {**stores, "run__resume": "latest"}
        assert versions(run_alone(both, **again, train__max_steps=7)) == {"images": 1, "titles": 1}
        asked = run_alone(both, **again, train__max_steps=8, data__store_versions="{titles: 2}")
        assert versions(asked) == {"images": 1, "titles": 2}
        assert asked["missing_by_store"]["titles"] > asked["missing_by_store"]["images"] == 0

    @pytest.mark.long
    def test_one_of_two_was_made_anew(self, both: Places, tmp_path: Path) -> None:
        stores = {"data__stores": f"{{titles: {tmp_path / 'titles'}}}", "run__name": "anew"}
        make_titles(tmp_path / "titles")
        run_alone(both, **stores)
        shutil.rmtree(tmp_path / "titles")
        make_titles(tmp_path / "titles")
        again = {**stores, "run__resume": "latest", "train__max_steps": 7}
        with pytest.raises(AnotherStoreError, match=r"set data\.stores\.titles to .* --name titles$"):
            run_alone(both, **again)
        words = [str(both.folder / "runs" / "anew"), str(tmp_path / "titles"), "--name", "titles"]
        assert "logloss" in invoke(compat_app, *words, code=0).output
        images = [words[0], str(both.folder / "features")]
        invoke(compat_app, *images, code=0)
        invoke(compat_app, *words, "--accept", code=0)
        assert versions(run_alone(both, **again)) == {"images": 1, "titles": 1}

    def test_a_store_that_is_not_there_is_named(self, both: Places, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"data\.stores\.titles=.*nowhere is no feature store; make it with: cross"):
            run_alone(both, run__name="x", data__stores=f"{{titles: {tmp_path / 'nowhere'}}}")


class TestPlaces:
    @pytest.fixture
    def schema(self, tmp_path: Path) -> Schema:
        (tmp_path / "schema.yaml").write_text(SCHEMA)
        return load_schema(tmp_path / "schema.yaml")

    @pytest.mark.parametrize(
        ("settings", "places"),
        [
            ("data.store=a data.stores.titles=b data.store_version=3", [("images", "a", 3), ("titles", "b", None)]),
            ("model.images=none data.stores.titles=b", []),
        ],
    )
    def test_data_store_is_that_of_the_images(self, schema: Schema, settings: str, places: list[Any]) -> None:
        found = store_places(load_config(settings=settings.split()), schema)
        assert [(each.name, each.url, each.version) for each in found] == places

    @pytest.mark.parametrize("settings", ["data.store=a", "data.store=b data.stores.titles=a"])
    def test_the_only_store_may_have_any_name(self, schema: Schema, settings: str) -> None:
        fields = tuple(field for field in schema.fields if field.store_name == "titles" or field.kind != "content")
        found = store_places(load_config(settings=settings.split()), schema.model_copy(update={"fields": fields}))
        assert [(each.name, each.url) for each in found] == [("titles", "a")]

    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ("data.store=a", r"titles has no address: set data\.stores\.titles"),
            (
                "data.stores.titles=b data.stores.tiles=c",
                r"data\.stores\.tiles: no content field .* names store tiles, only images",
            ),
        ],
    )
    def test_addresses_that_do_not_fit_the_fields(self, schema: Schema, settings: str, problem: str) -> None:
        with pytest.raises(ConfigError, match=problem):
            store_places(load_config(settings=settings.split()), schema)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A store whose second snapshot has other features than its first, which is stable."""
    places = make_places(tmp_path)
    store = FeatureStore.open(tmp_path / "features")
    move_channel(store, "stable", store.snapshot().version)
    rows = [read_shard(store.snapshot(), shard) for shard in range(store.info.num_shards)]
    store.delete([int(key) for each in rows for key in each.keys_N[:1]])
    return places


def trained(places: Places, **changes: Any) -> None:
    small = {"run__name": "a", "train__max_steps": 2, "data__store_version": "stable", "data__missing": "zeros"}
    run_here(places, **{**small, **changes})


@pytest.mark.long
def test_a_run_keeps_the_snapshot_that_its_channel_had_when_it_began(places: Places, tmp_path: Path) -> None:
    store, run = FeatureStore.open(tmp_path / "features"), tmp_path / "runs/a"
    stable, newest = store.snapshot("stable"), store.snapshot()
    assert stable.version < newest.version
    trained(places)
    state = checkpoint.read_state(find_checkpoint(run))
    assert state.stores["images"] == SnapshotId.of(stable)
    assert json.loads((run / "report.json").read_text())["store_version"] == stable.version
    move_channel(store, "stable", newest.version)
    trained(places, run__resume="latest", train__max_steps=3)
    assert checkpoint.read_state(find_checkpoint(run)).stores["images"] == SnapshotId.of(stable)
    trained(places, run__resume="latest", train__max_steps=4, data__store_version=newest.version)
    assert checkpoint.read_state(find_checkpoint(run)).stores["images"] == SnapshotId.of(newest)
    trained(places, run__name="b")
    assert checkpoint.read_state(find_checkpoint(tmp_path / "runs/b")).stores["images"] == SnapshotId.of(newest)


@pytest.mark.long
@pytest.mark.usefixtures("undrawn")
def test_commands_take_channels(places: Places, tmp_path: Path) -> None:
    trained(places)
    store, run = FeatureStore.open(tmp_path / "features"), tmp_path / "runs/a"

    def called(app: Any, *words: object) -> str:
        result = invoke(app, *words, code=0)
        return result.output

    evaluated = ("--store", store.url, "--bootstrap", 0, "--out", tmp_path / "report")
    assert "is at snapshot" in called(evaluate_app, run, *evaluated)
    assert "is at snapshot" not in called(evaluate_app, run, *evaluated, "--store-version", "stable")
    said = called(export_app, "--run", run, "--store-version", "stable", "--out", tmp_path / "visual.parquet")
    assert f"features     snapshot {store.snapshot('stable').version} of" in said
    lost = invoke(evaluate_app, run, "--store-version", "stable", code=2)
    assert "--store-version: it needs --store" in " ".join(lost.output.split())


@pytest.mark.long
def test_resumption_knows_the_basis_of_a_compact_store(tmp_path: Path) -> None:
    places = make_places(tmp_path)
    store = FeatureStore.open(tmp_path / "features")
    remake(store, tmp_path / "compact", dims=6, dtype="float32")

    def train_on(name: str, **changes: Any) -> None:
        run_here(places, run__name="a", data__store=tmp_path / name, **changes)

    train_on("compact", train__max_steps=1)
    train_on("compact", train__max_steps=2, run__resume="latest")
    store.put(FeatureRows.of(["more"], np.ones((1, 16), np.float32)))
    remake(store, tmp_path / "other", dims=6, dtype="float32")
    with pytest.raises(CheckpointError, match=r"stores\.images\.basis is '\w{64}' here, '\w{64}' in the checkpoint"):
        train_on("other", train__max_steps=3, run__resume="latest")
    with pytest.raises(CheckpointError, match=r"stores\.images\.dim is 16 here, 6"):
        train_on("features", train__max_steps=3, run__resume="latest")


def test_a_checkpoint_keeps_features_in_int8_as_they_are() -> None:
    int8 = Int8Spec(ranges=(("features.3", 0.0, 1 / 3),), num_images=2, num_held_out=1, mean_cosine=0.999)
    spec = ExtractorSpec(
        backbone="b", layer="l", weights_digest="w", preprocessing="p", compute_dtype="int8", int8=int8
    )
    kind = kind_of_features(StoreInfo(dim=2, extractor=spec))
    assert json.loads(json.dumps(kind)) == kind
