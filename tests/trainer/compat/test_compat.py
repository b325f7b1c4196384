"""crossmedia compat: what it tells of other stores, and the gate of a model that would take another one's place."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurestore.errors import AnotherStoreError
from featurestore.format.datafile import FeatureRows
from featurestore.problems import Problem as StoreProblem
from featurestore.store import FeatureStore
from tests.cli import invoke
from tests.raised import raises, told
from tests.trainer.conftest import Places, add_a_row, make_places, permuted, remade
from tests.trainer.runs.resumed.legs import write_schema_with_serials
from tests.trainer.samples.reading import rewrite
from tests.trainer.whole_runs import report_of, run_alone
from trainer.cli import GateLimits
from trainer.compat import app
from trainer.errors import ConfigError
from trainer.evaluation.bootstrap import compare
from trainer.evaluation.predict import Predictions, predict_run
from trainer.gates import Check, gate_model
from trainer.problems import Problem
from trainer.runs.saved import RunSource, read_run

pytestmark = pytest.mark.long  # they train whole runs

RUN: dict[str, Any] = {"model__compute_dtype": "float32", "data__missing": "error"}
RUN |= {"train__max_steps": 150, "train__epochs": 20, "optim__lr": 0.02, "optim__ids_lr": 0.006}


def rounded(features_ND: np.ndarray) -> np.ndarray:
    """As another machine would have computed them."""
    return features_ND * (1 + np.random.default_rng(2).normal(size=features_ND.shape, scale=1e-6)).astype(np.float32)


def compat(places: Places, *words: object, other: FeatureStore | None = None, code: int = 0) -> tuple[str, Any]:
    """What it prints of the store there, or another one, and writes; the gates by their names."""
    out, store = places.folder / "compat.json", other.url if other else places.folder / "features"
    out.unlink(missing_ok=True)
    result = invoke(app, places.folder / "runs/a", store, "--json", out, *words, code=code)
    found = json.loads(out.read_text()) if out.exists() else {}
    assert found.get("holds", True) == all(each["holds"] for each in found.get("gates", ()))
    return result.output, found | {"gates": {each["gate"]: each for each in found.get("gates", ())}}


def failing(found: dict[str, Any]) -> list[str]:
    return [name for name, each in found["gates"].items() if not each["holds"]]


def test_the_very_snapshot(lasting: Places) -> None:
    said, found = compat(lasting)
    assert (found["outcome"], found["gates"], found["recorded"]) == ("compatible", {}, found["found"])
    assert said.endswith("compatible\n")


def test_another_snapshot_of_the_store(own: Places) -> None:
    store = FeatureStore.open(own.folder / "features")
    add_a_row(store)
    store.delete([1_049])
    said, found = compat(own, code=1)
    assert (found["outcome"], found["found"]["version"]) == ("not compatible", 3)
    assert failing(found)[0] == "coverage" and found["gates"]["coverage"]["value"] == 0.98
    assert "49 of 50 images of the impressions have a feature, and the run has data.missing=error" in said
    said, found = compat(own, "--version", 2, "--accept")
    assert "nothing to accept" in said and failing(found) == []
    assert [each["value"] for each in found["differences"]] == [0, 0]
    assert found["mean_logit_change"] == 0


class TestWithBothThere:
    def test_computed_anew(self, lasting: Places, tmp_path: Path) -> None:
        other = remade(tmp_path / "other", rounded, lasting.folder / "features", num_shards=16)
        said, found = compat(lasting, other=other)
        assert 0 < found["mean_logit_change"] < 1e-3 and found["num_impressions"] == 210
        assert list(found["gates"]) == ["coverage", "gauc", "logloss"]
        assert abs(found["gates"]["logloss"]["value"]) < 1e-4
        assert said.endswith("compatible\n")

    def test_permuted(self, lasting: Places, tmp_path: Path) -> None:
        other = remade(tmp_path / "other", permuted, lasting.folder / "features")
        said, found = compat(lasting, other=other, code=1)
        assert found["outcome"] == "not compatible" and "logloss" in failing(found)
        said, _ = compat(lasting, "--accept", other=other, code=1)
        assert f"error: not accepted: gate {failing(found)[0]}: " in said
        assert not (lasting.folder / "runs" / "a" / "accepted-stores.json").exists()

    def test_of_another_network(self, lasting: Places, tmp_path: Path) -> None:
        info = FeatureStore.open(lasting.folder / "features").info
        extractor = info.extractor.model_copy(update={"weights_digest": "1"})
        other = remade(tmp_path / "other", like=lasting.folder / "features", extractor=extractor)
        said, found = compat(lasting, other=other, code=1)
        assert failing(found) == ["network"] and found["differences"] == []
        assert "extractor.weights_digest is '1' here, '0' in the checkpoint: its E makes nothing of these" in said
        said, _ = compat(lasting, "--accept", "--force", "I know better", other=other, code=1)
        assert "error: not accepted: gate network: " in said


def test_many_impressions_are_drawn_alike(lasting: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.gates.MOST_IMPRESSIONS", 100)
    other = remade(tmp_path / "other", like=lasting.folder / "features")
    _, found = compat(lasting, other=other)
    assert 0 < found["num_impressions"] < 210 and found["mean_logit_change"] == 0


class TestWithTheOldOneGone:
    def test_computed_anew_and_accepted_until_the_old_one_is_found_again(self, own: Places, tmp_path: Path) -> None:
        features, run = own.folder / "features", own.folder / "runs/a"
        again = RUN | {"run__name": "a", "run__resume": "latest", "train__max_steps": 151}
        shutil.copytree(features, tmp_path / "kept")
        remade(features, rounded)
        _, found = compat(own)
        assert found["outcome"] == "compatible"
        (difference,) = found["differences"]
        logloss = report_of(run)["metrics"]["logloss"]
        assert difference["baseline"] == logloss == pytest.approx(difference["ours"], abs=1e-4)
        assert f"accepted: kept in {run / 'accepted-stores.json'}" in compat(own, "--accept")[0]
        shutil.rmtree(features)
        shutil.copytree(tmp_path / "kept", features)
        way_out = re.compile(f"crossmedia compat {run} {features}$")
        with raises(AnotherStoreError, StoreProblem.ANOTHER_STORE, hint=way_out):
            run_alone(own, **again)
        said, found = compat(own, "--accept")
        assert found["gates"] == {} and "accepted: no other store any more" in said
        run_alone(own, **again)

    def test_permuted(self, own: Places) -> None:
        remade(own.folder / "features", permuted)
        _, found = compat(own, code=1)
        assert failing(found) == ["logloss"] and found["gates"]["logloss"]["value"] > 0.002

    def test_nothing_to_compare(self, own: Places) -> None:
        """The user decides, and says why."""
        remade(own.folder / "features")
        shutil.rmtree(own.folder / "samples" / "test")
        (own.folder / "samples" / "test").mkdir()
        said, found = compat(own, code=1)
        assert failing(found) == ["scores"] and "gate scores: not measured" in said
        compat(own, "--accept", code=1)
        compat(own, "--accept", "--force", "the same pictures")
        kept = (own.folder / "runs" / "a" / "accepted-stores.json").read_text()
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


def gates(run: Path, used: tuple[RunSource, str]) -> dict[str, Any]:
    return {each.gate: each for each in gate_model(run, None, *used)}


def why_not(run: Path, used: tuple[RunSource, str]) -> str:
    (only,) = gates(run, used).values()
    assert not only.holds and only.value is None
    return str(only.text)


def test_one_as_good_passes_and_a_worse_one_fails(models: Places) -> None:
    other = gates(trained(models, "other", train__seed=1), in_use(models))
    assert all(each.holds for each in other.values()), other
    bad = trained(models, "bad", optim__lr=1, optim__ids_lr=1, model__activation="prelu")
    found = gates(bad, in_use(models))
    assert not found["logloss"].holds
    assert "on 210 impressions, whose logits move by" in found["logloss"].text
    # The other way round it is better, by as much.
    used = in_use(models)[0].folder
    back = gates(used, in_use(models, "bad"))
    assert all(each.holds for each in back.values())
    assert back["logloss"].value == pytest.approx(-found["logloss"].value)
    assert back["gauc"].value == pytest.approx(-found["gauc"].value)
    (only,) = gates(used, in_use(models)).values()
    assert only.holds and only.value == 0, "the checkpoint in use needs no comparison"


def test_what_cannot_be_compared_does_not_pass(models: Places, tmp_path: Path) -> None:
    short = {"train__max_steps": 1}  # what these runs know is not looked at
    new = trained(models, "new", **short)
    used, digest = in_use(models)
    assert re.search(told(Problem.NOT_A_RUN), why_not(new, (RunSource(tmp_path, used.checkpoint), digest)))
    assert re.search(told(Problem.TRAINED_SINCE_PUBLISHED), why_not(new, (used, "0" * 64)))
    untested = trained(models, "untested", data__train_days="[2026-01-01]", data__test_days="[]", **short)
    assert re.search(told(Problem.RUN_NOT_EVALUATED), why_not(untested, (used, digest)))
    schema = write_schema_with_serials(tmp_path)
    trained(models, "serial", data__schema_file=schema, model__tables__serial=64, **short)
    samples = shutil.copytree(models.folder / "samples", tmp_path / "samples")
    rewrite(samples, lambda table: table.drop_columns("ad_serial"))
    without = trained(models, "without", data__samples=samples, **short)
    assert "ad_serial" in why_not(without, in_use(models, "serial"))


def test_runs_of_two_stores_are_compared_each_on_its_own(models: Places, tmp_path: Path) -> None:
    store = remade(tmp_path / "features", like=models.folder / "features").url
    new = trained(models, "elsewhere", data__store=store)
    equal = {name: each.value for name, each in gates(new, in_use(models)).items()}
    assert equal == {"gauc": pytest.approx(0), "logloss": pytest.approx(0)}
    shutil.rmtree(store)
    assert "features" in why_not(in_use(models)[0].folder, in_use(models, "elsewhere"))


def test_the_difference_is_that_of_two_evaluations(own: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are compared, which are continuous: a GAUC moves by a whole pair where two of them change places.

    Snapshot 1 is that of the training, snapshot 2 has another row, and snapshot 3 deals the features anew.
    """
    store = FeatureStore.open(own.folder / "features")
    add_a_row(store)
    keys, uris = 1_000 + np.arange(50), [f"item/{n}" for n in range(50)]
    store.put(FeatureRows.of(uris, permuted(store.snapshot().get(keys)), keys=keys))
    check = Check(read_run(own.folder / "runs/a"), store.snapshot(3), GateLimits())
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


def test_a_run_without_images_is_refused(own: Places) -> None:
    run_alone(own, run__name="none", train__max_steps=1, model__images="none")
    with raises(ConfigError, Problem.RUN_WITHOUT_STORE, where=own.folder / "runs/none"):
        Check(read_run(own.folder / "runs/none"), FeatureStore.open(own.folder / "features").snapshot(), GateLimits())
