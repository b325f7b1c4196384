"""A two-tower run from training on two ranks to a search: what the job exported is what the model computes."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from featurestore.index import VectorIndex
from tests.ranks import StandingRanks
from trainer.comm import SoloComm
from trainer.config import load_config
from trainer.main import train
from trainer.prerank.__main__ import app
from trainer.prerank.adindex import (
    AdIndex,
    ad_vectors,
    ads_of_samples,
    origin_of,
    reader_of_tests,
    search_figures,
    towers,
    user_vectors,
    users_of_tests,
)
from trainer.runs.saved import TrainedRun, open_trained

Places = Any


@pytest.fixture(scope="module")
def run(places: Places, two_ranks: StandingRanks) -> Path:
    """Trained by two ranks."""
    settings = places.settings(
        model__base="two_tower", model__tower_width=6, run__name="towers", train__epochs=1, train__max_steps=15,
        model__compute_dtype="float32",  # numbers of ranks and batches of other make-ups are compared
    )  # fmt: skip
    two_ranks.run("-m", "trainer.main", "--set", *settings)
    return Path(places.folder) / "runs" / "towers"


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedRun:
    """The same, opened by one rank."""
    return open_trained(run, SoloComm())


@pytest.fixture(scope="module")
def index(trained: TrainedRun, places: Places) -> str:
    """Its ads under a flat index."""
    return build_index(trained, places)


def build_index(trained: TrainedRun, places: Places) -> str:
    ads = ads_of_samples(str(places.folder / "samples"), trained.schema, towers(trained).ad_fields)
    url = str(places.folder / "ad-index")
    AdIndex.build(url, "flat", ads.keys_N, ad_vectors(trained, ads, batch_size=7), origin_of(trained))
    return url


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_logits_are_made_of_the_exported_vectors(trained: TrainedRun, index: str, places: Places) -> None:
    ads = AdIndex.open(index)
    vector_of = dict(zip(*(part.tolist() for part in ads.vectors()), strict=True))
    samples = str(places.folder / "samples")
    rest, scenes, products = [], [], []
    logits = [trained.engine.predict(trained.engine.prepare(b)) for b in reader_of_tests(trained, samples).batches()]
    batches = user_vectors(trained, reader_of_tests(trained, samples).batches())
    for (batch, users), logit in zip(batches, logits, strict=True):
        exported = np.array([vector_of[ad] for ad in batch.fields["ad_item"].values_N.tolist()])
        product = (users[batch.group_of_sample_B] * exported).sum(axis=1)
        products.append(product)
        rest.append(logit - product - ads.state.origin.bias)
        scenes.append(batch.fields["ad_scene"].values_N)
    rest_N, scene_N = np.concatenate(rest), np.concatenate(scenes)
    assert np.concatenate(products).std() > 0.01
    # What is left is the context's part: one number a scene.
    of_scene = {scene: rest_N[scene_N == scene] for scene in np.unique(scene_N)}
    assert len(of_scene) == 3
    assert all(np.ptp(values) < 1e-5 for values in of_scene.values())
    assert np.ptp([values.mean() for values in of_scene.values()]) > 1e-4


def test_without_context_inner_product_and_bias_are_the_logit(run: Path, index: str, places: Places) -> None:
    ads, samples = AdIndex.open(index), str(places.folder / "samples")
    vector_of = dict(zip(*(part.tolist() for part in ads.vectors()), strict=True))
    plain = open_trained(run, SoloComm())
    context = towers(plain).context
    assert context is not None
    with torch.no_grad():
        context.weight.zero_()
    for batch, users in user_vectors(plain, reader_of_tests(plain, samples).batches()):
        exported = np.array([vector_of[ad] for ad in batch.fields["ad_item"].values_N.tolist()])
        product = (users[batch.group_of_sample_B] * exported).sum(axis=1)
        logit = plain.engine.predict(plain.engine.prepare(batch))
        np.testing.assert_allclose(product + ads.state.origin.bias, logit, rtol=0, atol=1e-5)
    plain.close()


def test_vectors_do_not_depend_on_the_batch(trained: TrainedRun, index: str, places: Places) -> None:
    ads = ads_of_samples(str(places.folder / "samples"), trained.schema, towers(trained).ad_fields)
    whole = ad_vectors(trained, ads, batch_size=10_000)
    keys, exported = AdIndex.open(index).vectors()
    np.testing.assert_allclose(exported, whole[np.argsort(ads.keys_N)], rtol=1e-4, atol=1e-6)
    assert np.array_equal(keys, np.sort(ads.keys_N))
    assert len(np.unique(whole.round(6), axis=0)) == len(whole)


def test_eval(run: Path, index: str, tmp_path: Path) -> None:
    options = ("eval", "--run", run, "--index", index, "--k", "3,10", "--queries", 50)
    done = call(*options, "--json", tmp_path / "one.json")
    assert done.exit_code == 0, done.stderr
    report = json.loads((tmp_path / "one.json").read_text())
    assert report["search"]["recall"] == {"3": 1.0, "10": 1.0}
    assert report["index"]["num_ads"] == len(AdIndex.open(index).vectors()[0]) > 40
    timing = report["search"]["index"]
    assert 0 < timing["p50_ms"] <= timing["p99_ms"]
    assert timing["queries_per_s"] > 0
    assert report["search"]["queries"] == 50
    assert "recall@10" in done.stdout


def test_users_are_drawn_from_the_first_groups(trained: TrainedRun) -> None:
    every = users_of_tests(trained, None, 10_000).vectors_KW
    few = users_of_tests(trained, None, 7).vectors_KW
    assert len(few) == 7
    assert (few[:, None] == every[: 4 * 7]).all(axis=2).any(axis=1).all()


def test_recall_is_the_share_of_the_best_that_an_index_finds(index: str) -> None:
    ads = AdIndex.open(index)
    keys, vectors = ads.vectors()
    half = np.arange(len(keys)) % 2 == 0
    ads.index = VectorIndex.build("flat", keys[half], vectors[half])  # as if it had lost the others
    queries = np.random.default_rng(0).normal(size=(40, vectors.shape[1])).astype(np.float32)
    figures = search_figures(ads, queries, [5, 20])
    for count in (5, 20):
        best = np.argsort(-(queries @ vectors.T), axis=1)[:, :count]
        assert figures["recall"][count] == pytest.approx(half[best].mean())
        assert 0.2 < figures["recall"][count] < 0.8
    assert figures["queries"] == 40


def test_ads_of_equal_vectors_are_no_misses(index: str) -> None:
    ads = AdIndex.open(index)
    keys, vectors = ads.vectors()
    vectors = np.ones_like(vectors)
    ads.vectors = lambda: (keys, vectors)  # type: ignore[method-assign]
    ads.index = VectorIndex.build("flat", keys[::-1].copy(), vectors)
    assert search_figures(ads, np.ones((4, vectors.shape[1]), np.float32), [5])["recall"] == {5: 1.0}


def test_search_for_a_user(run: Path, index: str, trained: TrainedRun, places: Places) -> None:
    user, vector = 0, None
    for batch, users in user_vectors(trained, reader_of_tests(trained, str(places.folder / "samples")).batches()):
        for sample in np.flatnonzero(batch.group_id_B == user):
            vector = users[batch.group_of_sample_B[sample]]
    keys, vectors = AdIndex.open(index).vectors()
    assert vector is not None
    expected = keys[np.argsort(-(vectors @ vector))[:4]]
    done = call("search", "--run", run, "--index", index, "--user", user, "--k", 4)
    assert done.exit_code == 0, done.stderr
    found = [int(line.split()[0]) for line in done.stdout.splitlines()[1:]]
    assert found == expected.tolist()


class TestDays:
    """Runs on days, as trainer.daily makes them: a day's file may be in train/ or in test/."""

    @pytest.fixture
    def days(self, make_places: Callable[[Path], Places], tmp_path: Path) -> Places:
        """Three days in train/, the fourth in test/."""
        places = make_places(tmp_path)
        test = places.folder / "samples" / "test"
        (test / "day=2026-01-01.parquet").rename(test / "day=2026-01-04.parquet")
        return places

    def trained_on(self, places: Places, day: str, test_days: str) -> tuple[Path, str]:
        """A run on one day, and an index of it."""
        settings = {"data__train_days": f"[{day}]", "data__test_days": test_days, "run__name": day}
        towers = {"model__base": "two_tower", "model__tower_width": 6, "train__max_steps": 3}
        train(load_config(settings=places.settings(**towers, **settings)), SoloComm())
        with contextlib.closing(open_trained(places.folder / "runs" / day, SoloComm())) as trained:
            return places.folder / "runs" / day, build_index(trained, places)

    def scores(self, run: Path, index: str, *options: object) -> dict[str, Any]:
        done = call("eval", "--run", run, "--index", index, "--k", 3, "--json", run / "figures.json", *options)
        assert done.exit_code == 0, done.stderr
        figures: dict[str, Any] = json.loads((run / "figures.json").read_text())
        assert all(f"note: {note}" in done.stdout for note in figures["notes"])
        return figures

    def test_users_are_of_its_own_test_days(self, days: Places) -> None:
        run, index = self.trained_on(days, "2026-01-02", "[2026-01-03,2026-01-04]")
        figures = self.scores(run, index)
        assert (figures["search"]["recall"], figures["notes"]) == ({"3": 1.0}, [])

    def test_the_newest_day_has_none_to_be_evaluated_on(self, days: Places) -> None:
        run, index = self.trained_on(days, "2026-01-04", "[]")
        for command in (("eval",), ("search", "--user", 1)):
            done = call(*command, "--run", run, "--index", index)
            assert (done.exit_code, "no test samples of its own" in done.stderr) == (2, True)

    def test_other_samples_need_no_training_samples(
        self, days: Places, write_samples: Callable[..., Any], tmp_path: Path
    ) -> None:
        run, index = self.trained_on(days, "2026-01-04", "[]")
        write_samples(tmp_path / "tomorrow" / "test", [30], seed=70, items=60)
        figures = self.scores(run, index, "--samples", tmp_path / "tomorrow")
        assert figures["search"]["queries"] == 30
        assert len(figures["notes"]) == 1  # items 50 to 59 have no feature
        assert "its model has never met an image without a feature" in figures["notes"][0]
