"""The stores of a run: of each content its own, at the snapshot that was recorded; another one is refused."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurestore.errors import AnotherStoreError
from featurestore.problems import Problem as StoreProblem
from featurestore.spec import ExtractorSpec, Int8Spec, StoreInfo
from featurestore.store import FeatureStore, SnapshotId
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.history import move_channel, restore
from featurestore.upkeep.verify import repair
from jobs.export_embeddings import app as export_app
from tests.cli import invoke, said
from tests.raised import raises, told
from tests.ranks import StandingRanks
from tests.trainer.conftest import Places, add_a_row, drawn_store, make_days, make_places, permuted, remade
from tests.trainer.whole_runs import report_of, run_alone
from trainer.comm import SoloComm
from trainer.compat import app as compat_app
from trainer.config import load_config
from trainer.daily import follow
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.evaluate import app as evaluate_app
from trainer.prerank.__main__ import app as prerank_app
from trainer.problems import Problem
from trainer.runs.checkpoint import AcceptedStore, read_recorded, read_state
from trainer.runs.folder import find_checkpoint
from trainer.runs.open import kind_of_features, open_partition, store_places
from trainer.runs.saved import open_trained
from trainer.schema.fields import load_schema

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


def recorded_of(run: Path) -> dict[str, SnapshotId]:
    """The snapshots that a run's newest checkpoint is of, by store."""
    return read_recorded(find_checkpoint(run)).stores


@pytest.mark.long
def test_a_run_goes_on_with_the_recorded_snapshot_of_each_content_or_one_that_is_accepted(tmp_path: Path) -> None:
    """On images, 16 wide, and titles, 5 wide."""
    places, titles, run = make_places(tmp_path), tmp_path / "titles", tmp_path / "runs/a"
    (tmp_path / "schema.yaml").write_text(SCHEMA)

    def make_titles() -> FeatureStore:
        return drawn_store(titles, np.random.default_rng(8).normal(size=(50, 5)), name="titles", num_shards=8)

    def train(steps: int, **changes: Any) -> dict[str, int]:
        """The versions in the run's report."""
        settings = {"data__schema_file": tmp_path / "schema.yaml", "data__stores": f"{{titles: {titles}}}"}
        settings |= {"model__pooling": "multi_query", "run__name": "a", "train__max_steps": steps}
        report = report_of(run_alone(places, **settings | changes))
        return {name: store["version"] for name, store in report["stores"].items()}

    absent = {"where": "data.stores.titles", "value": titles, "command": f"crossmedia import --store {titles}"}
    with pytest.raises(DataError, match=told(Problem.NO_STORE_AT_SETTING, **absent)):
        train(6)
    make_titles()
    assert train(6) == {"images": 1, "titles": 1}
    state, again = read_state(find_checkpoint(run)), {"run__resume": "latest"}
    assert {name: kind["dim"] for name, kind in state.origin.stores.items()} == {"images": 16, "titles": 5}
    assert state.stores["titles"].url == str(titles)
    shutil.rmtree(titles)
    made_again = make_titles()
    way_out = re.compile(rf"data\.stores\.titles .* {run} {titles} --name titles$")
    with raises(AnotherStoreError, StoreProblem.ANOTHER_STORE, hint=way_out):
        train(7, **again)
    assert "logloss" in said(compat_app, run, titles, "--name", "titles")
    said(compat_app, run, places.folder / "features")
    said(compat_app, run, titles, "--name", "titles", "--accept")
    assert train(7, **again) == {"images": 1, "titles": 1}
    made_again.delete(list(range(0, 50, 2)))
    assert train(8, **again) == {"images": 1, "titles": 1}
    assert train(9, **again, data__store_versions="{titles: 2}") == {"images": 1, "titles": 2}
    missing = report_of(run)["missing_by_store"]
    assert missing["titles"] > missing["images"] == 0


BOTH, UNUSED = ["images", "titles"], (Problem.UNUSED_STORE, {"where": "tiles", "known": re.compile("^images")})
ADDRESSES = [
    (BOTH, "data.store=a data.stores.titles=b data.store_version=3", [("images", "a", 3), ("titles", "b", None)]),
    (BOTH, "model.images=none data.stores.titles=b", []),
    (["titles"], "data.store=a", [("titles", "a", None)]),
    (["titles"], "data.store=b data.stores.titles=a", [("titles", "a", None)]),
    (BOTH, "data.store=a", (Problem.STORE_WITHOUT_ADDRESS, {"where": "titles", "value": "a"})),
    (BOTH, "data.stores.titles=b data.stores.tiles=c", UNUSED),
]


@pytest.mark.parametrize(("contents", "settings", "found"), ADDRESSES)
def test_data_store_is_the_images_or_only_one(contents: list[str], settings: str, found: Any, tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    schema = load_schema(tmp_path / "schema.yaml")
    fields = tuple(each for each in schema.fields if each.kind != "content" or each.store_name in contents)
    schema, config = schema.model_copy(update={"fields": fields}), load_config(settings=settings.split())
    if isinstance(found, tuple):
        with raises(ConfigError, found[0], **found[1]):
            store_places(config, schema)
    else:
        assert [(each.name, each.url, each.version) for each in store_places(config, schema)] == found


@pytest.mark.long
@pytest.mark.usefixtures("undrawn")
def test_a_run_keeps_the_snapshot_that_its_channel_had_when_it_began_and_commands_take_channels(tmp_path: Path) -> None:
    places, run = make_places(tmp_path), tmp_path / "runs/a"
    store = FeatureStore.open(tmp_path / "features")
    stable = store.snapshot()
    move_channel(store, "stable", stable.version)
    store.delete(stable.keys()[:4])

    def trained(name: str = "a", **changes: Any) -> SnapshotId:
        small = {"train__max_steps": 2, "data__store_version": "stable", "data__missing": "zeros"}
        return recorded_of(run_alone(places, run__name=name, **small | changes))["images"]

    assert trained() == SnapshotId.of(stable)
    assert report_of(run)["store_version"] == stable.version
    evaluated = (run, "--store", store.url, "--bootstrap", 0, "--out", tmp_path / "report")
    assert "is at snapshot" in said(evaluate_app, *evaluated)
    assert "is at snapshot" not in said(evaluate_app, *evaluated, "--store-version", "stable")
    without = said(evaluate_app, run, "--store-version", "stable", code=2)
    assert f"--store-version: {Problem.VERSION_WITHOUT_STORE}" in without
    exported = said(export_app, "--run", run, "--store-version", "stable", "--out", tmp_path / "visual.parquet")
    assert f"features snapshot {stable.version} of" in exported
    newest = SnapshotId.of(store.snapshot())
    move_channel(store, "stable", newest.version)
    assert trained(run__resume="latest", train__max_steps=3) == SnapshotId.of(stable)
    assert trained(run__resume="latest", train__max_steps=4, data__store_version=newest.version) == newest
    assert trained("b") == newest


def test_a_checkpoint_keeps_features_in_int8_as_they_are() -> None:
    int8 = Int8Spec(ranges=(("features.3", 0.0, 1 / 3),), num_images=2, num_held_out=1, mean_cosine=0.999)
    drawn = {"backbone": "b", "layer": "l", "weights_digest": "w", "preprocessing": "p"}
    kind = kind_of_features(StoreInfo(dim=2, extractor=ExtractorSpec(**drawn, compute_dtype="int8", int8=int8)))
    assert json.loads(json.dumps(kind)) == kind


RUN = {"model__base": "two_tower", "train__max_steps": 2}
AGAIN = {**RUN, "run__name": "a", "run__resume": "latest", "train__max_steps": 3}


def resume(own: Places, **changes: Any) -> None:
    run_alone(own, **{**AGAIN, **changes})


def accept_found(own: Places) -> None:
    """Accept the store that is there in the place of the recorded one."""
    said(compat_app, own.folder / "runs/a", own.folder / "features", "--accept", "--force", "it is known")


@pytest.mark.parametrize(("one", "another"), ["ab", "ba"])
def test_of_a_store_put_back_the_very_snapshot_is_replaced_and_of_another_all(one: str, another: str) -> None:
    lost, other, again = (
        SnapshotId(url="u", version=1, store_id=store * 32, commit_id=commit * 32)
        for store, commit in ((one, "1"), (another, "2"), (one, "3"))
    )
    for accepted, replaced in ((other, [True, False, True]), (again, [True, False, False])):
        store = AcceptedStore(name="x", recorded=lost, accepted=accepted, figures={})
        assert [store.replaces("x", each) for each in (lost, other, again)] == replaced


@pytest.mark.long
@pytest.mark.usefixtures("undrawn")
class TestRebuilt:
    """Another store under the same address."""

    @pytest.fixture
    def ids(self, own: Places) -> tuple[str, str]:
        """The old store's id and the new one's, as messages show them."""
        old = FeatureStore.open(own.folder / "features").info.store_id
        return old[:8], remade(own.folder / "features", permuted).info.store_id[:8]

    def test_all_but_a_warm_start_refuse_it(self, own: Places, ids: tuple[str, str], tmp_path: Path) -> None:
        run, features, index = own.folder / "runs/a", own.folder / "features", tmp_path / "index"
        old, new = (re.compile(f"of store {each} at") for each in ids)
        hint = re.compile(rf"data\.store .*crossmedia compat {run} {features}$")
        with raises(AnotherStoreError, StoreProblem.ANOTHER_STORE, value=old, found=new, hint=hint):
            resume(own)
        with pytest.raises(AnotherStoreError):
            resume(own, data__store_version=1)
        for app, *words in (
            (evaluate_app, run, "--bootstrap", 0),
            (evaluate_app, run, "--bootstrap", 0, "--store", features),
            (export_app, "--run", run, "--out", tmp_path / "visual.parquet"),
            (prerank_app, "build", "--run", run, "--out", index),
            (prerank_app, "search", "--run", run, "--index", index, "--user", 3),
        ):
            output = invoke(app, *words, code=1).output
            assert all(f"of store {each} at" in output for each in ids), words
        assert not (run / "evaluation").exists() and not (tmp_path / "visual.parquet").exists()
        assert (run_alone(own, **RUN, run__name="b", run__warm_start=run) / "report.json").is_file()
        shutil.rmtree(features / "log")
        (features / "log").mkdir()  # not even the recorded version is there
        with raises(AnotherStoreError, StoreProblem.ANOTHER_STORE, found=re.compile(f"^snapshot 0 .* {ids[1]} at")):
            resume(own)

    def test_two_ranks_refuse_it_by_one_line(self, own: Places, ids: tuple[str, str], two_ranks: StandingRanks) -> None:
        (code, output), other = two_ranks.call("-m", "trainer.main", *own.settings(**AGAIN))
        assert code == 1 and other == (1, "")
        assert output.count("error: ") == 1 and all(f"of store {each} at" in output for each in ids)

    def test_an_accepted_one_is_read_in_its_place(self, own: Places, ids: tuple[str, str], tmp_path: Path) -> None:
        run = own.folder / "runs/a"
        accept_found(own)
        invoke(evaluate_app, run, "--bootstrap", 0, "--out", tmp_path / "figures", code=0)
        (note,) = (each for each in report_of(tmp_path / "figures")["notes"] if "accepted" in each)
        assert all(f"of store {each} at" in note for each in ids)
        resume(own)
        invoke(export_app, "--run", run, "--out", tmp_path / "visual.parquet", code=0)
        assert recorded_of(run)["images"].store_id[:8] == ids[1]
        again = remade(own.folder / "features", permuted).info.store_id[:8]
        with raises(AnotherStoreError, StoreProblem.ANOTHER_STORE, found=re.compile(f" of store {again} at")):
            resume(own)
        (run / "accepted-stores.json").write_text("{")
        with raises(CheckpointError, Problem.ACCEPTED_STORES_DAMAGED, where=run / "accepted-stores.json"):
            resume(own)

    def test_an_index_is_of_one_store(self, own: Places, tmp_path: Path) -> None:
        index = tmp_path / "index"
        words = ("build", "--run", own.folder / "runs/a", "--out", index)
        invoke(prerank_app, *words, code=0)
        add_a_row(FeatureStore.open(own.folder / "features"))
        invoke(prerank_app, *words, "--add", code=0)  # another snapshot of the same store
        recorded, made = recorded_of(own.folder / "runs/a")["images"], remade(own.folder / "features", permuted)
        accept_found(own)
        output = invoke(prerank_app, *words, "--add", code=1).output
        old, new = (re.compile(f".*{each[:8]}.*") for each in (recorded.store_id, made.info.store_id))
        assert re.search(told(StoreProblem.ANOTHER_STORE, where=f"the index {index}", value=old, found=new), output)
        invoke(prerank_app, *words, code=0)
        invoke(prerank_app, *words, "--add", code=0)


@pytest.mark.long
class TestTheSame:
    """What is the same store, in whatever state and wherever it stands."""

    def test_every_rank_has_the_store_of_rank_0_which_the_checkpoint_and_the_report_name(self, own: Places) -> None:
        """Each machine may have a disk of its own under the same path."""
        run, config = own.folder / "runs/a", load_config(settings=own.settings(**RUN, run__name="a"))
        (place,) = store_places(config, load_schema())
        chosen = SnapshotId.of(FeatureStore.open(place.url).snapshot())
        assert recorded_of(run) == {"images": chosen} and chosen.store_id and chosen.commit_id
        assert report_of(run)["stores"] == {"images": chosen.model_dump()}
        open_partition(config, SoloComm(), place, chosen).close()
        elsewhere = chosen.model_copy(update={"store_id": "a" * 32, "commit_id": "b" * 32})
        first, own_one = re.compile("of store aaaaaaaa "), re.compile(f"of store {chosen.store_id[:8]} ")
        with raises(AnotherStoreError, Problem.OTHER_STORE_THAN_RANK_0, value=place.url, first=first, own=own_one):
            open_partition(config, SoloComm(), place, elsewhere)

    def test_restored_compacted_grown_and_copied_to_another_address(self, own: Places, tmp_path: Path) -> None:
        store = FeatureStore.open(own.folder / "features")
        add_a_row(store)
        compact(store, force=True)
        restore(store, 1)
        resume(own, data__store_version=store.snapshot().version)
        with contextlib.closing(open_trained(own.folder / "runs/a", SoloComm())) as opened:
            assert opened.store_version == 4
        (own.folder / "features").rename(tmp_path / "copy")
        resume(own, data__store=tmp_path / "copy", train__max_steps=4)

    @pytest.mark.parametrize("knows_its_id", [True, False])
    def test_repaired(self, own: Places, knows_its_id: bool) -> None:
        folder = own.folder / "features"
        before = FeatureStore.open(folder)
        (folder / "store.json").write_text("{}")
        repair(str(folder))
        after = FeatureStore.open(folder)
        assert after.info.store_id == before.info.store_id
        if not knows_its_id:  # as a repair of a store does whose files are too old to know its id
            (folder / "store.json").unlink()
            FeatureStore.create(folder, after.info)
            add_a_row(after)
        with contextlib.closing(open_trained(own.folder / "runs/a", SoloComm())) as opened:
            assert opened.store_version == (1 if knows_its_id else 2)
        resume(own)

    def test_put_back_from_a_backup_and_gone_another_way(self, own: Places, tmp_path: Path) -> None:
        folder = own.folder / "features"
        shutil.copytree(folder, tmp_path / "backup")
        add_a_row(FeatureStore.open(folder))
        resume(own, data__store_version=2)
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "backup", folder)
        add_a_row(FeatureStore.open(folder))
        both = re.compile("^snapshot 2 ")
        with raises(AnotherStoreError, StoreProblem.ANOTHER_STORE, value=both, found=both):
            resume(own, train__max_steps=4)


@pytest.mark.long
def test_days_have_one_store(tmp_path: Path) -> None:
    places, features = make_days(tmp_path), tmp_path / "features"
    config = load_config(settings=places.settings(run__name="d", train__max_steps=2))
    follow(config, SoloComm(), first="2026-01-01", last="2026-01-02", continues=True)
    snapshot = SnapshotId.of(FeatureStore.open(features).snapshot())
    rows = json.loads((tmp_path / "runs/d/days.json").read_text())
    assert [(row["store_id"], row["commit_id"]) for row in rows] == [(snapshot.store_id, snapshot.commit_id)] * 2
    day, made = re.compile("2026-01-02"), re.compile(f" of store {remade(features, permuted).info.store_id[:8]} at")
    with raises(AnotherStoreError, StoreProblem.ANOTHER_STORE, where=day, found=made):
        follow(config, SoloComm(), continues=True)
    assert not (tmp_path / "runs/d/2026-01-03").exists()
