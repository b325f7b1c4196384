"""Runs on a channel of a store: which snapshot they train on, keep, go on with and are evaluated on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from featurestore.errors import ChannelError
from featurestore.snapshot import SnapshotId
from featurestore.store import FeatureStore
from featurestore.upkeep.history import move_channel
from jobs.export_embeddings import app as export_app
from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.errors import ConfigError
from trainer.evaluate import app as evaluate_app
from trainer.main import train
from trainer.runs import checkpoint
from trainer.runs.folder import find_checkpoint

pytestmark = pytest.mark.long  # they train whole runs

Places = Any


@pytest.fixture
def places(make_places: Callable[[Path], Places], tmp_path: Path) -> Places:
    """A store whose second snapshot has other features than its first, which is stable."""
    places = make_places(tmp_path)
    store = FeatureStore.open(tmp_path / "features")
    move_channel(store, "stable", store.snapshot().version)
    rows = [store.snapshot().read_shard(shard) for shard in range(store.info.num_shards)]
    store.delete([int(key) for each in rows for key in each.keys_N[:1]])
    return places


def trained(places: Places, **changes: Any) -> None:
    small = {"run__name": "a", "train__max_steps": 2, "data__store_version": "stable", "data__missing": "zeros"}
    train(load_config(settings=places.settings(**{**small, **changes})), SoloComm())


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


@pytest.mark.usefixtures("undrawn")
def test_commands_take_channels(places: Places, tmp_path: Path) -> None:
    trained(places)
    store, run = FeatureStore.open(tmp_path / "features"), tmp_path / "runs/a"

    def called(app: Any, *words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.output

    evaluated = ("--store", store.url, "--bootstrap", 0, "--out", tmp_path / "report")
    assert "is at snapshot" in called(evaluate_app, run, *evaluated)
    assert "is at snapshot" not in called(evaluate_app, run, *evaluated, "--store-version", "stable")
    said = called(export_app, "--run", run, "--store-version", "stable", "--out", tmp_path / "visual.parquet")
    assert f"features     snapshot {store.snapshot('stable').version} of" in said
    lost = CliRunner().invoke(evaluate_app, [str(run), "--store-version", "stable"])
    assert lost.exit_code == 2 and "--store-version: it needs --store" in " ".join(lost.output.split())


def test_what_is_no_channel_is_refused_by_name(places: Places) -> None:
    with pytest.raises(ChannelError, match="no channel 'stabel'; it has stable"):
        trained(places, data__store_version="stabel")
    with pytest.raises(ConfigError, match=r"data\.store_version.*not the name of a channel"):
        trained(places, data__store_version="../x")
