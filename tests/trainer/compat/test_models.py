"""The gate of models: a run that is as good, one that is worse, and ones that cannot be compared with that in use."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from featurestore.format.rows import FeatureRows
from featurestore.store import FeatureStore
from trainer.comm import SoloComm
from trainer.config import load_config
from trainer.evaluation.predict import predict_run
from trainer.gates import RunInUse, gate_model
from trainer.main import train
from trainer.runs.saved import read_run
from trainer.schema import DEFAULT_SCHEMA

pytestmark = pytest.mark.long  # they train whole runs

Places = Any


def trained(places: Places, name: str, **changes: Any) -> Path:
    settings = {"train__max_steps": 30, "model__compute_dtype": "float32", **changes}
    train(load_config(settings=places.settings(run__name=name, **settings)), SoloComm())
    return Path(places.folder / "runs" / name)


@pytest.fixture(scope="module")
def places(make_places: Callable[[Path], Places], tmp_path_factory: pytest.TempPathFactory) -> Places:
    places = make_places(tmp_path_factory.mktemp("models"))
    trained(places, "used")
    return places


def in_use(places: Places, name: str = "used") -> RunInUse:
    saved = read_run(places.folder / "runs" / name)
    return RunInUse(folder=saved.folder, checkpoint=saved.checkpoint.name, digest=saved.digest)


def why_not(run: Path, used: RunInUse) -> str:
    (only,) = gate_model(run, None, used)
    assert not only.holds
    assert only.value is None
    return only.text


def test_one_as_good_passes_and_a_worse_one_fails(places: Places) -> None:
    other = gate_model(trained(places, "other", train__seed=1), None, in_use(places))
    assert all(each.holds for each in other), other
    bad = trained(places, "bad", optim__lr=1, optim__ids_lr=1, model__activation="prelu")
    found = {each.gate: each for each in gate_model(bad, None, in_use(places))}
    assert not found["logloss"].holds
    rows = predict_run(bad)
    for name, run in (("bad", rows), ("used", predict_run(in_use(places).folder))):
        assert len(run.logit_N) == 210, name
    assert "on 210 impressions, whose logits move by" in found["logloss"].text
    # The other way round it is better, by as much.
    back = {each.gate: each for each in gate_model(in_use(places).folder, None, in_use(places, "bad"))}
    assert all(each.holds for each in back.values())
    assert back["logloss"].value == pytest.approx(-found["logloss"].value)
    assert back["gauc"].value == pytest.approx(-found["gauc"].value)


def test_the_checkpoint_in_use_passes_without_a_comparison(places: Places) -> None:
    (only,) = gate_model(in_use(places).folder, None, in_use(places))
    assert only.holds
    assert only.value == 0


def test_what_cannot_be_compared_does_not_pass(places: Places, tmp_path: Path) -> None:
    new = trained(places, "new", train__seed=2)
    used = in_use(places)
    assert "no config.yaml" in why_not(new, RunInUse(folder=tmp_path, checkpoint=used.checkpoint, digest=used.digest))
    again = RunInUse(folder=used.folder, checkpoint=used.checkpoint, digest="0" * 64)
    assert "has been trained again" in why_not(new, again)
    untested = trained(places, "untested", data__train_days="[2026-01-01]", data__test_days="[]")
    assert "no evaluation rows" in why_not(untested, used)
    values = yaml.safe_load(DEFAULT_SCHEMA.read_text())
    values["fields"].append({"name": "ad_serial", "side": "ad", "kind": "id", "table": "category"})
    schema = tmp_path / "schema.yaml"
    schema.write_text(yaml.safe_dump(values))
    trained(places, "serial", data__schema_file=schema)
    samples = tmp_path / "samples"
    shutil.copytree(places.folder / "samples", samples)
    import pyarrow.parquet as pq

    for file in samples.glob("*/*.parquet"):
        pq.write_table(pq.read_table(file, partitioning=None).drop_columns("ad_serial"), file)
    without = trained(places, "without", data__samples=samples)
    assert "ad_serial" in why_not(without, in_use(places, "serial"))


def test_runs_of_two_stores_are_compared_each_on_its_own(places: Places, tmp_path: Path) -> None:
    old = FeatureStore.open(places.folder / "features")
    store = FeatureStore.create(tmp_path / "features", old.info)
    snapshot = old.snapshot()
    keys = snapshot.keys()
    store.put(FeatureRows.of([f"item/{n}" for n in range(len(keys))], snapshot.get(keys), keys=keys))
    new = trained(places, "elsewhere", data__store=tmp_path / "features")
    equal = {each.gate: each.value for each in gate_model(new, None, in_use(places))}
    assert equal == {"gauc": pytest.approx(0), "logloss": pytest.approx(0)}
    shutil.rmtree(tmp_path / "features")
    assert "features" in why_not(in_use(places).folder, in_use(places, "elsewhere"))
