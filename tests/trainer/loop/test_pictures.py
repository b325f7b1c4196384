"""Whether new ads' pictures count is decided by ads that training has not seen, and kept with the run, by any ranks."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.ranks import StandingRanks
from tests.trainer.checkpoints import tensors_of
from tests.trainer.conftest import Places, drawn_store, sample_table, write_samples
from tests.trainer.whole_runs import alike, all_alike, report_of, run_alone
from trainer.comm import SoloComm
from trainer.config import ModelConfig
from trainer.evaluation.bootstrap import Metrics, auc, log_loss
from trainer.evaluation.predict import predict, predict_run
from trainer.loop.training import LEAST, checked
from trainer.models.newads import NewAds
from trainer.runs.saved import EvaluatedRun, RunSource, open_source
from trainer.schema.fields import Field

pytestmark = pytest.mark.long

KNOWN, ITEMS, DIM = 40, 70, 16
COUNTS = "model.new_ads.counts"
SETTINGS: dict[str, Any] = {
    "model__image_dropout": 0.2,
    "model__compute_dtype": "float64",
    "model__images": "ad",
    "model__tables": "{user: 64, item: 65536, image: 65536, category: 16, scene: 16}",  # no new item has a known row
    "train__max_steps": 30,
    "train__eval_batch_size": 512,
}


def _features(new_ones: float) -> np.ndarray:
    """Rows that tell whether an item is even, which is what makes a click likely; of new items times `new_ones`."""
    random = np.random.default_rng(3)
    sign_I = np.where(np.arange(ITEMS) % 2 == 0, 1.0, -1.0)
    sign_I[KNOWN:] *= new_ones
    return (sign_I[:, None] + random.normal(size=(ITEMS, DIM)) * 0.3).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """More than LEAST test impressions of new items; stores whose pictures are right about them, and wrong."""
    folder = tmp_path_factory.mktemp("pictures")
    write_samples(folder / "samples" / "train", [200, 200], row_group=50, items=KNOWN)
    write_samples(folder / "samples" / "test", [900], row_group=300, seed=90, items=ITEMS)
    for name, new_ones in {"right": 1.0, "wrong": -1.0}.items():
        drawn_store(folder / name, _features(new_ones), first_key=1_000, dtype="bfloat16")
    return Places(folder)


def _run(made: Places, name: str, store: str, **changes: Any) -> Path:
    return run_alone(made, run__name=name, data__store=made.folder / store, **SETTINGS | changes)


@pytest.fixture(scope="module")
def right(made: Places) -> Path:
    return _run(made, "right", "right")


@pytest.fixture(scope="module")
def wrong(made: Places) -> Path:
    return _run(made, "wrong", "wrong")


@contextlib.contextmanager
def _opened(run: Path) -> Iterator[tuple[EvaluatedRun, NewAds]]:
    with contextlib.closing(open_source(RunSource(run), SoloComm())) as opened:
        new_ads = opened.engine.model.new_ads
        assert new_ads is not None
        yield opened, new_ads


def _logits(run: Path, *, pictures_count: bool) -> np.ndarray:
    """Predict with or without pictures of new ads, whatever the run has decided."""
    with _opened(run) as (opened, new_ads):
        new_ads.decide(pictures_count=pictures_count)
        return predict(opened)[0]


def _distance(logit_N: np.ndarray, label_N: np.ndarray) -> float:
    """By how much logits of clicks are above the others, on average: as an AUC tells it, but a continuous number."""
    return float(logit_N[label_N == 1].mean() - logit_N[label_N == 0].mean())


@pytest.mark.parametrize(("store", "counts"), [("right", True), ("wrong", False)])
def test_what_ranks_new_ads_better_holds(request: pytest.FixtureRequest, store: str, counts: bool) -> None:
    """In the checkpoint, in the report, and in what reads the run."""
    run = request.getfixturevalue(store)
    metrics = report_of(run)["metrics"]
    assert metrics["new_ad_impressions"] >= LEAST
    assert tensors_of(run)[COUNTS] == counts
    assert report_of(run)["new_ad_pictures_count"] is counts
    known = predict_run(run)
    held_N, other_N = (_logits(run, pictures_count=each) for each in (counts, not counts))
    np.testing.assert_allclose(known.logit_N, held_N, rtol=0, atol=1e-9)
    label_N, is_new_N = known.impressions.label_N, known.is_new_ad_N
    assert metrics["logloss"] == pytest.approx(log_loss(held_N, label_N), abs=1e-6)
    assert is_new_N is not None
    label_N, held_N, other_N = label_N[is_new_N], held_N[is_new_N], other_N[is_new_N]
    assert metrics["new_ad_auc"] == alike("new_ad_auc", auc(held_N, label_N))
    assert _distance(held_N, label_N) > _distance(other_N, label_N) + 0.5


@pytest.mark.parametrize("store", [pytest.param("right", marks=pytest.mark.slow), "wrong"])
def test_two_ranks_decide_as_one(
    made: Places, request: pytest.FixtureRequest, store: str, two_ranks: StandingRanks
) -> None:
    alone = request.getfixturevalue(store)
    settings = made.settings(run__name=f"two-{store}", data__store=made.folder / store, **SETTINGS)
    two_ranks.run("-m", "trainer.main", "--set", *settings)
    two = alone.parent / f"two-{store}"
    assert tensors_of(two)[COUNTS] == tensors_of(alone)[COUNTS]
    assert report_of(two)["metrics"] == all_alike(report_of(alone)["metrics"])


def _gate(*, pictures_count: bool) -> NewAds:
    """The part of a model that decides, alone."""
    image = Field(name="ad_image", side="ad", kind="content", width=3)
    gate = NewAds([image], ("ad_item",), ModelConfig(images="ad", image_dropout=0.1))
    gate.decide(pictures_count=pictures_count)
    return gate


FEW = "new ads: 999 of 1,005 impressions are of ads without a trained ID row; 1,000 would show whether "
FEW += "their pictures count; that stays unchanged"
ENOUGH = "new ads: 1,000 of 1,005 impressions are of ads without a trained ID row; AUC {:.4f} with their pictures, "
ENOUGH += "{:.4f} without; from here on they {}"


@pytest.mark.parametrize("did_count", [True, False])
@pytest.mark.parametrize(
    ("impressions", "telling", "own", "without", "do_count", "said"),
    [
        pytest.param(LEAST - 1, LEAST, 0.1, 0.9, None, "", id="few"),
        pytest.param(LEAST, LEAST, None, None, None, "", id="one class"),
        pytest.param(LEAST + 5, LEAST - 1, 0.1, 0.9, None, FEW, id="few without a row"),
        pytest.param(LEAST + 5, LEAST, 0.6, 0.5, True, ENOUGH, id="better with them"),
        pytest.param(LEAST + 5, LEAST, 0.5, 0.6, False, ENOUGH, id="better without"),
        pytest.param(LEAST + 5, LEAST, 0.5, 0.5, None, ENOUGH, id="equal"),
    ],
)
def test_the_better_of_two_evaluations_holds_where_enough_new_ads_tell(
    did_count: bool, impressions: int, telling: int, own: float, without: float, do_count: bool | None, said: str
) -> None:
    """Where so many logits depend on the pictures beyond rounding."""
    gate, told = _gate(pictures_count=did_count), list[str]()

    def measured() -> tuple[Metrics, np.ndarray]:
        logit_N = gate.pictures_count * np.where(np.arange(LEAST) < telling, 1, 1e-7)
        return {"new_ad_impressions": impressions, "new_ad_auc": own if gate.pictures_count else without}, logit_N

    found, expected = checked(measured, gate, SoloComm(), told.append), did_count if do_count is None else do_count
    assert found["new_ad_auc"] == (own if expected else without)
    assert gate.pictures_count == expected
    assert told == ([said.format(own, without, "keep them" if expected else "have none")] if said else [])


@pytest.mark.parametrize("did_count", [True, False])
def test_a_stop_in_between_leaves_all_as_it_was(did_count: bool) -> None:
    gate = _gate(pictures_count=did_count)

    def stopped() -> tuple[Metrics, np.ndarray]:
        if gate.pictures_count != did_count:
            raise KeyboardInterrupt
        return {"new_ad_impressions": LEAST, "new_ad_auc": 0.5}, np.zeros(LEAST)

    with pytest.raises(KeyboardInterrupt):
        checked(stopped, gate, SoloComm(), lambda text: None)
    assert gate.pictures_count == did_count


@pytest.mark.parametrize("parts", ["partial", "all"])
def test_a_run_that_goes_on_with_known_pictures_keeps_what_was_decided(made: Places, wrong: Path, parts: str) -> None:
    """New to this run are all ads of the test samples, whose pictures E knows by heart; their rows begin anew, or are
    trained."""
    samples = made.folder / "next"
    if not samples.exists():
        shutil.copytree(made.folder / "samples" / "test", samples / "test")
        (samples / "train").mkdir()
        pq.write_table(sample_table(60, seed=5, items=5), samples / "train/day=2026-01-09.parquet", row_group_size=7)
    changes = {"data__samples": samples, "run__warm_start": wrong, "run__warm_parts": parts, "train__max_steps": 3}
    run = _run(made, f"next-{parts}", "wrong", **changes)
    assert tensors_of(run)[COUNTS] == 0
    assert report_of(run)["new_ad_pictures_count"] is False
