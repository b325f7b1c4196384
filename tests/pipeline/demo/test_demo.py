"""The demo: drawn clothes, a simulated shop whose clicks follow the truth, own photographs, and logs that say it."""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.demo import items
from pipeline.demo import world as truth
from pipeline.demo.make import FIRST_CATEGORY, FIRST_ITEM, FIRST_SESSION, FIRST_USER, log_files, write_logs
from pipeline.demo.world import START_S, World, ceiling, match_of, simulate
from pipeline.errors import DemoError
from pipeline.problems import Problem
from tests.raised import raises
from trainer.evaluation.bootstrap import auc

COLUMN = {name: index for index, name in enumerate(items.ATTRIBUTES)}
DAYS = 19


PLAIN = items.Garment(
    shape="t-shirt", hue_deg=0.0, saturation=0.9, value=0.9, pattern="plain", pattern_px=60.0, size=0.9, shift_x=0.0,
    shift_y=0.0, background=0.95, noise_seed=1,
)  # fmt: skip


@pytest.mark.parametrize(("hue_deg", "strongest"), [(0, 0), (120, 1), (240, 2)])
@pytest.mark.parametrize("shape", items.SHAPES)
def test_the_colour_is_in_the_pixels(shape: Any, hue_deg: float, strongest: int) -> None:
    data = items.draw_garment(dataclasses.replace(PLAIN, shape=shape, hue_deg=hue_deg))
    pixels = np.asarray(Image.open(io.BytesIO(data)), dtype=np.float64)
    cloth = pixels.min(axis=2) < 80
    assert pixels[cloth].mean(axis=0).argmax() == strongest
    assert cloth.mean() > 0.15, "the cloth fills a good part of the picture"


@pytest.fixture(scope="module")
def world() -> World:
    return simulate(items.catalogue_of(items.plan_garments(600, 0)), num_users=1200, num_days=DAYS, seed=0)


@pytest.mark.long
def test_a_tenth_of_the_last_days_ads_is_new_and_none_is_seen_before_its_day(world: World) -> None:
    last, new = world.shown.day_N == DAYS - 1, np.flatnonzero(world.launch_day_I == DAYS - 1)
    assert np.isin(world.shown.item_N[last], new).mean() == pytest.approx(truth.NEW_AD_SHARE, abs=0.02)
    assert not np.isin(world.shown.item_N[~last], new).any(), "never shown before"
    assert not np.isin(world.behaviors.item_N, new).any(), "never clicked before"
    assert (world.launch_day_I[world.shown.item_N] <= world.shown.day_N).all()
    day_N = (world.behaviors.time_N - START_S) // truth.DAY_S
    assert (world.launch_day_I[world.behaviors.item_N] <= day_N).all()
    assert day_N.min() == -truth.HISTORY_DAYS
    assert day_N.max() == DAYS - 1


def test_organic_clicks_follow_taste_and_accidents_do_not(world: World) -> None:
    """By how well each picture fits its user's taste of that day, in standard deviations over all pairs."""
    done = world.behaviors
    day_N, match_N = (done.time_N - START_S) // truth.DAY_S, np.empty(len(done.user_N))
    for day in np.unique(day_N):
        rows = day_N == day
        match_UI = match_of(world.catalogue, world.people.taste_UDK[:, day + truth.HISTORY_DAYS])
        match_N[rows] = match_UI[done.user_N[rows], done.item_N[rows]]
    short = done.dwell_s_N < 5
    assert short.mean() == pytest.approx(truth.ACCIDENT_SHARE, abs=0.02)
    assert match_N[~short].mean() > 0.8
    assert abs(match_N[short].mean()) < 0.1
    assert (match_N[~short] < 0.5).mean() > 0.05, "imperfectly"


def test_labels_follow_the_logit_and_who_cannot_see_stays_far_below_the_ceiling(world: World) -> None:
    for name, sd in truth.LOGIT_PARTS.items():
        assert world.clicks.parts[name].std() == pytest.approx(sd), name
        assert abs(world.clicks.parts[name].mean()) < 1e-9, name
    assert set(truth.LOGIT_PARTS) == {*truth.PIXEL_PARTS, *truth.ID_PARTS, "noise"}
    variance = {name: part_N.var() for name, part_N in world.clicks.parts.items()}
    assert sum(variance[name] for name in truth.PIXEL_PARTS) > 0.6 * sum(variance.values())
    probability_N = 1 / (1 + np.exp(-world.clicks.logit(*truth.LOGIT_PARTS)))
    assert probability_N.mean() == pytest.approx(truth.CLICK_RATE, abs=1e-6)
    order = np.argsort(probability_N)
    for rows in np.array_split(order, 10):
        expected, error = probability_N[rows].mean(), np.sqrt(0.25 / len(rows))
        assert world.clicks.label_N[rows].mean() == pytest.approx(expected, abs=4 * error)
    known = {name: value or 0.0 for name, value in ceiling(world).items()}
    blind_N = world.clicks.logit(*truth.ID_PARTS)
    last = world.shown.day_N == DAYS - 1
    new = last & (world.launch_day_I[world.shown.item_N] == DAYS - 1)
    label_N = world.clicks.label_N
    assert known["auc"] > (auc(blind_N[last], label_N[last]) or 1.0) + 0.15
    assert known["new_ad_auc"] > (auc(blind_N[new], label_N[new]) or 1.0) + 0.15


def test_a_catalogue_without_variation_still_makes_a_world(world: World) -> None:
    flat = dataclasses.replace(world.catalogue, look_IK=np.zeros_like(world.catalogue.look_IK))
    dull = simulate(flat, num_users=30, num_days=3, seed=0)
    assert np.isfinite(dull.clicks.logit(*truth.LOGIT_PARTS)).all()
    assert (dull.clicks.parts["match"] == 0).all()


def _plain(red: int, green: int, blue: int) -> Image.Image:
    return Image.new("RGB", (120, 90), (red, green, blue))


def _noise(contrast: float, grain_px: int = 1) -> Image.Image:
    rng = np.random.default_rng(0)
    grey = 128 + contrast * rng.standard_normal((96 // grain_px, 96 // grain_px))
    grey = np.kron(grey, np.ones((grain_px, grain_px)))
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize(
    ("attribute", "less", "more"),
    [
        ("red_green", _plain(40, 200, 90), _plain(200, 40, 90)),
        ("yellow_blue", _plain(60, 60, 200), _plain(200, 200, 40)),
        ("light", _plain(60, 60, 60), _plain(220, 220, 220)),
        ("vivid", _plain(140, 120, 120), _plain(250, 20, 20)),
        ("contrast", _noise(5), _noise(60)),
        ("texture", _noise(30, grain_px=16), _noise(30)),
    ],
)
def test_each_attribute_grows_with_what_it_is_named_after(attribute: str, less: Image.Image, more: Image.Image) -> None:
    assert items.measure(less)[COLUMN[attribute]] < items.measure(more)[COLUMN[attribute]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "photos"
    (images / "more").mkdir(parents=True)
    _plain(200, 40, 40).save(images / "red.jpg")
    _plain(40, 40, 200).save(images / "more" / "blue.png")
    _plain(40, 200, 40).save(images / "green.jpeg")
    (images / "broken.jpg").write_text("no image")
    (images / "notes.txt").write_text("no image either")
    return images


def test_readable_images_become_items_with_labels_by_path_or_name(folder: Path, tmp_path: Path) -> None:
    catalogue, notes = items.measure_folder(folder, None)
    assert catalogue.uris == ("green.jpeg", "more/blue.png", "red.jpg")
    assert catalogue.category_names == (items.NO_LABEL,)
    assert (list(notes["unreadable"]), notes["num_unreadable"]) == (["broken.jpg"], 1)
    np.testing.assert_allclose(catalogue.look_IK.mean(axis=0), 0, atol=1e-9)
    assert catalogue.look_IK[:, COLUMN["red_green"]].argmax() == 2
    labels = tmp_path / "labels.csv"
    labels.write_text("image,label,kids\nred,dress,no\nmore/blue.png,hat,no\nelsewhere,shoe,no\n")
    catalogue, notes = items.measure_folder(folder, labels)
    names, category_I = catalogue.category_names, catalogue.category_I
    assert [names[category] for category in category_I] == [items.NO_LABEL, "hat", "dress"]
    assert notes["num_unlabelled"] == 1
    for content, problem, values in (
        (b"file,label\nred,dress\n", Problem.NO_LABEL_COLUMNS, {"value": "file, label"}),
        (b"image,label\n\xff\xfe,dress\n", Problem.REFUSED, {"action": "read"}),
    ):
        labels.write_bytes(content)
        with raises(DemoError, problem, where=labels, **values):
            items.measure_folder(folder, labels)
    with raises(DemoError, Problem.REFUSED, action="read", where=tmp_path / "none.csv"):
        items.measure_folder(folder, tmp_path / "none.csv")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "one.jpg").write_text("no image")
    with raises(DemoError, Problem.NO_READABLE_IMAGE, count=1, where=tmp_path / "none"):
        items.measure_folder(tmp_path / "none", None)


def _rows(columns: Mapping[str, np.ndarray]) -> list[tuple[Any, ...]]:
    return sorted(zip(*(values.tolist() for values in columns.values()), strict=True))


def test_impressions_and_behaviours_come_back(tmp_path: Path) -> None:
    world = simulate(items.catalogue_of(items.plan_garments(40, 0)), num_users=50, num_days=4, seed=0)
    write_logs(world, tmp_path)
    assert sorted((tmp_path / "logs").rglob("*.parquet")) == sorted(log_files(tmp_path, 4).values())
    shown, done, people, catalogue = world.shown, world.behaviors, world.people, world.catalogue
    of_impressions = {
        "session": FIRST_SESSION + shown.session_N, "scene": shown.scene_N, "label": world.clicks.label_N,
        "user_age": people.age_U[shown.user_N], "user_gender": people.gender_U[shown.user_N],
    }  # fmt: skip
    for log, rows, own in (("impressions", shown, of_impressions), ("behaviors", done, {"dwell_s": done.dwell_s_N})):
        expected = own | {
            "timestamp": rows.time_N, "user": FIRST_USER + rows.user_N, "item": FIRST_ITEM + rows.item_N,
            "category": FIRST_CATEGORY + catalogue.category_I[rows.item_N],
            "image": np.array(catalogue.uris)[rows.item_N],
        }  # fmt: skip
        table = pq.read_table(tmp_path / "logs" / log)
        found = {name: table[name].to_numpy() for name in expected}
        found["timestamp"] = found["timestamp"].astype("datetime64[s]").astype(np.int64)
        assert _rows(found) == _rows(expected)
