"""Another store under the same address: refused by all that is made of the old one; the same one passes anywhere."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurestore.errors import AnotherStoreError
from featurestore.format.datafile import FeatureRows
from featurestore.store import FeatureStore, SnapshotId
from featurestore.upkeep.compaction import compact
from featurestore.upkeep.history import restore
from featurestore.upkeep.verify import repair
from jobs.export_embeddings import app as export_app
from tests.cli import invoke
from tests.ranks import StandingRanks
from tests.trainer.conftest import Places, make_days, make_places
from trainer.comm import SoloComm
from trainer.config import load_config
from trainer.daily import follow
from trainer.errors import CheckpointError
from trainer.evaluate import app as evaluate_app
from trainer.main import train
from trainer.prerank.__main__ import app as prerank_app
from trainer.runs import checkpoint
from trainer.runs.folder import find_checkpoint
from trainer.runs.open import open_partition, store_places
from trainer.runs.saved import open_trained
from trainer.schema.fields import load_schema

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("undrawn")]  # they train whole runs

KEYS = np.arange(1_000, 1_050)
URIS = [f"item/{n}" for n in range(50)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A run of two towers, `a`, of two steps."""
    places = make_places(tmp_path_factory.mktemp("identity"))
    train(load_config(settings=settings_of(places)), SoloComm())
    return places


@pytest.fixture
def places(trained: Places, tmp_path: Path) -> Iterator[Places]:
    """The same, with a store that a test may change; it is put back."""
    features, kept = trained.folder / "features", tmp_path / "kept"
    shutil.copytree(features, kept)
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    yield trained
    for folder, copy in ((features, kept), (trained.folder / "runs", tmp_path / "runs")):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(copy, folder)


def settings_of(places: Places, **changes: Any) -> list[str]:
    small = {"run__name": "a", "model__base": "two_tower", "train__max_steps": 2}
    return list(places.settings(**{**small, **changes}))


def rebuild(folder: Path, seed: int | None = 1) -> FeatureStore:
    """Another store in the place of the one in `folder`: features of the same network, dealt out anew by `seed`."""
    store = FeatureStore.open(folder)
    features_ND = store.snapshot().get(KEYS)
    shutil.rmtree(folder)
    order = np.arange(50) if seed is None else np.random.default_rng(seed).permutation(50)
    made = FeatureStore.create(folder, store.info.kind)
    made.put(FeatureRows.of(URIS, features_ND[order], keys=KEYS))
    return made


def resume(places: Places, **changes: Any) -> None:
    settings = settings_of(places, **{"run__resume": "latest", "train__max_steps": 3, **changes})
    train(load_config(settings=settings), SoloComm())


def test_a_checkpoint_says_of_which_snapshot_it_is(places: Places) -> None:
    run = places.folder / "runs" / "a"
    snapshot = FeatureStore.open(places.folder / "features").snapshot()
    state = checkpoint.read_state(find_checkpoint(run))
    assert state.stores == {"images": SnapshotId.of(snapshot)}
    assert state.stores["images"].store_id and state.stores["images"].commit_id
    assert json.loads((run / "report.json").read_text())["stores"] == {
        "images": {name: getattr(state.stores["images"], name) for name in SnapshotId.model_fields}
    }


class TestRebuilt:
    @pytest.fixture
    def ids(self, places: Places) -> tuple[str, str]:
        """The old store's id and the new one's, as messages show them."""
        old = FeatureStore.open(places.folder / "features").info.store_id
        return old[:8], rebuild(places.folder / "features").info.store_id[:8]

    def test_resume(self, places: Places, ids: tuple[str, str]) -> None:
        with pytest.raises(AnotherStoreError) as refused:
            resume(places)
        text = str(refused.value)
        assert all(f"of store {each} at" in text for each in ids)
        assert "crossmedia compat" in text and "set data.store to" in text
        with pytest.raises(AnotherStoreError):
            resume(places, data__store_version=1)

    def test_resume_where_the_recorded_version_is_not_even_there(self, places: Places, ids: tuple[str, str]) -> None:
        features = places.folder / "features"
        shutil.rmtree(features / "log")
        (features / "log").mkdir()
        with pytest.raises(AnotherStoreError, match=f"This is snapshot 0 .* of store {ids[1]}"):
            resume(places)

    def test_commands(self, places: Places, ids: tuple[str, str], tmp_path: Path) -> None:
        run, features, index = places.folder / "runs" / "a", places.folder / "features", tmp_path / "index"
        for app, *words in (
            (evaluate_app, run, "--bootstrap", 0),
            (evaluate_app, run, "--bootstrap", 0, "--store", features),
            (export_app, "--run", run, "--out", tmp_path / "visual.parquet"),
            (prerank_app, "build", "--run", run, "--out", index),
            (prerank_app, "search", "--run", run, "--index", index, "--user", 3),
        ):
            said = invoke(app, *words, code=1).output
            assert all(f"of store {each} at" in said for each in ids), words
        assert not (run / "evaluation").exists() and not (tmp_path / "visual.parquet").exists()

    def test_two_ranks(self, places: Places, ids: tuple[str, str], two_ranks: StandingRanks) -> None:
        settings = settings_of(places, run__resume="latest", train__max_steps=3)
        (code, said), other = two_ranks.call("-m", "trainer.main", *settings)
        assert code == 1 and other == (1, "")
        assert said.count("error: ") == 1 and all(f"of store {each} at" in said for each in ids)

    def test_a_warm_start_passes(self, places: Places, ids: tuple[str, str]) -> None:
        warm = settings_of(places, run__name="b", run__warm_start=places.folder / "runs" / "a")
        train(load_config(settings=warm), SoloComm())
        assert (places.folder / "runs" / "b" / "report.json").is_file()

    def test_an_accepted_one_is_read_in_its_place(self, places: Places, ids: tuple[str, str], tmp_path: Path) -> None:
        run = places.folder / "runs" / "a"
        path = find_checkpoint(run)
        recorded = checkpoint.read_recorded(path).stores["images"]
        found = SnapshotId.of(FeatureStore.open(places.folder / "features").snapshot())
        entry = checkpoint.AcceptedStore(name="images", recorded=recorded, accepted=found, figures={})
        file = checkpoint.accept(path, entry)
        assert isinstance(file, Path)
        invoke(evaluate_app, run, "--bootstrap", 0, "--out", tmp_path / "figures", code=0)
        report = json.loads((tmp_path / "figures/report.json").read_text())
        (note,) = (each for each in report["notes"] if "accepted" in each)
        assert all(f"of store {each} at" in note for each in ids)
        resume(places)
        invoke(export_app, "--run", run, "--out", tmp_path / "visual.parquet", code=0)
        assert checkpoint.read_recorded(find_checkpoint(run)).stores["images"] == found
        again = rebuild(places.folder / "features", seed=2)
        with pytest.raises(AnotherStoreError, match=f"This is .* of store {again.info.store_id[:8]}"):
            resume(places)
        file.write_text("{")
        with pytest.raises(CheckpointError, match=r"accepted-stores\.json is damaged: .*accept the store again"):
            resume(places)


def test_every_rank_has_the_store_of_rank_0(places: Places) -> None:
    """Each machine may have a disk of its own under the same path."""
    config = load_config(settings=settings_of(places))
    (place,) = store_places(config, load_schema())
    chosen = SnapshotId.of(FeatureStore.open(place.url).snapshot())
    open_partition(config, SoloComm(), place, chosen).close()
    elsewhere = chosen.model_copy(update={"store_id": "a" * 32, "commit_id": "b" * 32})
    with pytest.raises(AnotherStoreError, match=r"rank 0 found .*of store aaaaaaaa .*all machines need the same store"):
        open_partition(config, SoloComm(), place, elsewhere)


class TestIndex:
    def test_is_of_one_store(self, places: Places, tmp_path: Path) -> None:
        run, index = places.folder / "runs" / "a", tmp_path / "index"
        words = ("--run", run, "--out", index)
        invoke(prerank_app, "build", *words, code=0)
        FeatureStore.open(places.folder / "features").put(
            FeatureRows.of(["more"], np.ones((1, 16), np.float32), keys=np.array([7]))
        )
        invoke(prerank_app, "build", *words, "--add", code=0)  # another snapshot of the same store
        path = find_checkpoint(run)
        recorded = checkpoint.read_recorded(path).stores["images"]
        made = rebuild(places.folder / "features")
        found = SnapshotId.of(made.snapshot())
        checkpoint.accept(path, checkpoint.AcceptedStore(name="images", recorded=recorded, accepted=found, figures={}))
        said = invoke(prerank_app, "build", *words, "--add", code=1).output
        assert f"the index {index} belongs to" in said and "build the index again, without --add" in said
        assert recorded.store_id[:8] in said and found.store_id[:8] in said
        invoke(prerank_app, "build", *words, code=0)
        invoke(prerank_app, "build", *words, "--add", code=0)


class TestTheSame:
    """What is the same store, in whatever state and wherever it stands."""

    def test_restored_compacted_and_grown(self, places: Places) -> None:
        store = FeatureStore.open(places.folder / "features")
        store.put(FeatureRows.of(["more"], np.ones((1, 16), np.float32), keys=np.array([7])))
        compact(store, force=True)
        restore(store, 1)
        resume(places, data__store_version=store.snapshot().version)
        with contextlib.closing(open_trained(places.folder / "runs" / "a", SoloComm())) as opened:
            assert opened.store_version == 4

    def test_copied_to_another_address(self, places: Places, tmp_path: Path) -> None:
        shutil.copytree(places.folder / "features", tmp_path / "copy")
        shutil.rmtree(places.folder / "features")
        resume(places, data__store=tmp_path / "copy")

    @pytest.mark.parametrize("knows_its_id", [True, False])
    def test_repaired(self, places: Places, knows_its_id: bool) -> None:
        folder = places.folder / "features"
        before = FeatureStore.open(folder)
        (folder / "store.json").write_text("{}")
        repair(str(folder))
        after = FeatureStore.open(folder)
        assert after.info.store_id == before.info.store_id
        if not knows_its_id:  # as a repair of a store does whose files are too old to know its id
            (folder / "store.json").unlink()
            FeatureStore.create(folder, after.info)
            after.put(FeatureRows.of(["more"], np.ones((1, 16), np.float32), keys=np.array([7])))
        with contextlib.closing(open_trained(places.folder / "runs" / "a", SoloComm())) as opened:
            assert opened.store_version == (1 if knows_its_id else 2)
        resume(places)

    def test_put_back_from_a_backup_and_gone_another_way(self, places: Places, tmp_path: Path) -> None:
        folder, more = places.folder / "features", FeatureRows.of(["more"], np.ones((1, 16), np.float32), keys=[7])
        shutil.copytree(folder, tmp_path / "backup")
        FeatureStore.open(folder).put(more)
        resume(places, data__store_version=2)
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "backup", folder)
        FeatureStore.open(folder).put(more)
        with pytest.raises(AnotherStoreError, match=r"belongs to snapshot 2 .*This is snapshot 2"):
            resume(places, train__max_steps=4)


def test_days_have_one_store(tmp_path: Path) -> None:
    places = make_days(tmp_path)
    config = load_config(settings=places.settings(run__name="d", train__max_steps=2))
    follow(config, SoloComm(), first="2026-01-01", last="2026-01-02", continues=True)
    store = FeatureStore.open(tmp_path / "features")
    rows = json.loads((tmp_path / "runs" / "d" / "days.json").read_text())
    snapshot = SnapshotId.of(store.snapshot())
    assert [(row["store_id"], row["commit_id"]) for row in rows] == [(snapshot.store_id, snapshot.commit_id)] * 2
    kept = shutil.copytree(tmp_path / "features", tmp_path / "kept")
    made = rebuild(tmp_path / "features")
    with pytest.raises(AnotherStoreError, match=f"2026-01-02.* of store {made.info.store_id[:8]} at"):
        follow(config, SoloComm(), continues=True)
    assert not (tmp_path / "runs" / "d" / "2026-01-03").exists()
    shutil.rmtree(tmp_path / "features")
    shutil.copytree(kept, tmp_path / "features")
    store.put(FeatureRows.of(["more"], np.ones((1, 16), np.float32), keys=np.array([7])))
    follow(config, SoloComm(), continues=True)
    rows = json.loads((tmp_path / "runs" / "d" / "days.json").read_text())
    assert [row["store_version"] for row in rows] == [1, 1, 2, 2]
