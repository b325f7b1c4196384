"""The demo: drawn clothes, a simulated shop whose clicks follow the truth, own photographs, and logs that say it."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.demo import world as truth
from pipeline.demo.items import (
    ATTRIBUTES,
    NO_LABEL,
    SHAPES,
    Garment,
    catalogue_of,
    draw_garment,
    measure,
    measure_folder,
    plan_garments,
)
from pipeline.demo.make import FIRST_CATEGORY, FIRST_ITEM, FIRST_SESSION, FIRST_USER, log_files, write_logs
from pipeline.demo.world import START_S, World, ceiling, match_of, simulate
from pipeline.errors import DemoError, SourceError
from trainer.evaluation.bootstrap import auc


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)), dtype=np.float64)


def _garment(**changes: object) -> Garment:
    fields = {
        "shape": "t-shirt",
        "hue_deg": 0.0,
        "saturation": 0.9,
        "value": 0.9,
        "pattern": "plain",
        "pattern_px": 60.0,
        "size": 0.9,
        "shift_x": 0.0,
        "shift_y": 0.0,
        "background": 0.95,
        "noise_seed": 1,
    }
    return Garment(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("hue_deg", "strongest"), [(0, 0), (120, 1), (240, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_colour_is_in_the_pixels(shape: str, hue_deg: float, strongest: int) -> None:
    cloth = _pixels(draw_garment(_garment(shape=shape, hue_deg=hue_deg))).min(axis=2) < 80
    mean = _pixels(draw_garment(_garment(shape=shape, hue_deg=hue_deg)))[cloth].mean(axis=0)
    assert mean.argmax() == strongest
    assert cloth.mean() > 0.15, "the cloth fills a good part of the picture"


DAYS = 19


@pytest.fixture(scope="module")
def world() -> World:
    return simulate(catalogue_of(plan_garments(600, 0)), num_users=1200, num_days=DAYS, seed=0)


@pytest.fixture(scope="module")
def last(world: World) -> np.ndarray:
    """Which impressions are of the test day."""
    return world.shown.day_N == DAYS - 1


def _match(world: World, day_N: np.ndarray, user_N: np.ndarray, item_N: np.ndarray) -> np.ndarray:
    """How well each row's picture fits its user's taste of that day, in standard deviations over all pairs."""
    match_N = np.empty(len(day_N))
    for day in np.unique(day_N):
        rows = day_N == day
        match_UI = match_of(world.catalogue, world.people.taste_UDK[:, day + truth.HISTORY_DAYS])
        match_N[rows] = match_UI[user_N[rows], item_N[rows]]
    return match_N


@pytest.mark.long
def test_a_tenth_of_the_last_days_ads_is_new(world: World, last: np.ndarray) -> None:
    new = np.flatnonzero(world.launch_day_I == DAYS - 1)
    assert np.isin(world.shown.item_N[last], new).mean() == pytest.approx(truth.NEW_AD_SHARE, abs=0.02)
    assert not np.isin(world.shown.item_N[~last], new).any(), "never shown before"
    assert not np.isin(world.behaviors.item_N, new).any(), "never clicked before"


def test_nothing_is_shown_or_clicked_before_it_is_on_sale(world: World) -> None:
    assert (world.launch_day_I[world.shown.item_N] <= world.shown.day_N).all()
    day_N = (world.behaviors.time_N - START_S) // truth.DAY_S
    assert (world.launch_day_I[world.behaviors.item_N] <= day_N).all()
    assert day_N.min() == -truth.HISTORY_DAYS
    assert day_N.max() == DAYS - 1


def test_organic_clicks_follow_taste_and_accidents_do_not(world: World) -> None:
    done = world.behaviors
    match_N = _match(world, (done.time_N - START_S) // truth.DAY_S, done.user_N, done.item_N)
    short = done.dwell_s_N < 5
    assert short.mean() == pytest.approx(truth.ACCIDENT_SHARE, abs=0.02)
    assert match_N[~short].mean() > 0.8, "in standard deviations over all pairs"
    assert abs(match_N[short].mean()) < 0.1
    assert (match_N[~short] < 0.5).mean() > 0.05, "imperfectly"


def test_each_part_of_the_logit_has_its_size(world: World) -> None:
    for name, sd in truth.LOGIT_PARTS.items():
        assert world.clicks.parts[name].std() == pytest.approx(sd), name
        assert abs(world.clicks.parts[name].mean()) < 1e-9, name
    assert set(truth.LOGIT_PARTS) == {*truth.PIXEL_PARTS, *truth.ID_PARTS, "noise"}
    variance = {name: part_N.var() for name, part_N in world.clicks.parts.items()}
    assert sum(variance[name] for name in truth.PIXEL_PARTS) > 0.6 * sum(variance.values())


def test_labels_follow_the_logit(world: World) -> None:
    probability_N = 1 / (1 + np.exp(-world.clicks.logit(*truth.LOGIT_PARTS)))
    assert probability_N.mean() == pytest.approx(truth.CLICK_RATE, abs=1e-6)
    order = np.argsort(probability_N)
    for rows in np.array_split(order, 10):
        expected, error = probability_N[rows].mean(), np.sqrt(0.25 / len(rows))
        assert world.clicks.label_N[rows].mean() == pytest.approx(expected, abs=4 * error)


def test_who_cannot_see_stays_far_below_the_ceiling(world: World, last: np.ndarray) -> None:
    known = {name: value or 0.0 for name, value in ceiling(world).items()}
    blind_N = world.clicks.logit(*truth.ID_PARTS)
    new = last & (world.launch_day_I[world.shown.item_N] == DAYS - 1)
    label_N = world.clicks.label_N
    assert known["auc"] > (auc(blind_N[last], label_N[last]) or 1.0) + 0.15
    assert known["new_ad_auc"] > (auc(blind_N[new], label_N[new]) or 1.0) + 0.15


def test_a_catalogue_without_variation_still_makes_a_world(world: World) -> None:
    flat = dataclasses.replace(world.catalogue, look_IK=np.zeros_like(world.catalogue.look_IK))
    dull = simulate(flat, num_users=30, num_days=3, seed=0)
    assert np.isfinite(dull.clicks.logit(*truth.LOGIT_PARTS)).all()
    assert (dull.clicks.parts["match"] == 0).all()


COLUMN = {name: index for index, name in enumerate(ATTRIBUTES)}


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
    assert measure(less)[COLUMN[attribute]] < measure(more)[COLUMN[attribute]]


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


def test_all_readable_images_become_items(folder: Path) -> None:
    catalogue, notes = measure_folder(folder, None)
    assert catalogue.uris == ("green.jpeg", "more/blue.png", "red.jpg")
    assert catalogue.category_names == (NO_LABEL,)
    assert (list(notes["unreadable"]), notes["num_unreadable"]) == (["broken.jpg"], 1)
    np.testing.assert_allclose(catalogue.look_IK.mean(axis=0), 0, atol=1e-9)
    assert catalogue.look_IK[:, COLUMN["red_green"]].argmax() == 2


def test_labels_are_found_by_path_or_name_with_or_without_extension(folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("image,label,kids\nred,dress,no\nmore/blue.png,hat,no\nelsewhere,shoe,no\n")
    catalogue, notes = measure_folder(folder, labels)
    names, category_I = catalogue.category_names, catalogue.category_I
    assert [names[category] for category in category_I] == [NO_LABEL, "hat", "dress"]
    assert notes["num_unlabelled"] == 1


def test_a_table_without_the_columns_is_refused_with_what_it_has(folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("file,label\nred,dress\n")
    with pytest.raises(DemoError, match=r"needs the columns image and label; it has file, label"):
        measure_folder(folder, labels)
    labels.write_bytes(b"image,label\n\xff\xfe,dress\n")
    with pytest.raises(DemoError, match=r"cannot read the labels .*labels\.csv"):
        measure_folder(folder, labels)
    with pytest.raises(DemoError, match="cannot read the labels"):
        measure_folder(folder, tmp_path / "none.csv")


def test_a_folder_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no images in"):
        measure_folder(tmp_path, None)
    (tmp_path / "one.jpg").write_text("no image")
    with pytest.raises(DemoError, match=r"none of the 1 images .* can be read"):
        measure_folder(tmp_path, None)


LOG_DAYS = 4


@pytest.fixture(scope="module")
def logged_world() -> World:
    return simulate(catalogue_of(plan_garments(40, 0)), num_users=50, num_days=LOG_DAYS, seed=0)


@pytest.fixture(scope="module")
def logs(logged_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    write_logs(logged_world, out)
    assert sorted((out / "logs").rglob("*.parquet")) == sorted(log_files(out, LOG_DAYS).values())
    return out / "logs"


def _seconds(column: object) -> np.ndarray:
    return column.to_numpy().astype("datetime64[s]").astype(np.int64)  # type: ignore[attr-defined]


def test_impressions_come_back(logged_world: World, logs: Path) -> None:
    table, shown = pq.read_table(logs / "impressions").sort_by("timestamp"), logged_world.shown
    order = np.argsort(shown.time_N, kind="stable")
    np.testing.assert_array_equal(_seconds(table["timestamp"]), shown.time_N[order])
    expected = {
        "user": FIRST_USER + shown.user_N,
        "session": FIRST_SESSION + shown.session_N,
        "scene": shown.scene_N,
        "item": FIRST_ITEM + shown.item_N,
        "category": FIRST_CATEGORY + logged_world.catalogue.category_I[shown.item_N],
        "label": logged_world.clicks.label_N,
        "user_age": logged_world.people.age_U[shown.user_N],
        "user_gender": logged_world.people.gender_U[shown.user_N],
    }
    rows = np.stack([table[name].to_numpy() for name in expected] + [_seconds(table["timestamp"])])
    wanted = np.stack([*expected.values(), shown.time_N])
    np.testing.assert_array_equal(_sorted_rows(rows), _sorted_rows(wanted))
    uris = [logged_world.catalogue.uris[item - FIRST_ITEM] for item in table["item"].to_pylist()]
    assert table["image"].to_pylist() == uris


def test_behaviours_come_back(logged_world: World, logs: Path) -> None:
    table, done = pq.read_table(logs / "behaviors"), logged_world.behaviors
    rows = np.stack([_seconds(table["timestamp"]), *(table[name].to_numpy() for name in ("user", "item", "dwell_s"))])
    wanted = np.stack([done.time_N, FIRST_USER + done.user_N, FIRST_ITEM + done.item_N, done.dwell_s_N])
    np.testing.assert_array_equal(_sorted_rows(rows), _sorted_rows(wanted))


def _sorted_rows(columns: np.ndarray) -> np.ndarray:
    """The columns of a (columns, rows) table with its rows in a fixed order."""
    return columns[:, np.lexsort(columns)]
