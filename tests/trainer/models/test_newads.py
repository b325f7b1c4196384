"""New ads: which they are, which IDs are their own, and refusals.

Whether their pictures count is decided by ads that training has not seen, and kept with the run, by any ranks.
"""

import contextlib
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.raised import raises
from tests.ranks import StandingRanks
from tests.trainer.checkpoints import tensors_of
from tests.trainer.conftest import Places, drawn_store, sample_table, write_samples
from tests.trainer.whole_runs import alike, all_alike, report_of, run_alone
from trainer.comm import SoloComm
from trainer.config import ExactTableConfig, ModelConfig
from trainer.errors import ConfigError
from trainer.evaluation.bootstrap import Metrics, auc, log_loss
from trainer.evaluation.predict import predict, predict_run
from trainer.exchange.vectors import FieldVectors
from trainer.loop.training import LEAST, checked
from trainer.models.nets import build_model
from trainer.models.newads import NewAds, build_new_ads, dropped, own_ids_of_ads
from trainer.problems import Problem
from trainer.runs.saved import RunSource, open_source
from trainer.schema.fields import Field, Schema, load_schema

ITEM = Field(name="ad_item", side="ad", kind="id", table="item")
PICTURES = Field(name="ad_picture_ids", side="ad", kind="multi_id", table="image", column="ad_image")
IMAGE = Field(name="ad_image", side="ad", kind="content", width=3)
SCHEMA = Schema(fields=(ITEM, PICTURES, IMAGE))
START = 1e-4


def _config(**values: object) -> ModelConfig:
    tables = {"item": 9, "image": 9}
    return ModelConfig(**{"images": "ad", "image_dropout": 0.1, "id_init_std": START, "tables": tables, **values})


def _fields(items: list[float], pictures: list[list[float]]) -> dict[str, FieldVectors]:
    """Of each ad the farthest number of its item's row, and of the rows of its pictures."""
    ones = torch.ones(len(items), dtype=torch.int64)
    rows = [row for values in pictures for row in values]
    lengths = torch.tensor([len(values) for values in pictures])
    return {
        "ad_item": FieldVectors(torch.tensor([[0.0, -v] for v in items]), torch.arange(len(items)), ones),
        "ad_picture_ids": FieldVectors(torch.tensor([[v, 0.0] for v in rows]), torch.arange(len(rows)), lengths),
        "ad_image": FieldVectors(torch.randn(2, 3).requires_grad_(), torch.arange(len(items)) % 2, ones),
    }


def test_where_pictures_do_not_count_those_of_ads_without_a_trained_row_are_zero() -> None:
    gate = NewAds([IMAGE], ("ad_item", "ad_picture_ids"), _config()).eval()
    edge, trained = START * 3**0.5, 1e-3
    fields = _fields([edge, trained, edge, 0.0, edge], [[edge, edge], [edge], [edge, trained], [0.0], []])
    before = fields["ad_image"].vectors_UV[fields["ad_image"].index_N]
    is_new = torch.tensor([True, False, False, True, True])
    for counts in (True, False):
        gate.decide(pictures_count=counts)
        given = gate(fields)["ad_image"]
        after = given.vectors_UV[given.index_N]
        assert torch.equal(after[~is_new], before[~is_new])
        torch.testing.assert_close(after[is_new], before[is_new] * counts)
    in_training = gate.train()(fields)["ad_image"].vectors_UV
    assert torch.equal(in_training, fields["ad_image"].vectors_UV), "training sees all that are not dropped"


def test_an_id_crossed_with_the_context_does_not_tell_a_new_ad() -> None:
    """The export of ads' vectors has no rows of it."""
    crossed = Field(name="in_scene", side="ad", kind="id", columns=("ad_item", "ad_scene"), context=True)
    schema = Schema(fields=(*SCHEMA.fields, crossed))
    gate = build_new_ads(schema, schema.fields, _config())
    gate.eval()
    nothing = FieldVectors(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    given = gate(_fields([0.0, 1.0], [[0.0], [0.0]]) | {"in_scene": nothing})
    assert len(given["ad_image"].vectors_UV) == 2


def exact(admit_after: int) -> ExactTableConfig:
    return ExactTableConfig(kind="exact", max_rows=9, admit_after=admit_after)


LATE = {"item": 9, "image": exact(2)}
USER = Field(name="user", side="user", kind="id")
BEHAVIOR = Field(name="behavior_image", side="user", kind="content", width=3)


def test_rows_that_start_late_cannot_tell_new_ads() -> None:
    with raises(ConfigError, Problem.NEW_IDS_SHARE_A_ROW, value=0.1, where="image"):
        build_model(SCHEMA, _config(tables=LATE))


@pytest.mark.parametrize(
    ("part", "fields", "values"),
    [
        pytest.param("new_ads", SCHEMA.fields, {"tables": LATE, "image_dropout": 0.0}, id="nothing dropped"),
        pytest.param("new_ads", SCHEMA.fields, {"tables": LATE, "images": "none"}, id="no images"),
        pytest.param("id_proxy", SCHEMA.fields, {"images": "none"}, id="no images for a proxy"),
        pytest.param("id_proxy", (*SCHEMA.fields, BEHAVIOR), {"images": "behavior"}, id="no images of ads"),
        pytest.param("id_proxy", SCHEMA.fields, {"id_proxy": False}, id="unasked"),
        pytest.param("id_proxy", (USER, IMAGE), {"image_dropout": 0.0}, id="no ids of ads"),
    ],
)
def test_models_have_no_part_without_use(part: str, fields: tuple[Field, ...], values: dict[str, object]) -> None:
    config = _config(**{"id_proxy": part == "id_proxy", "id_width": 2, "pooling": "mean", **values})
    assert getattr(build_model(Schema(fields=fields), config), part) is None


def test_models_have_the_parts_that_are_in_use() -> None:
    model = build_model(SCHEMA, _config(tables={"item": 9, "image": exact(1)}, id_proxy=True))
    assert model.new_ads is not None and model.id_proxy is not None


def test_own_ids_are_those_that_are_new_with_a_new_ad() -> None:
    assert own_ids_of_ads(load_schema()) == ("ad_item", "ad_image_id")
    others = [
        Field(name="behavior_item", side="user", kind="multi_id", table="item"),
        Field(name="ad_category", side="ad", kind="id"),
    ]
    crossed = [
        Field(name=f"ad_{name}_in_scene", side="ad", kind="id", columns=(f"ad_{name}", "ad_scene"))
        for name in ("item", "image", "category")
    ]
    own = own_ids_of_ads(Schema(fields=(*SCHEMA.fields, *others, *crossed)))
    assert own == ("ad_item", "ad_picture_ids", "ad_item_in_scene", "ad_image_in_scene")


def test_share_of_samples() -> None:
    drawn = np.stack([dropped(3, step, np.arange(1000), 0.3) for step in range(50)])
    assert abs(drawn.mean() - 0.3) < 0.01
    assert abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 0.1
    assert (drawn[0] != dropped(4, 0, np.arange(1000), 0.3)).any()


def test_ranks_drop_what_one_rank_drops() -> None:
    whole = dropped(3, 7, np.arange(100), 0.5)
    for places_B in (np.arange(33), np.arange(0), np.r_[40:60, 90:100, 3]):
        assert dropped(3, 7, places_B, 0.5).tolist() == whole[places_B].tolist()


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
def run_of(made: Places) -> Callable[[str], Path]:
    """The run on a store, which is trained once."""
    return functools.cache(lambda store: _run(made, store, store))


def _logits(run: Path, *, pictures_count: bool) -> np.ndarray:
    """Predict with or without pictures of new ads, whatever the run has decided."""
    with contextlib.closing(open_source(RunSource(run), SoloComm())) as opened:
        new_ads = opened.engine.model.new_ads
        new_ads.decide(pictures_count=pictures_count)
        return predict(opened)[0]


def _distance(logit_N: np.ndarray, label_N: np.ndarray) -> float:
    """By how much logits of clicks are above the others, on average: as an AUC tells it, but a continuous number."""
    return float(logit_N[label_N == 1].mean() - logit_N[label_N == 0].mean())


@pytest.mark.long
@pytest.mark.parametrize(("store", "counts"), [("right", True), ("wrong", False)])
def test_what_ranks_new_ads_better_holds(run_of: Callable[[str], Path], store: str, counts: bool) -> None:
    """In the checkpoint, in the report, and in what reads the run."""
    run = run_of(store)
    metrics = report_of(run)["metrics"]
    assert metrics["new_ad_impressions"] >= LEAST
    assert tensors_of(run)[COUNTS] == counts
    assert report_of(run)["new_ad_pictures_count"] is counts
    known = predict_run(run)
    held_N, other_N = (_logits(run, pictures_count=each) for each in (counts, not counts))
    np.testing.assert_allclose(known.logit_N, held_N, rtol=0, atol=1e-9)
    label_N, is_new_N = known.impressions.label_N, known.is_new_ad_N
    assert metrics["logloss"] == pytest.approx(log_loss(held_N, label_N), abs=1e-6)
    label_N, held_N, other_N = label_N[is_new_N], held_N[is_new_N], other_N[is_new_N]
    assert metrics["new_ad_auc"] == alike("new_ad_auc", auc(held_N, label_N))
    assert _distance(held_N, label_N) > _distance(other_N, label_N) + 0.5


@pytest.mark.long
@pytest.mark.parametrize("store", [pytest.param("right", marks=pytest.mark.slow), "wrong"])
def test_ranks_decide_as_one(made: Places, run_of: Callable[[str], Path], store: str, two_ranks: StandingRanks) -> None:
    alone = run_of(store)
    settings = made.settings(run__name=f"two-{store}", data__store=made.folder / store, **SETTINGS)
    two_ranks.run("-m", "trainer.main", "--set", *settings)
    two = alone.parent / f"two-{store}"
    assert tensors_of(two)[COUNTS] == tensors_of(alone)[COUNTS]
    assert report_of(two)["metrics"] == all_alike(report_of(alone)["metrics"])


def _gate(*, pictures_count: bool) -> NewAds:
    """The part of a model that decides, alone."""
    gate = NewAds([IMAGE], ("ad_item",), _config())
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


@pytest.mark.long
@pytest.mark.parametrize("parts", ["partial", "all"])
def test_a_run_that_goes_on_keeps_what_was_decided(made: Places, run_of: Callable[[str], Path], parts: str) -> None:
    """New to this run are all ads of the test samples, whose pictures E knows by heart; their rows begin anew, or are
    trained."""
    samples = made.folder / "next"
    if not samples.exists():
        shutil.copytree(made.folder / "samples" / "test", samples / "test")
        (samples / "train").mkdir()
        pq.write_table(sample_table(60, seed=5, items=5), samples / "train/day=2026-01-09.parquet", row_group_size=7)
    settings = {"data__samples": samples, "run__warm_parts": parts, "train__max_steps": 3}
    run = _run(made, f"next-{parts}", "wrong", run__warm_start=run_of("wrong"), **settings)
    assert tensors_of(run)[COUNTS] == 0
    assert report_of(run)["new_ad_pictures_count"] is False
