"""python -m trainer.compat: what it tells of a store that is not, or is, the one that a run was trained on."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from featurestore.errors import AnotherStoreError, SpecMismatchError
from featurestore.format.rows import FeatureRows
from featurestore.spec import StoreInfo
from featurestore.store import FeatureStore
from featurestore.upkeep.promotion import compare
from trainer.comm import SoloComm
from trainer.compat.__main__ import app
from trainer.config.config import load_config
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
    digests: list[bytes] | None = None,
    **values: Any,
) -> Path:
    """Another store of the same network; `change` makes its features of the old ones."""
    old = FeatureStore.open(like)
    features_ND = change(old.snapshot().get(KEYS))
    if folder == like:
        shutil.rmtree(folder)
    new = FeatureStore.create(folder, StoreInfo(**{**dict(old.info.kind), **values}))
    new.put(FeatureRows.of(URIS, features_ND, keys=KEYS, content_digests=digests))
    return folder


def permuted(features_ND: np.ndarray) -> np.ndarray:
    return features_ND[np.random.default_rng(1).permutation(len(features_ND))]


def rounded(features_ND: np.ndarray) -> np.ndarray:
    """As another machine would have computed them."""
    return features_ND * (1 + np.random.default_rng(2).normal(size=features_ND.shape, scale=1e-6)).astype(np.float32)


def compat(places: Places, store: Path, *words: object, code: int = 0) -> tuple[str, dict[str, Any]]:
    """What it prints, and writes."""
    out = places.folder / "compat.json"
    out.unlink(missing_ok=True)
    run = places.folder / "runs" / "a"
    result = CliRunner().invoke(app, [str(word) for word in (run, store, "--json", out, *words)])
    assert result.exit_code == code, result.output
    return result.output, json.loads(out.read_text()) if out.exists() else {}


def test_the_very_snapshot(places: Places) -> None:
    said, found = compat(places, places.folder / "features")
    assert (found["relation"], found["verdict"]) == ("the same snapshot", "compatible")
    assert "nothing to compare" in said and "verdict      compatible\n" in said


def test_another_snapshot_of_the_store(lost: Places) -> None:
    store = FeatureStore.open(lost.folder / "features")
    store.put(FeatureRows.of(["more"], np.ones((1, 16), np.float32), keys=np.array([7])))
    store.delete([1_049])
    _, found = compat(lost, lost.folder / "features", code=1)
    assert (found["relation"], found["verdict"], found["found"]["version"]) == ("the same store", "not compatible", 3)
    rows = found["rows"]
    assert (rows["num_common"], rows["gained"], rows["lost"], rows["num_changed"]) == (49, 1, 1, 0)
    assert (found["scores"]["missing_before"], found["scores"]["missing_here"]) == (0, 1)
    assert "1 of 50 images of the test impressions have no feature here" in found["problems"][-1]
    said, found = compat(lost, lost.folder / "features", "--version", 2, "--accept")
    assert found["verdict"] == "compatible" and "nothing to accept" in said
    assert found["scores"]["change"] == found["scores"]["mean_logit_change"] == 0


class TestWithBothThere:
    def test_computed_anew(self, places: Places, tmp_path: Path) -> None:
        other = make_store(tmp_path / "other", places.folder / "features", rounded, num_shards=16)
        said, found = compat(places, other)
        assert (found["relation"], found["verdict"]) == ("another store", "compatible")
        rows = found["rows"]
        assert (rows["num_old"], rows["num_common"], rows["num_sampled"], rows["num_other"]) == (50, 50, 50, 0)
        assert rows["num_equal"] == 0 and 0 < rows["largest_difference"] < 1e-4 and rows["mean_cosine"] > 0.99999
        assert 0 < found["scores"]["mean_logit_change"] < 1e-3 and abs(found["scores"]["change"]) < 1e-4
        assert found["scores"]["impressions"] == 210
        assert "another store than the one that the run was trained on" in said
        assert all(len(line) < 200 and "…" not in line for line in said.splitlines())
        assert f"{found['scores']['here']:.5f}" in said and f"{rows['mean_cosine']:.6f}" in said

    def test_other_images_under_the_keys_and_no_scores(self, lost: Places, tmp_path: Path) -> None:
        """Imported vectors have digests of their own: nothing is left to compare, and the person decides."""
        other = make_store(tmp_path / "other", lost.folder / "features", permuted, digests=[b"1" * 16] * 50)
        shutil.rmtree(lost.folder / "samples" / "test")
        _, found = compat(lost, other, code=1)
        assert (found["verdict"], found["rows"]["num_changed"], found["rows"]["num_sampled"]) == ("unknown", 50, 0)

    def test_permuted(self, places: Places, tmp_path: Path) -> None:
        other = make_store(tmp_path / "other", places.folder / "features", permuted)
        said, found = compat(places, other, "--sample", 20, code=1)
        assert found["verdict"] == "not compatible" and found["rows"]["mean_cosine"] < 0.5
        assert "features that were compared are others for the same image" in said
        assert found["rows"]["num_sampled"] < 50 and found["scores"]["impressions"] < 210
        said, _ = compat(places, other, "--accept", code=1)
        assert "error: not accepted: " in said
        assert not (places.folder / "runs" / "a" / "accepted-stores.json").exists()

    def test_of_another_network(self, places: Places, tmp_path: Path) -> None:
        info = FeatureStore.open(places.folder / "features").info
        extractor = info.extractor.model_copy(update={"weights_digest": "1"})
        other = make_store(tmp_path / "other", places.folder / "features", extractor=extractor)
        said, found = compat(places, other, code=1)
        assert found["verdict"] == "not compatible" and found["rows"] is found["scores"] is None
        assert "extractor.weights_digest is '1' here, '0' in the checkpoint: its E makes nothing of these" in said
        assert "cannot be read" not in said and found["can_read_recorded"] is None


class TestWithTheOldOneGone:
    def test_computed_anew_and_accepted(self, lost: Places) -> None:
        features = make_store(lost.folder / "features", lost.folder / "features", rounded)
        again = load_config(settings=settings_of(lost, run__resume="latest", train__max_steps=151))
        with pytest.raises(AnotherStoreError, match=r"python -m trainer\.compat .*runs/a .*features$"):
            train(again, SoloComm())
        said, found = compat(lost, features)
        assert "(cannot be read any more)" in said and "log loss, as the run reported it" in said
        assert (found["relation"], found["verdict"], found["rows"]) == ("another store", "compatible", None)
        reported = json.loads((lost.folder / "runs" / "a" / "report.json").read_text())["metrics"]
        assert found["scores"]["before"] == reported["logloss"] == pytest.approx(found["scores"]["here"], abs=1e-4)
        said, _ = compat(lost, features, "--accept")
        assert f"accepted     kept in {lost.folder / 'runs' / 'a' / 'accepted-stores.json'}" in said
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
        assert found["relation"] == "the same snapshot" and "accepted     no other store any more" in said
        train(load_config(settings=settings), SoloComm())

    def test_permuted(self, lost: Places) -> None:
        features = make_store(lost.folder / "features", lost.folder / "features", permuted)
        said, found = compat(lost, features, code=1)
        assert found["verdict"] == "not compatible" and abs(found["scores"]["change"]) > 0.001
        assert "log loss of the test impressions changes by" in said and "--max-logloss-change allows 0.10%" in said

    def test_nothing_to_compare(self, lost: Places) -> None:
        """The person decides."""
        features = make_store(lost.folder / "features", lost.folder / "features")
        shutil.rmtree(lost.folder / "samples" / "test")
        (lost.folder / "samples" / "test").mkdir()
        said, found = compat(lost, features, code=1)
        assert found["verdict"] == "unknown" and "note         no scores to compare: " in said
        compat(lost, features, "--accept")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("nowhere",), 2, "no store at"),
        (("{features}", "--name", "titles"), 2, "--name titles: the content fields of"),
        (("{features}", "--version", 9), 2, "has no snapshot 9"),
        (("{features}", "--checkpoint", 9), 2, "no such checkpoint"),
    ],
)
def test_mistakes(places: Places, words: tuple[object, ...], code: int, text: str) -> None:
    given = [str(word).format(features=places.folder / "features") for word in words]
    result = CliRunner().invoke(app, [str(places.folder / "runs" / "a"), *given])
    assert (result.exit_code, result.stderr.count("\n")) == (code, 1), result.output
    assert text in result.stderr


def test_a_limit_that_is_no_number(places: Places) -> None:
    """Nothing is larger than nan: every store would pass."""
    words = [str(places.folder / "runs" / "a"), str(places.folder / "features"), "--max-logloss-change", "nan"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "--max-logloss-change" in result.output, result.output


def test_help_has_examples_and_loads_no_torch() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0 and "python -m trainer.compat data/runs/both data/features --accept" in result.output
    code = "import sys, trainer.compat.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_of_rows_alone(tmp_path: Path, places: Places) -> None:
    """Changed images are counted and not compared; stores of other shards and other kinds."""
    old = FeatureStore.open(places.folder / "features").snapshot()
    info = old.info.kind.model_copy(update={"num_shards": 1})
    new = FeatureStore.create(tmp_path / "new", info)
    digests = [bytes(16)] * 48 + [b"1" * 16, bytes(16)]
    features_ND = np.vstack([old.get(KEYS)[:49], np.ones((1, 16), np.float32)])
    new.put(FeatureRows.of(URIS, features_ND, keys=[*KEYS[:49], 5], content_digests=digests))
    seen: list[tuple[int, int]] = []
    found = compare(old, new.snapshot(), 1_000, progress=lambda done, total: seen.append((done, total)))
    assert (found.num_old, found.num_new, found.num_common, found.num_changed) == (50, 50, 49, 1)
    assert (found.num_gained, found.num_lost, found.num_sampled, found.num_equal, found.num_other) == (1, 1, 48, 48, 0)
    assert (found.mean_cosine, found.largest_difference, seen) == (pytest.approx(1), 0, [(1, 1)])
    other = FeatureStore.create(tmp_path / "other", StoreInfo(**{**dict(info), "dim": 4}))
    with pytest.raises(SpecMismatchError, match="different kinds"):
        compare(old, other.snapshot(), 10)
