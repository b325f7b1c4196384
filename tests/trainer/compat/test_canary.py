"""A canary evaluation: a real small run, a snapshot that is as good, one whose features are dealt anew, and the job."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from featurestore.errors import AnotherStoreError
from featurestore.format.rows import FeatureRows
from featurestore.store import FeatureStore
from featurestore.upkeep.history import move_channel
from featurestore.upkeep.promotion import GateLimits, read_decisions
from trainer.comm import SoloComm
from trainer.compat.canary import Canary
from trainer.compat.promote import app
from trainer.config.config import load_config
from trainer.errors import ConfigError
from trainer.evaluation.compare import compare
from trainer.evaluation.predict import Predictions, predict_run
from trainer.main import train

pytestmark = pytest.mark.long  # they train a whole run

Places = Any


@pytest.fixture(scope="module")
def places(make_places: Callable[[Path], Places], tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A run that has learnt from images alone; snapshot 2 adds rows, snapshot 3 deals the features anew."""
    places = make_places(tmp_path_factory.mktemp("canary"))
    settings = {
        "run__name": "a",
        "train__max_steps": 40,
        "data__global_batch_size": 32,
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


def test_the_difference_is_that_of_two_evaluations(
    places: Places, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are compared, which are continuous: a GAUC moves by a whole pair where two of them change places."""
    scored: list[Predictions] = []

    def noted(ours: list[Predictions], baseline: list[Predictions], **options: Any) -> Any:
        scored.extend([*ours, *baseline])
        return compare(ours, baseline, **options)

    monkeypatch.setattr("trainer.compat.canary.compare", noted)
    folder, first = places.folder / "runs/a", store.snapshot("stable").version
    newest = store.snapshot(first + 2)
    found = Canary(folder, store.url, resamples=200).compare(newest, store.snapshot("stable"))
    whole = [predict_run(folder, store=store.url, store_version=version) for version in (newest.version, "stable")]
    for mine, expected in zip(scored, whole, strict=True):
        np.testing.assert_allclose(mine.logit_N, expected.logit_N, atol=1e-5)
        assert (mine.impressions.label_N == expected.impressions.label_N).all()
        assert (mine.impressions.user_N == expected.impressions.user_N).all()
    assert found.gauc == compare(scored[:1], scored[1:], metrics=("gauc",), resamples=200)["gauc"]
    assert np.abs(scored[0].logit_N - scored[1].logit_N).max() > 1e-2
    assert (found.missing_stable, found.missing_candidate) == (0, 0)


def test_the_job_promotes_what_is_as_good_and_holds_what_is_not(
    places: Places, store: FeatureStore, tmp_path: Path
) -> None:
    first = store.snapshot("stable").version
    command = (places.folder / "runs/a", store.url, "--bootstrap", 200, "--max-quarantine", 1)
    move_channel(store, "candidate", first + 1)
    good = run(*command)
    assert good.exit_code == 0, good.output
    assert f"stable points to snapshot {first + 1}, decision" in good.output
    assert store.snapshot("stable").version == first + 1
    move_channel(store, "candidate", first + 2)
    file = tmp_path / "decision.json"
    bad = run(*command, "--min-neighbours", 0, "--max-drift", 9, "--max-gauc-loss", 0, "--json", file)
    results = {each["gate"]: each for each in json.loads(file.read_text())["results"]}
    assert bad.exit_code == 1 and [name for name, each in results.items() if not each["holds"]] == ["gauc"]
    assert "error: gate gauc: -" in bad.output and f"stable stays at snapshot {first + 1}" in bad.output
    assert store.snapshot("stable").version == first + 1
    assert "keys asked for have a row" in results["coverage"]["text"]
    assert read_decisions(store.storage, "stable")[-1].results[-1].gate == "gauc"


def test_images_of_the_impressions_have_to_have_a_row(places: Places, store: FeatureStore) -> None:
    keys = Canary(places.folder / "runs/a", store.url).keys()
    move_channel(store, "candidate", store.delete(keys[:10]).version)
    result = run(places.folder / "runs/a", store.url, "--bootstrap", 50, "--dry-run")
    share = (len(keys) - 10) / len(keys)
    assert result.exit_code == 1 and f"gate coverage: {share:.4g}, limit 0.99" in result.output


def test_what_tells_nothing_is_refused(places: Places, store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.images=none"):
        Canary(places.folder / "runs/none", store.url)
    other = FeatureStore.create(tmp_path / "other", store.info.kind)
    first = store.snapshot("stable")
    other.put(first.read_shard(0))
    with pytest.raises(AnotherStoreError):
        Canary(places.folder / "runs/a", other.url).compare(other.snapshot(), other.snapshot())
    lost = GateLimits(max_gauc_loss=0.0)
    assert Canary(places.folder / "runs/a", store.url).gate(lost)(first, None).holds
