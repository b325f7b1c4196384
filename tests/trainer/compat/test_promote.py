"""--promote: a real small run, a snapshot that is as good, one whose features are dealt anew, and the channel."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from featurestore.errors import AnotherStoreError, CommitConflictError
from featurestore.format.rows import FeatureRows
from featurestore.published.versions import find_channel, last_move
from featurestore.store import FeatureStore
from featurestore.upkeep.history import move_channel
from trainer.cli import GateLimits
from trainer.comm import SoloComm
from trainer.compat import app
from trainer.config import load_config
from trainer.errors import ConfigError
from trainer.evaluation.bootstrap import compare
from trainer.evaluation.predict import Predictions, predict_run
from trainer.gates import Check
from trainer.main import train

pytestmark = pytest.mark.long  # they train a whole run

Places = Any


@pytest.fixture(scope="module")
def places(make_places: Callable[[Path], Places], tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A run that has learnt from images alone; snapshot 2 adds rows, snapshot 3 deals the features anew."""
    places = make_places(tmp_path_factory.mktemp("canary"))
    settings = {
        "run__name": "a",
        "train__max_steps": 150,
        "train__epochs": 20,
        "optim__lr": 0.02,
        "model__compute_dtype": "float32",
    }
    train(load_config(settings=places.settings(**settings)), SoloComm())
    train(load_config(settings=places.settings(run__name="none", train__max_steps=1, model__images="none")), SoloComm())
    store = FeatureStore.open(places.folder / "features")
    first = store.snapshot()
    features_ND = first.get(first.keys())
    store.put(FeatureRows.of(["more/1", "more/2"], features_ND[:2]))
    uris = {key: uri for shard in range(store.info.num_shards) for key, uri in _names(store, shard)}
    keys = first.keys()
    dealt = np.random.default_rng(0).permutation(len(keys))
    store.put(FeatureRows.of([uris[int(key)] for key in keys], features_ND[dealt], keys=keys))
    return places


def _names(store: FeatureStore, shard: int) -> list[tuple[int, str]]:
    rows = store.snapshot().read_shard(shard)
    return list(zip(rows.keys_N.tolist(), rows.uris, strict=True))


@pytest.fixture
def store(places: Places) -> FeatureStore:
    """Stable at the snapshot of the training."""
    store = FeatureStore.open(places.folder / "features")
    report = json.loads((places.folder / "runs/a/report.json").read_text())
    move_channel(store, "stable", report["store_version"])
    return store


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def check(places: Places, store: FeatureStore) -> Check:
    return Check(places.folder / "runs/a", store.url, GateLimits())


def test_the_difference_is_that_of_two_evaluations(
    places: Places, store: FeatureStore, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are compared, which are continuous: a GAUC moves by a whole pair where two of them change places."""
    scored: list[Predictions] = []

    def noted(ours: list[Predictions], baseline: list[Predictions], **options: Any) -> Any:
        scored.extend([*ours, *baseline])
        return compare(ours, baseline, **options)

    monkeypatch.setattr("trainer.gates.compare", noted)
    newest = store.snapshot("stable").version + 2
    found, _ = check.promote(newest, "stable", None)
    whole = [predict_run(check.saved.folder, store=store.url, store_version=version) for version in (newest, "stable")]
    for mine, expected in zip(scored, whole, strict=True):
        np.testing.assert_allclose(mine.logit_N, expected.logit_N, atol=1e-5)
        assert (mine.impressions.label_N == expected.impressions.label_N).all()
        assert (mine.impressions.user_N == expected.impressions.user_N).all()
    assert found.scores is not None
    assert found.scores.differences[0] == compare(scored[:1], scored[1:], metrics=("gauc",))["gauc"]
    assert np.abs(scored[0].logit_N - scored[1].logit_N).max() > 1e-2
    moved = np.abs(scored[0].logit_N - scored[1].logit_N).mean()
    assert found.scores.mean_logit_change == pytest.approx(moved)


def test_the_command_promotes_what_is_as_good_and_holds_what_is_not(
    places: Places, store: FeatureStore, tmp_path: Path
) -> None:
    first = store.snapshot("stable").version
    command = (places.folder / "runs/a", store.url, "--promote", "stable", "--version", "candidate")
    move_channel(store, "candidate", first + 1)
    good = run(*command)
    assert good.exit_code == 0, good.output
    assert f"stable points to snapshot {first + 1}" in good.output
    assert store.snapshot("stable").version == first + 1
    assert find_channel(store.storage, "stable").reason.startswith("promoted (coverage 1, gauc 0")
    assert "already: nothing to do" in run(*command).output
    move_channel(store, "candidate", first + 2)
    file = tmp_path / "found.json"
    bad = run(*command, "--json", file)
    written = json.loads(file.read_text())
    failed = [each["gate"] for each in written["gates"] if not each["holds"]]
    assert bad.exit_code == 1 and set() < set(failed) <= {"gauc", "logloss"}, written
    assert f"error: gate {failed[0]}: " in bad.output and f"stable stays at snapshot {first + 1}" in bad.output
    assert store.snapshot("stable").version == first + 1 and not written["holds"]
    forced = run(*command, "--force", "a new camera")
    assert forced.exit_code == 0 and f"stable points to snapshot {first + 2}, by --force" in forced.output
    assert find_channel(store.storage, "stable").reason.startswith("forced: a new camera (")


def test_images_of_the_impressions_have_to_have_a_row(store: FeatureStore, check: Check) -> None:
    gone = store.snapshot("stable").keys()[:10]
    found, _ = check.promote(store.delete(gone).version, "stable", None)
    coverage = next(each for each in found.gates if each.gate == "coverage")
    assert (coverage.value, coverage.holds) == (pytest.approx(0.8), False)


def test_a_first_promotion_has_nothing_to_compare_with(store: FeatureStore, check: Check) -> None:
    found, said = check.promote("stable", "first", None)
    assert [each.gate for each in found.gates] == ["coverage"] and said.startswith("first points to")


def test_a_channel_that_was_moved_meanwhile_stays_where_the_other_put_it(
    store: FeatureStore, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.snapshot("stable").version

    def meanwhile(*_: Any) -> list[Any]:
        move_channel(store, "stable", first + 2)
        return []

    monkeypatch.setattr("trainer.gates.score_gates", meanwhile)
    with pytest.raises(CommitConflictError, match="another writer was first"):
        check.promote(first + 1, "stable", None)
    move = last_move(store.storage, "stable")
    assert move is not None and move.version == first + 2


def test_what_tells_nothing_is_refused(places: Places, store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.images=none"):
        Check(places.folder / "runs/none", store.url, GateLimits())
    other = FeatureStore.create(tmp_path / "other", store.info.kind)
    other.put(store.snapshot("stable").read_shard(0))
    with pytest.raises(AnotherStoreError):
        Check(places.folder / "runs/a", other.url, GateLimits()).promote(1, "stable", None)
    result = run(places.folder / "runs/a", store.url, "--accept", "--promote", "stable")
    assert result.exit_code == 2 and "not both" in result.output
