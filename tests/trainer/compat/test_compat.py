"""crossmedia compat: what it tells of a store that is not, or is, the one that a run was trained on."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from featurestore.errors import AnotherStoreError
from featurestore.format.rows import FeatureRows
from featurestore.spec import StoreInfo
from featurestore.store import FeatureStore
from trainer.comm import SoloComm
from trainer.compat import app
from trainer.config import load_config
from trainer.main import train

pytestmark = pytest.mark.long  # they train whole runs

KEYS = np.arange(1_000, 1_050)
URIS = [f"item/{n}" for n in range(50)]
Places = Any


@pytest.fixture(scope="module")
def places(make_places: Callable[[Path], Places], tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A run, `a`, that knows some of its images by heart, in a folder of which there is a copy beside it."""
    made = make_places(tmp_path_factory.mktemp("compat") / "places")
    train(load_config(settings=settings_of(made)), SoloComm())
    shutil.copytree(made.folder, made.folder.with_name("copy"))
    return made


@pytest.fixture
def lost(places: Places) -> Iterator[Places]:
    """The same, whose store a test may lose: the next one gets it back, in the place that the run has recorded."""
    yield places
    shutil.rmtree(places.folder)
    shutil.copytree(places.folder.with_name("copy"), places.folder)


def settings_of(places: Places, **changes: Any) -> list[str]:
    long = {
        "run__name": "a",
        "model__compute_dtype": "float32",
        "data__missing": "error",
        "train__max_steps": 150,
        "train__epochs": 20,
        "optim__lr": 0.02,
    }
    return list(places.settings(**{**long, **changes}))


def make_store(
    folder: Path,
    like: Path,
    change: Callable[[np.ndarray], np.ndarray] = np.copy,
    **values: Any,
) -> Path:
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
    result = CliRunner().invoke(app, [str(word) for word in (run, store, "--json", out, *words)])
    assert result.exit_code == code, result.output
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
    store.put(FeatureRows.of(["more"], np.ones((1, 16), np.float32), keys=np.array([7])))
    store.delete([1_049])
    said, found = compat(lost, lost.folder / "features", code=1)
    assert (found["outcome"], found["found"]["version"]) == ("not compatible", 3)
    assert failing(found)[0] == "coverage" and found["gates"]["coverage"]["value"] == 0.98
    assert "49 of 50 images of the impressions have a feature, and the run has data.missing=error" in said
    said, found = compat(lost, lost.folder / "features", "--version", 2, "--accept")
    assert "nothing to accept" in said and failing(found) == []
    assert [each["value"] for each in found["scores"]["differences"]] == [0, 0]
    assert found["scores"]["mean_logit_change"] == 0


class TestWithBothThere:
    def test_computed_anew(self, places: Places, tmp_path: Path) -> None:
        other = make_store(tmp_path / "other", places.folder / "features", rounded, num_shards=16)
        said, found = compat(places, other)
        scores = found["scores"]
        assert 0 < scores["mean_logit_change"] < 1e-3 and scores["num_impressions"] == 210
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
        assert failing(found) == ["network"] and found["scores"] is None
        assert "extractor.weights_digest is '1' here, '0' in the checkpoint: its E makes nothing of these" in said
        said, _ = compat(places, other, "--accept", "--force", "I know better", code=1)
        assert "error: not accepted: gate network: " in said


def test_of_many_impressions_some_are_drawn_the_same_for_both(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.gates.MOST_IMPRESSIONS", 100)
    other = make_store(tmp_path / "other", places.folder / "features")
    _, found = compat(places, other)
    assert 0 < found["scores"]["num_impressions"] < 210 and found["scores"]["mean_logit_change"] == 0


class TestWithTheOldOneGone:
    def test_computed_anew_and_accepted(self, lost: Places) -> None:
        features = make_store(lost.folder / "features", lost.folder / "features", rounded)
        again = load_config(settings=settings_of(lost, run__resume="latest", train__max_steps=151))
        with pytest.raises(AnotherStoreError, match=r"crossmedia compat .*runs/a .*features$"):
            train(again, SoloComm())
        said, found = compat(lost, features)
        assert found["outcome"] == "compatible"
        reported = json.loads((lost.folder / "runs" / "a" / "report.json").read_text())["metrics"]
        (difference,) = found["scores"]["differences"]
        assert difference["baseline"] == reported["logloss"] == pytest.approx(difference["ours"], abs=1e-4)
        said, _ = compat(lost, features, "--accept")
        assert f"accepted: kept in {lost.folder / 'runs' / 'a' / 'accepted-stores.json'}" in said
        train(again, SoloComm())

    def test_the_old_one_is_found_again(self, lost: Places, tmp_path: Path) -> None:
        features, settings = lost.folder / "features", settings_of(lost, run__resume="latest", train__max_steps=151)
        shutil.copytree(features, tmp_path / "kept")
        compat(lost, make_store(features, features, rounded), "--accept")
        shutil.rmtree(features)
        shutil.copytree(tmp_path / "kept", features)
        with pytest.raises(AnotherStoreError):
            train(load_config(settings=settings), SoloComm())
        said, found = compat(lost, features, "--accept")
        assert found["gates"] == {} and "accepted: no other store any more" in said
        train(load_config(settings=settings), SoloComm())

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
        assert json.loads(kept)["accepted"][0]["figures"]["forced"] == "the same pictures"
