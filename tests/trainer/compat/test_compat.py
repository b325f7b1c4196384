"""crossmedia compat: what it tells of other stores, and the gate of a model that would take another one's place."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from featurestore.errors import AnotherStoreError
from featurestore.format.datafile import FeatureRows
from featurestore.spec import StoreInfo
from featurestore.store import FeatureStore
from tests.cli import invoke
from tests.trainer.conftest import Places, add_a_row, make_places
from tests.trainer.whole_runs import report_of, run_alone
from trainer.cli import GateLimits
from trainer.compat import app
from trainer.errors import ConfigError
from trainer.evaluation.bootstrap import compare
from trainer.evaluation.predict import Predictions, predict_run
from trainer.gates import Check, gate_model
from trainer.runs.saved import RunSource, read_run
from trainer.schema.fields import DEFAULT_SCHEMA

pytestmark = pytest.mark.long  # they train whole runs

KEYS = np.arange(1_000, 1_050)
URIS = [f"item/{n}" for n in range(50)]
LONG: dict[str, Any] = {"run__name": "a", "model__compute_dtype": "float32", "data__missing": "error"}
LONG |= {"train__max_steps": 150, "train__epochs": 20, "optim__lr": 0.02, "optim__ids_lr": 0.006}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A run, `a`, that knows some of its images by heart, in a folder of which there is a copy beside it."""
    made = make_places(tmp_path_factory.mktemp("compat") / "places")
    run_alone(made, **LONG)
    shutil.copytree(made.folder, made.folder.with_name("copy"))
    return made


@pytest.fixture
def lost(places: Places) -> Iterator[Places]:
    """The same, whose store a test may lose: the next one gets it back, in the place that the run has recorded."""
    yield places
    shutil.rmtree(places.folder)
    shutil.copytree(places.folder.with_name("copy"), places.folder)


def make_store(folder: Path, like: Path, change: Callable[[np.ndarray], np.ndarray] = np.copy, **values: Any) -> Path:
    """Another store of the same network; `change` makes its features of the old ones."""
    old = FeatureStore.open(like)
    features_ND = change(old.snapshot().get(KEYS))
    if folder == like:
        shutil.rmtree(folder)
    new = FeatureStore.create(folder, StoreInfo(**{**dict(old.info.kind), **values}))
    new.put(FeatureRows.of(URIS, features_ND, keys=KEYS))
    return folder


def permuted(features_ND: np.ndarray) -> np.ndarray:
    return features_ND[np.random.default_rng(1).permutation(len(features_ND))]


def rounded(features_ND: np.ndarray) -> np.ndarray:
    """As another machine would have computed them."""
    return features_ND * (1 + np.random.default_rng(2).normal(size=features_ND.shape, scale=1e-6)).astype(np.float32)


def compat(places: Places, store: Path, *words: object, code: int = 0) -> tuple[str, dict[str, Any]]:
    """What it prints, and writes; the gates by their names."""
    out = places.folder / "compat.json"
    out.unlink(missing_ok=True)
    run = places.folder / "runs" / "a"
    result = invoke(app, run, store, "--json", out, *words, code=code)
    found = json.loads(out.read_text()) if out.exists() else {}
    return result.output, found | {"gates": {each["gate"]: each for each in found.get("gates", ())}}


def failing(found: dict[str, Any]) -> list[str]:
    return [name for name, each in found["gates"].items() if not each["holds"]]


def test_the_very_snapshot(places: Places) -> None:
    said, found = compat(places, places.folder / "features")
    assert (found["outcome"], found["gates"], found["recorded"]) == ("compatible", {}, found["found"])
    assert said.endswith("compatible\n")


def test_another_snapshot_of_the_store(lost: Places) -> None:
    store = FeatureStore.open(lost.folder / "features")
    add_a_row(store)
    store.delete([1_049])
    said, found = compat(lost, lost.folder / "features", code=1)
    assert (found["outcome"], found["found"]["version"]) == ("not compatible", 3)
    assert failing(found)[0] == "coverage" and found["gates"]["coverage"]["value"] == 0.98
    assert "49 of 50 images of the impressions have a feature, and the run has data.missing=error" in said
    said, found = compat(lost, lost.folder / "features", "--version", 2, "--accept")
    assert "nothing to accept" in said and failing(found) == []
    assert [each["value"] for each in found["differences"]] == [0, 0]
    assert found["mean_logit_change"] == 0


class TestWithBothThere:
    def test_computed_anew(self, places: Places, tmp_path: Path) -> None:
        other = make_store(tmp_path / "other", places.folder / "features", rounded, num_shards=16)
        said, found = compat(places, other)
        assert 0 < found["mean_logit_change"] < 1e-3 and found["num_impressions"] == 210
        assert list(found["gates"]) == ["coverage", "gauc", "logloss"]
        assert abs(found["gates"]["logloss"]["value"]) < 1e-4
        assert said.endswith("compatible\n")

    def test_permuted(self, places: Places, tmp_path: Path) -> None:
        other = make_store(tmp_path / "other", places.folder / "features", permuted)
        said, found = compat(places, other, code=1)
        assert found["outcome"] == "not compatible" and "logloss" in failing(found)
        said, _ = compat(places, other, "--accept", code=1)
        assert f"error: not accepted: gate {failing(found)[0]}: " in said
        assert not (places.folder / "runs" / "a" / "accepted-stores.json").exists()

    def test_of_another_network(self, places: Places, tmp_path: Path) -> None:
        info = FeatureStore.open(places.folder / "features").info
        extractor = info.extractor.model_copy(update={"weights_digest": "1"})
        other = make_store(tmp_path / "other", places.folder / "features", extractor=extractor)
        said, found = compat(places, other, code=1)
        assert failing(found) == ["network"] and found["differences"] == []
        assert "extractor.weights_digest is '1' here, '0' in the checkpoint: its E makes nothing of these" in said
        said, _ = compat(places, other, "--accept", "--force", "I know better", code=1)
        assert "error: not accepted: gate network: " in said


def test_of_many_impressions_some_are_drawn_the_same_for_both(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.gates.MOST_IMPRESSIONS", 100)
    other = make_store(tmp_path / "other", places.folder / "features")
    _, found = compat(places, other)
    assert 0 < found["num_impressions"] < 210 and found["mean_logit_change"] == 0


class TestWithTheOldOneGone:
    def test_computed_anew_and_accepted_until_the_old_one_is_found_again(self, lost: Places, tmp_path: Path) -> None:
        features, run = lost.folder / "features", lost.folder / "runs/a"
        again = LONG | {"run__resume": "latest", "train__max_steps": 151}
        shutil.copytree(features, tmp_path / "kept")
        _, found = compat(lost, make_store(features, features, rounded))
        assert found["outcome"] == "compatible"
        (difference,) = found["differences"]
        logloss = report_of(run)["metrics"]["logloss"]
        assert difference["baseline"] == logloss == pytest.approx(difference["ours"], abs=1e-4)
        assert f"accepted: kept in {run / 'accepted-stores.json'}" in compat(lost, features, "--accept")[0]
        shutil.rmtree(features)
        shutil.copytree(tmp_path / "kept", features)
        with pytest.raises(AnotherStoreError, match=r"crossmedia compat .*runs/a .*features$"):
            run_alone(lost, **again)
        said, found = compat(lost, features, "--accept")
        assert found["gates"] == {} and "accepted: no other store any more" in said
        run_alone(lost, **again)

    def test_permuted(self, lost: Places) -> None:
        features = make_store(lost.folder / "features", lost.folder / "features", permuted)
        _, found = compat(lost, features, code=1)
        assert failing(found) == ["logloss"] and found["gates"]["logloss"]["value"] > 0.002

    def test_nothing_to_compare(self, lost: Places) -> None:
        """The user decides, and says why."""
        features = make_store(lost.folder / "features", lost.folder / "features")
        shutil.rmtree(lost.folder / "samples" / "test")
        (lost.folder / "samples" / "test").mkdir()
        said, found = compat(lost, features, code=1)
        assert failing(found) == ["scores"] and "gate scores: not measured" in said
        compat(lost, features, "--accept", code=1)
        compat(lost, features, "--accept", "--force", "the same pictures")
        kept = (lost.folder / "runs" / "a" / "accepted-stores.json").read_text()
        assert json.loads(kept)[0]["figures"]["forced"] == "the same pictures"


def trained(places: Places, name: str, **changes: Any) -> Path:
    return run_alone(places, run__name=name, **{"train__max_steps": 30, "model__compute_dtype": "float32", **changes})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Places:
    made = make_places(tmp_path_factory.mktemp("models"))
    trained(made, "used")
    return made


def in_use(models: Places, name: str = "used") -> tuple[RunSource, str]:
    saved = read_run(models.folder / "runs" / name)
    return RunSource(saved.folder, saved.checkpoint.name), saved.digest


def why_not(run: Path, used: tuple[RunSource, str]) -> str:
    (only,) = gate_model(run, None, *used)
    assert not only.holds
    assert only.value is None
    return only.text


def test_one_as_good_passes_and_a_worse_one_fails(models: Places) -> None:
    other = gate_model(trained(models, "other", train__seed=1), None, *in_use(models))
    assert all(each.holds for each in other), other
    bad = trained(models, "bad", optim__lr=1, optim__ids_lr=1, model__activation="prelu")
    found = {each.gate: each for each in gate_model(bad, None, *in_use(models))}
    assert not found["logloss"].holds
    assert "on 210 impressions, whose logits move by" in found["logloss"].text
    # The other way round it is better, by as much.
    back = {each.gate: each for each in gate_model(in_use(models)[0].folder, None, *in_use(models, "bad"))}
    assert all(each.holds for each in back.values())
    assert back["logloss"].value == pytest.approx(-found["logloss"].value)
    assert back["gauc"].value == pytest.approx(-found["gauc"].value)
    (only,) = gate_model(in_use(models)[0].folder, None, *in_use(models))
    assert only.holds and only.value == 0, "the checkpoint in use needs no comparison"


def test_what_cannot_be_compared_does_not_pass(models: Places, tmp_path: Path) -> None:
    short = {"train__max_steps": 1}  # what these runs know is not looked at
    new = trained(models, "new", **short)
    used, digest = in_use(models)
    assert "no config.yaml" in why_not(new, (RunSource(tmp_path, used.checkpoint), digest))
    assert "has been trained again" in why_not(new, (used, "0" * 64))
    untested = trained(models, "untested", data__train_days="[2026-01-01]", data__test_days="[]", **short)
    assert "no evaluation rows" in why_not(untested, (used, digest))
    values = yaml.safe_load(DEFAULT_SCHEMA.read_text())
    values["fields"].append({"name": "ad_serial", "side": "ad", "kind": "id", "table": "category"})
    schema = tmp_path / "schema.yaml"
    schema.write_text(yaml.safe_dump(values))
    trained(models, "serial", data__schema_file=schema, **short)
    samples = tmp_path / "samples"
    shutil.copytree(models.folder / "samples", samples)
    for file in samples.glob("*/*.parquet"):
        pq.write_table(pq.read_table(file, partitioning=None).drop_columns("ad_serial"), file)
    without = trained(models, "without", data__samples=samples, **short)
    assert "ad_serial" in why_not(without, in_use(models, "serial"))


def test_runs_of_two_stores_are_compared_each_on_its_own(models: Places, tmp_path: Path) -> None:
    store = make_store(tmp_path / "features", models.folder / "features")
    new = trained(models, "elsewhere", data__store=store)
    equal = {each.gate: each.value for each in gate_model(new, None, *in_use(models))}
    assert equal == {"gauc": pytest.approx(0), "logloss": pytest.approx(0)}
    shutil.rmtree(store)
    assert "features" in why_not(in_use(models)[0].folder, in_use(models, "elsewhere"))


def test_the_difference_is_that_of_two_evaluations(lost: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are compared, which are continuous: a GAUC moves by a whole pair where two of them change places.

    Snapshot 1 is that of the training, snapshot 2 has another row, and snapshot 3 deals the features anew.
    """
    store = FeatureStore.open(lost.folder / "features")
    add_a_row(store)
    store.put(FeatureRows.of(URIS, permuted(store.snapshot().get(KEYS)), keys=KEYS))
    check = Check(read_run(lost.folder / "runs/a"), store.snapshot(3), GateLimits())
    scored: list[Predictions] = []

    def noted(ours: Predictions, baseline: Predictions, **options: Any) -> Any:
        scored.extend([ours, baseline])
        return compare(ours, baseline, **options)

    monkeypatch.setattr("trainer.gates.compare", noted)
    found = check.compare()
    whole = [predict_run(check.saved.folder, store=store.url, store_version=version) for version in (3, 1)]
    for mine, expected in zip(scored, whole, strict=True):
        np.testing.assert_allclose(mine.logit_N, expected.logit_N, atol=1e-5)
        assert (mine.impressions.label_N == expected.impressions.label_N).all()
        assert (mine.impressions.user_N == expected.impressions.user_N).all()
    assert found.differences[0] == compare(*scored, metrics=("gauc",))["gauc"]
    assert np.abs(scored[0].logit_N - scored[1].logit_N).max() > 1e-2
    moved = np.abs(scored[0].logit_N - scored[1].logit_N).mean()
    assert found.mean_logit_change == pytest.approx(moved)


def test_a_run_without_images_is_refused(lost: Places) -> None:
    run_alone(lost, run__name="none", train__max_steps=1, model__images="none")
    with pytest.raises(ConfigError, match=r"model\.images=none"):
        Check(read_run(lost.folder / "runs/none"), FeatureStore.open(lost.folder / "features").snapshot(), GateLimits())
