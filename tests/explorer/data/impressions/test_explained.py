"""Scores on the pages are those of jobs/score.py, and each "what if" is the score of samples that really are so."""

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from explorer.data.impressions import explained
from explorer.data.impressions.explained import explain, on_missing, sentence, weighing, with_other_pictures
from explorer.data.impressions.groups import PictureName
from explorer.data.impressions.impression_list import score_first
from explorer.data.impressions.open_runs import OpenedRun, TrainedRuns
from explorer.errors import ExplorerError
from explorer.places import Places as ShownPlaces
from explorer.problems import Problem
from featurestore.store import FeatureStore
from tests.explorer.world import World
from tests.raised import raises
from tests.serving.scoring.variants import GONE, SERVED, TABLES, shared_places
from tests.serving.scoring.variants import trained as trained_variant
from tests.trainer.conftest import Places
from tests.trainer.samples.reading import rewrite
from tests.trainer.whole_runs import run_alone
from trainer.comm import SoloComm
from trainer.evaluation.predict import predict, predict_run, score_run
from trainer.runs.saved import RunSource, open_source
from trainer.samples.survey import write_part
from trainer.schema.fields import DEFAULT_SCHEMA

pytestmark = pytest.mark.long

TOLERANCE = 2e-5
KINDS = ["lr", "inputs", "contents", "id_proxy", "exact", "images_none", "images_behavior"]
"""Every kind of columns, images and tables that the pages tell apart; of nets they know nothing."""
OF_BEHAVIORS = ["behavior_item", "behavior_image", "behavior_category", "behavior_shop", "behavior_age"]
TEST = Path("test/day=2026-01-01.parquet")
GROUPS = (2, 7, 31)


def of_kinds(*kinds: str) -> pytest.MarkDecorator:
    """Parametrize by runs: pytest puts all tests of a run side by side, while it is open."""
    return pytest.mark.parametrize("kind", kinds, scope="module")


class Runs:
    """Runs of tests/serving/scoring/variants.py, each trained when it is first asked for; the last two stay open."""

    def __init__(self, places: Places) -> None:
        self.places, self.folder = places, places.folder
        (self.folder / "runs").mkdir(exist_ok=True)
        self.opened = TrainedRuns(ShownPlaces(runs=str(self.folder / "runs"), store=str(self.folder / "features")))
        self.samples = pq.read_table(self.folder / "samples" / TEST, partitioning=None)

    def trained(self, kind: str) -> Path:
        return trained_variant(self.places, kind) if kind in SERVED else self.folder / "runs" / kind

    def use(self, kind: str) -> AbstractContextManager[OpenedRun]:
        self.trained(kind)
        return self.opened.use(kind)

    def row(self, number: int) -> dict[str, Any]:
        return self.samples.slice(number, 1).to_pylist()[0]

    @property
    def with_history(self) -> list[int]:
        """Groups that have several behaviours."""
        lengths = [len(each) for each in self.samples["behavior_item"].to_pylist()]
        return [number for number, length in enumerate(lengths) if length >= 3][:2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(shared_places(tmp_path_factory))
    yield runs
    runs.opened.close()


def scored_with(run: Path, table: pa.Table, rows: list[dict[str, Any]], folder: Path) -> np.ndarray:
    """Write samples with these rows and predict them as an evaluation does."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "test").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / TEST)
    return predict_run(run, samples=str(folder)).logit_N


@of_kinds(*KINDS)
def test_scores_are_those_of_the_job(kind: str, runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    score_run(RunSource(runs.trained(kind)), str(out), SoloComm())
    expected = pq.read_table(out)
    with runs.use(kind) as opened:
        listed = score_first(opened)
        explanations = [explain(opened, number) for number in GROUPS]
    assert listed.num == listed.total == len(expected)
    assert listed.group_N.tolist() == expected["row"].to_pylist()
    assert listed.place_N.tolist() == expected["place"].to_pylist()
    np.testing.assert_allclose(listed.logit_N, expected["logit"].to_numpy(), atol=TOLERANCE)
    for number, explanation in zip(GROUPS, explanations, strict=True):
        assert explanation.group.place.row_of_file == number
        for name in ("logit", "probability"):
            found = [getattr(each.score, name) for each in explanation.candidates]
            np.testing.assert_allclose(found, expected[name].to_numpy()[listed.group_N == number], atol=TOLERANCE)


@of_kinds("lr")
def test_ads_are_named_as_the_logs_name_them(kind: str, runs: Runs) -> None:
    names = runs.trained(kind) / "ids.parquet"
    with runs.use(kind) as opened:
        ads = [each.ad for each in explain(opened, GROUPS[0]).candidates]
        assert ads[0].isdecimal()
        write_part(names, {int(ads[0]): "SKU-10195", 13: "eva"})
        found = explain(opened, GROUPS[0])
        texts = opened.texts([13, "13", 14])
        names.unlink()
    assert [each.ad for each in found.candidates] == ["SKU-10195" if each == ads[0] else each for each in ads]
    assert texts == ["eva", "13", "14"]


@of_kinds("lr", "contents", "id_proxy", "images_none", "exact")
def test_without_images_is_an_evaluation_with_all_images_hidden(kind: str, runs: Runs) -> None:
    opened_run = open_source(RunSource(runs.trained(kind)), SoloComm())
    usual, _ = predict(opened_run)
    for service in opened_run.engine.services.values():
        service.partition.hide(True)
    expected, _ = predict(opened_run)
    opened_run.close()
    with runs.use(kind) as opened:
        listed = score_first(opened)
        again = score_first(opened)
        explanation = explain(opened, 7)
    np.testing.assert_allclose(listed.without_N, expected, atol=TOLERANCE)
    np.testing.assert_allclose(again.logit_N, usual, atol=TOLERANCE)  # what was hidden is seen again
    found = [each.without_images.logit for each in explanation.candidates]
    np.testing.assert_allclose(found, expected[listed.group_N == 7], atol=TOLERANCE)
    assert (np.abs(expected - usual).max() > 1e-3) == (kind != "images_none")


@of_kinds(*KINDS)
def test_a_behaviour_taken_away_is_a_user_without_it(kind: str, runs: Runs, tmp_path: Path) -> None:
    changed, found = [], []
    for number in runs.with_history:
        with runs.use(kind) as opened:
            found += [each.without_it.logit for each in explain(opened, number, 0).behaviors]
        row = runs.row(number)
        for place in range(len(row["behavior_item"])):
            shorter = {n: [v for k, v in enumerate(row[n]) if k != place] for n in OF_BEHAVIORS if n in row}
            changed.append(row | shorter)
    logit_N = scored_with(runs.trained(kind), runs.samples, changed, tmp_path / "changed")
    first = np.cumsum([0, *(len(row["label"]) for row in changed)])[:-1]
    np.testing.assert_allclose(found, logit_N[first], atol=TOLERANCE)


@of_kinds("lr", "inputs", "contents", "id_proxy", "exact", "images_behavior")
def test_another_picture_is_samples_with_that_picture(kind: str, runs: Runs, tmp_path: Path) -> None:
    keys = [1_000, 1_017, 1_044, GONE[0], 77]
    with runs.use(kind) as opened:
        explanation = explain(opened, 5, 0)
        found = with_other_pictures(explanation.group, 0, [PictureName(key, None) for key in keys])
        assert with_other_pictures(explanation.group, 0, []) == []
    row = runs.row(5)
    changed = [row | {"ad_image": [key, *row["ad_image"][1:]]} for key in keys]
    logit_N = scored_with(runs.trained(kind), runs.samples, changed, tmp_path / "changed")
    np.testing.assert_allclose([each.score.logit for each in found], logit_N[:: len(row["label"])], atol=TOLERANCE)
    if kind != "images_behavior":
        has_all = kind == "exact"  # of the snapshot before some went
        assert [each.has_feature for each in found] == [True, True, True, has_all, False]
    assert (found[0].look_alone is None) == (kind == "images_behavior")


def test_pictures_alone_are_samples_whose_pictures_have_a_column_of_their_own(runs: Runs, tmp_path: Path) -> None:
    """Two runs that learn the same: in one the IDs of images are in other columns than the images themselves."""
    values = yaml.safe_load(DEFAULT_SCHEMA.read_text())
    for field in values["fields"]:
        if field["kind"] == "content":
            field["column"] = {"user": "seen_look", "ad": "shown_look"}[field["side"]]
    schema, samples = tmp_path / "schema.yaml", tmp_path / "samples"
    schema.write_text(yaml.safe_dump(values))
    shutil.copytree(runs.folder / "samples", samples)

    def with_looks(table: pa.Table) -> pa.Table:
        for name, source in {"seen_look": "behavior_image", "shown_look": "ad_image"}.items():
            table = table.append_column(name, table[source])
        return table

    rewrite(samples, with_looks)
    common = {"data__missing": "zeros", "model__pooling": "multi_query", "model__tables": f"{{{TABLES}}}"}
    for name, own in {"together": {}, "apart": {"data__samples": samples, "data__schema_file": schema}}.items():
        run_alone(runs.places, run__name=name, train__max_steps=12, optim__lr=0.02, **common, **own)
    number = runs.with_history[0]
    pictures = [PictureName(key, None) for key in (1_004, 1_011, 1_020, 1_033)]
    with runs.use("together") as opened:
        found = explain(opened, number, 0)
        others = with_other_pictures(found.group, 0, pictures)
    table = with_looks(runs.samples)
    row = table.slice(number, 1).to_pylist()[0]

    def expected(rows: list[dict[str, Any]]) -> np.ndarray:
        return scored_with(runs.trained("apart"), table, rows, tmp_path / "changed")[:: len(row["label"])]

    shorter = [row | {"seen_look": [v for k, v in enumerate(row["seen_look"]) if k != place]} for place in range(3)]
    without = [each.without_picture.logit for each in found.behaviors[:3] if each.without_picture]
    np.testing.assert_allclose(without, expected(shorter), atol=TOLERANCE)
    looks = [row | {"shown_look": [each.key, *row["shown_look"][1:]]} for each in pictures]
    alone = [each.look_alone.logit for each in others if each.look_alone]
    np.testing.assert_allclose(alone, expected(looks), atol=TOLERANCE)
    assert any(abs(each.score.logit - each.look_alone.logit) > 1e-6 for each in others if each.look_alone)


@of_kinds("lr", "id_proxy", "finalmlp", "inputs", "images_behavior", "two_towers")
def test_attention(kind: str, runs: Runs) -> None:
    channels = {"finalmlp": 2, "id_proxy": 1, "images_behavior": 1}.get(kind, 0)
    with runs.use(kind) as opened:
        told = weighing(opened)
        for number in runs.with_history:
            found = explain(opened, number)
            assert len(found.channels) == channels
            assert all(len(each.weights) == channels for each in found.behaviors)
            sums = [sum(each.weights[channel] for each in found.behaviors) for channel in range(channels)]
            assert sums == pytest.approx([1] * channels, abs=1e-5)
    assert ("has a weight" in told or "weigh the same" in told) == (not channels)


def test_the_sentence_says_what_the_table_has(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    number = runs.with_history[0]
    with runs.use("finalmlp") as opened, runs.use("images_none") as ids:
        found = explain(opened, number, 0, ids)
        plain = explain(ids, number, 0)
        helped = found.helped_most or found.hurt_most
        said, said_of_ids = sentence(found, {helped.picture.key: "shoes/red.jpg"}), sentence(plain, {})
        met = json.loads((runs.folder / "runs/finalmlp/report.json").read_text())["missing_lookups"]
        assert met > 0 and f"met images without a feature {met:,} times" in on_missing(opened)
    with runs.use("exact") as strict:  # of a snapshot that has every image
        assert "without pictures is not known" in sentence(explain(strict, number, 0), {})
        assert "was not trained for missing images: it met none" in on_missing(strict)
        assert "is not a forecast" in on_missing(strict)
        monkeypatch.setattr(type(strict.trained.saved), "missing_met", property(lambda saved: 1))
        assert not strict.knows_missing and "it met 1, too few to learn from" in on_missing(strict)
    for each in (found.chosen.score, found.chosen.without_images):
        assert f"{100 * each.probability:.2f} %" in said
    assert f"rank {found.chosen.rank} of {len(found.candidates)}" in said
    assert "shoes/red.jpg" in said
    assert "uses only IDs" in said_of_ids
    for each, alone in zip(found.candidates, plain.candidates, strict=True):
        assert each.ids_alone.logit == pytest.approx(alone.score.logit, abs=TOLERANCE)
    if found.helped_most:
        effects = [found.effect(each) for each in found.behaviors]
        assert found.effect(found.helped_most) == max(each for each in effects if each is not None)


def check_sent(runs: Runs, opened: OpenedRun, key: int, number: int, ad: int, patch: pytest.MonkeyPatch) -> None:
    """A picture that is sent, for which the network gives the feature of an image, gets what that image gets."""
    store = FeatureStore.open(runs.folder / "features")
    patch.setattr(explained, "feature_of_picture", lambda store, data: store.snapshot().get([key]))
    group = explain(opened, number, ad).group
    expected = with_other_pictures(group, ad, [PictureName(key, None)])[0].look_alone
    found = explained.score_sent(group, ad, store, b"a picture")
    assert found.logit == pytest.approx(expected.logit, abs=TOLERANCE)


@of_kinds("lr", "two_towers", "id_proxy")
def test_a_sent_picture_has_the_score_of_its_feature(kind: str, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    with runs.use(kind) as opened:
        for number in (5, 7):
            check_sent(runs, opened, 1_021, number, 0, monkeypatch)


def test_a_picture_that_is_sent_for_a_new_ad(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pictures of new ads do not count (`model.image_dropout`), one that is sent does not either."""
    changes = {"model__image_dropout": 0.3, "model__id_dropout": 0.3, "data__missing": "zeros"}
    tables = "{user: 64, item: 65536, image: 65536, category: 16, scene: 16}"
    run_alone(runs.places, run__name="new-ads", train__max_steps=40, optim__lr=0.05, model__tables=tables, **changes)
    groups = enumerate(runs.samples["ad_item"].to_pylist())
    number, ad = next((number, items.index(item)) for number, items in groups for item in items if item >= 40)
    with runs.use("new-ads") as opened:
        new_ads = opened.trained.engine.model.new_ads
        new_ads.decide(pictures_count=False)
        check_sent(runs, opened, 1_046, number, ad, monkeypatch)  # of an item that training has not seen


def test_runs_of_other_features_take_no_picture(runs: Runs) -> None:
    """Nor do those that see none: pages/test_impressions.py."""
    texts = FeatureStore.open(runs.folder / "texts")
    with runs.use("lr") as opened, raises(ExplorerError, Problem.OTHER_FEATURES, where="lr", url=texts.url):
        explained.score_sent(explain(opened, 1).group, 0, texts, b"")


def test_a_closed_run_leaves_no_tables_also_where_something_refers_to_it(world: World) -> None:
    """Without the garbage collector, which may come an hour later; pages refer to the runs that they show."""
    runs = TrainedRuns(world.places())
    gc.disable()
    try:
        with runs.use("both") as opened:
            tables = [weakref.ref(table) for table in opened.trained.engine.tables.values()]
            assert tables and all(table() is not None for table in tables)
        runs.close()
        assert all(table() is None for table in tables)
        assert opened.sees_images
    finally:
        gc.enable()
