"""crossmedia evaluate on tiny runs: what it writes, other samples and stores, two ranks."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featurestore.store import FeatureStore
from tests.cli import invoke
from tests.raised import told
from tests.ranks import StandingRanks
from tests.trainer.conftest import Places, make_places, nothing_drawn, values_of, write_samples
from tests.trainer.whole_runs import alike, report_of, run_alone
from trainer.evaluate import app
from trainer.evaluation import bootstrap
from trainer.evaluation.bootstrap import METRICS
from trainer.problems import Problem
from trainer.runs.folder import find_checkpoint
from trainer.samples.survey import write_part

pytestmark = pytest.mark.long  # they train whole runs


def evaluate(run: Path, *options: Any, code: int = 0) -> str:
    """What the command says; on stdout where it ends well, else on stderr."""
    result = invoke(app, run, *options, code=code)
    return result.stdout if code == 0 else result.stderr


@pytest.fixture(scope="module", autouse=True)
def few_users_count() -> Iterator[None]:
    """Measure slices of this file's few users too."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bootstrap, "LEAST_USERS_SHOWN", 1)
        yield


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Places of this file alone, with two images that have no feature."""
    places = make_places(tmp_path_factory.mktemp("evaluation"))
    FeatureStore.open(places.folder / "features").delete([1_001, 1_045])
    return places


@pytest.fixture(scope="module")
def run(own: Places) -> Path:
    exact = {"model__compute_dtype": "float32"}  # its numbers are compared between ranks and batches
    settings = {"data__missing": "zeros", "train__checkpoint_every": 10, "data__global_batch_size": 64}
    return run_alone(own, run__name="both", **settings, **exact)


@pytest.fixture(scope="module")
def ids_only(own: Places) -> Path:
    return run_alone(own, run__name="ids-only", model__images="none", train__max_steps=5)


def test_the_whole_is_what_training_reported_and_slices_hold_every_impression_once(run: Path, tmp_path: Path) -> None:
    """Every metric has an interval around it, the plot is a picture of something, and again all is the same."""
    with nothing_drawn():
        said = evaluate(run, "--bootstrap", 200, "--out", tmp_path)
    assert re.search(r"┃ +impressions ┃.* GAUC", said.partition("Slices")[2])
    report, trained = report_of(tmp_path), report_of(run)["metrics"]
    whole, metrics = report["whole"], report["whole"]["metrics"]
    assert (whole["impressions"], whole["clicks"]) == (trained["impressions"], trained["clicks"])
    for name in ("logloss", "auc", "gauc"):
        assert metrics[name]["value"] == alike(name, trained[name], within=1e-6)
    new = report["sliced_by"]["ad_impressions"]["slices"]["0"]
    assert new["impressions"] == trained["new_ad_impressions"]
    assert new["metrics"]["auc"]["value"] == alike("auc", trained["new_ad_auc"])
    assert (report["checkpoint"], report["missing"], report["notes"]) == ("step-00000024", "zeros", [])
    assert report["stores"]["images"]["version"] == 2
    assert list(metrics) == list(METRICS)
    assert all(metrics[name]["low"] < metrics[name]["value"] < metrics[name]["high"] for name in METRICS)
    assert set(report["sliced_by"]) == {"ad_impressions", "history", "image"}
    for sliced in report["sliced_by"].values():
        for count in ("impressions", "clicks"):
            assert sum(each[count] for each in sliced["slices"].values()) == whole[count]
        assert len(sliced["slices"]) > 1
    assert set(report["sliced_by"]["image"]["slices"]) == {"known", "new", "missing"}
    assert sum(each["impressions"] for each in report["reliability"]) == whole["impressions"]
    assert f"written to {run / 'evaluation'}" in evaluate(run, "--bootstrap", 200)
    assert report_of(run / "evaluation") == report
    (path,) = (run / "evaluation").glob("*.png")
    assert path.name == "reliability.png" and (np.asarray(Image.open(path).convert("L")) < 128).sum() > 500


@pytest.mark.usefixtures("undrawn")
def test_slices_by_a_column_are_named_as_the_logs_name_its_values(
    own: Places, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "LEAST_USERS_SHOWN", 30)
    categories, users = ({*values_of(own.folder / "samples/test", name)} for name in ("ad_category", "user"))
    named = {int(number): f"shelf {number}" for number in sorted(categories)[1:]}
    write_part(run / "ids.parquet", named)
    evaluate(run, "--bootstrap", 0, "--by", "category", "--by", "user", "--out", tmp_path)
    (run / "ids.parquet").unlink()
    by = report_of(tmp_path)["sliced_by"]
    found = by["by category"]["slices"]
    assert set(found) == {*named.values(), str(min(categories))}
    shown = [each["impressions"] for each in found.values()]
    assert shown == sorted(shown, reverse=True)
    assert len(users) > 21 and f"{len(users) - 20} others" in by["by user"]["slices"]
    first = next(iter(by["by user"]["slices"].values()))
    assert first["users"] == 1 and all(each["value"] is None for each in first["metrics"].values())
    for name in ("behavior_item", "nothing"):
        said = evaluate(run, "--by", name, code=2)
        assert re.search(told(Problem.BY_UNKNOWN_FIELD, value=name, known=re.compile("user, .*")), said)


@pytest.mark.usefixtures("undrawn")
def test_without_intervals_another_checkpoint_and_ids_only(run: Path, ids_only: Path, tmp_path: Path) -> None:
    evaluate(run, "--bootstrap", 0, "--checkpoint", 10, "--out", tmp_path)
    report = report_of(tmp_path)
    assert report["checkpoint"] == "step-00000010"
    assert all(each["low"] is None for each in report["whole"]["metrics"].values())
    path = find_checkpoint(run, "10")
    evaluate(run, "--bootstrap", 0, "--checkpoint", path, "--out", tmp_path / "again")
    assert report_of(tmp_path / "again")["whole"] == report["whole"]
    evaluate(ids_only, "--bootstrap", 0)
    report = report_of(ids_only / "evaluation")
    assert report["stores"] == {}
    assert set(report["sliced_by"]["image"]["slices"]) == {"known", "new"}


@pytest.mark.usefixtures("undrawn")
def test_places_that_change_after_the_training(tmp_path: Path) -> None:
    places, day = make_places(tmp_path / "places"), tmp_path / "day"
    run, samples = run_alone(places, run__name="a", train__max_steps=3), places.folder / "samples"
    trained = report_of(run)["metrics"]["auc"]
    moved = shutil.copytree(samples, tmp_path / "moved")

    def evaluated(out: str, *options: Any) -> dict[str, Any]:
        evaluate(run, "--bootstrap", 0, "--out", tmp_path / out, *options)
        return report_of(tmp_path / out)

    shutil.rmtree(samples / "test")  # other samples replace them, and nothing else
    write_samples(day / "test", [30], seed=70, items=50)
    first = evaluated("a", "--samples", day)
    write_samples(day / "train", [30], seed=3, items=50)
    assert evaluated("b", "--samples", day) == first and first["notes"] == []
    next((samples / "train").iterdir()).unlink()
    assert "not, or no longer, those of the checkpoint" in evaluated("c", "--samples", day)["notes"][0]
    shutil.rmtree(samples)
    said = evaluate(run, code=2)
    missing = told(Problem.NO_SAMPLES_AT_SETTING, where=samples, value="train and no test")
    assert re.search(missing, said) and "name others by --samples and --store" in said
    report = evaluated("d", "--samples", moved)
    assert report["notes"] == [] and report["whole"]["metrics"]["auc"]["value"] == alike("auc", trained)
    shutil.rmtree(places.folder / "features")
    assert re.search(told(Problem.NO_STORE_AT_SETTING), evaluate(run, "--samples", moved, code=2))
    assert "--store" in evaluate(run, "--samples", moved, "--store", tmp_path / "nothing", code=2)
    assert not (run / "evaluation").exists()


def test_differences_are_printed_and_written(run: Path, ids_only: Path, tmp_path: Path) -> None:
    said = evaluate(run, "--against", ids_only, "--bootstrap", 100, "--out", tmp_path)
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert (written["run"], written["against"]) == (str(run), str(ids_only))
    auc, gauc = (written["differences"][name] for name in ("auc", "gauc"))
    assert auc["ours"] == alike("auc", report_of(run)["metrics"]["auc"])
    assert gauc["baseline"] == alike("gauc", report_of(ids_only)["metrics"]["gauc"])
    for each in (auc, gauc):
        assert f"{each['value']:.4f}" in said and f"{each['low']:.4f} to {each['high']:.4f}" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.json"]


@pytest.mark.usefixtures("undrawn")
def test_two_ranks_equal_one(
    run: Path, tmp_path: Path, two_ranks_of_each: StandingRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "LEAST_USERS_SHOWN", 30)  # as in the ranks
    options = (str(run), "--bootstrap", "50", "--out")
    assert " impressions, 1 rank\n" in invoke(app, *options, tmp_path / "one", code=0).stdout
    text = two_ranks_of_each.run("-m", "trainer.evaluate", *options, tmp_path / "two")
    assert " impressions, 2 ranks\n" in text
    flat_one, flat_two = (_flat(report_of(tmp_path / name)) for name in ("one", "two"))
    assert flat_two.keys() == flat_one.keys()
    # Unique keys are counted where they are asked for: rank by rank.
    flat_one.pop(".missing_lookups"), flat_two.pop(".missing_lookups")
    for name, value in flat_one.items():
        metric = next((part for part in name.split(".") if part in ("auc", "gauc")), name)
        assert flat_two[name] == alike(metric, value, within=1e-5), name


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    """Numbers and texts of a report, each by its path."""
    if not isinstance(values, dict | list):
        return {name: values}
    parts = values.items() if isinstance(values, dict) else enumerate(values)
    return {path: each for key, value in parts for path, each in _flat(value, f"{name}.{key}").items()}
