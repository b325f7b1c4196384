"""benchmarks.quality in a small form: both sides learn the same rows, and every figure is kept for the next call."""

import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from rich.progress import Progress

from benchmarks.problems import Problem
from benchmarks.process import fuxictr_python
from benchmarks.quality import compare, heldout
from benchmarks.quality.__main__ import app
from benchmarks.quality.compare import Bench
from benchmarks.quality.data import DataSet, parse
from benchmarks.quality.heldout import JUDGED, hold_out, sampled
from benchmarks.quality.rows import Layout, Rows, Vocabulary, read, vocabularies, write_pretrained
from benchmarks.quality.runs import Spec
from tests.cli import figures_of
from tests.raised import raises, told
from tests.trainer.conftest import make_days
from trainer.config import load_config
from trainer.errors import DataError
from trainer.schema.fields import DEFAULT_SCHEMA, file_of_month, load_schema

ITEMS = 50
DAYS = [f"2026-01-0{day}" for day in range(1, 5)]
needs_fuxictr = pytest.mark.skipif(not fuxictr_python().exists(), reason="FuxiCTR is not installed here")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of four days, of which the last is the test, and a store of the items' features."""
    return make_days(tmp_path_factory.mktemp("quality")).folder


def figures_at(place: Path, *words: object) -> dict[str, Any]:
    tiny = ["--data", f"tiny={place / 'samples'}:{place / 'features'}", "--batch-size", 32, "--epochs", 3]
    return figures_of(app, place, *tiny, "--dir", place / "bench", *words)


@pytest.mark.slow
@needs_fuxictr
def test_both_sides_learn_and_figures_are_kept(place: Path) -> None:
    call = ("--only", "ids", "--net", "dnn", "--net", "din", "--seeds", "1", "--no-tune", "--set", "optim.lr=0.01")
    figures = figures_at(place, *call)
    for name in (f"ids_tiny_{net}_{side}" for net in ("dnn", "din") for side in compare.SIDES):
        assert figures[f"{name}_best"] == max(figures[f"{name}_epoch{epoch}"] for epoch in (1, 2, 3))
        assert figures[f"{name}_s_per_epoch"] > 0
    assert figures["ids_tiny_dnn_ours_best"] > 0.6, "people click on even items"
    for goal in ("epoch1", "best"):
        sides = [[figures[f"ids_tiny_{net}_{side}_{goal}"] for net in ("dnn", "din")] for side in compare.SIDES]
        assert figures[f"gauc_vs_fuxictr_{goal}"] == pytest.approx(np.mean(sides[0]) - np.mean(sides[1]))
    kept = {file: file.stat().st_mtime_ns for file in (place / "bench" / "figures").iterdir()}
    assert len(kept) == 4
    assert figures_at(place, *call) == figures
    assert {file: file.stat().st_mtime_ns for file in (place / "bench" / "figures").iterdir()} == kept


@pytest.mark.slow
@needs_fuxictr
def test_with_images_and_tuned(place: Path) -> None:
    figures = figures_at(place, "--only", "images", "--net", "dnn", "--seeds", "2", "--epochs", "1")
    assert figures["gauc_images_vs_fuxictr"] == figures["gauc_images_vs_fuxictr_best_tiny"]
    assert figures["gauc_images_vs_fuxictr_best_tiny_half_width"] > 0
    specs = [json.loads(file.read_text())["spec"] for file in (place / "bench" / "figures").iterdir()]
    tuned = [spec for spec in specs if spec["store"] and spec["train_days"]]
    days = [[spec["train_days"], spec["test_days"]] for spec in tuned]
    assert days == [[DAYS[:2], DAYS[2:3]]] * len(days), "the test day takes no part in the choice"
    assert len(tuned) == sum(len(compare.grid_of(side)) for side in compare.SIDES)


def test_days_are_cut_by_their_impressions(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Then of ten days with ten impressions each: the last is left out, the one before it is for validation."""
    assert compare.cut_days(place / "samples") == (DAYS[:2], DAYS[2:3], DAYS[3:])
    (tmp_path / "train").mkdir()
    shutil.copy(place / "samples" / "train" / f"day={DAYS[0]}.parquet", tmp_path / "train")
    with raises(DataError, Problem.TOO_FEW_DAYS, where=tmp_path, value=1):
        compare.cut_days(tmp_path)
    with raises(DataError, Problem.TOO_FEW_TO_TUNE, where=tmp_path, value=1):
        parse(f"one={tmp_path}", 1).tuning_days()
    days = [f"2026-01-{day:02}" for day in range(1, 11)]
    monkeypatch.setattr(compare, "impressions_by_day", lambda _: dict.fromkeys(days, 10))
    assert compare.cut_days(place / "samples") == (days[:8], days[8:9], days[9:])
    for rows, trained in ((3, days[7:8]), (25, days[6:8]), (1000, days[:8])):
        assert compare.cut_days(place / "samples", rows)[0] == trained


def test_days_that_share_a_file_are_counted_apart(place: Path, tmp_path: Path) -> None:
    files = sorted((place / "samples").glob("*/*.parquet"), key=lambda file: file.name)
    days = [pq.read_table(file, partitioning=None) for file in files]
    (tmp_path / "train").mkdir()
    with pq.ParquetWriter(tmp_path / "train" / file_of_month(DAYS), days[0].schema) as writer:
        for table in days:
            writer.write_table(table)
    assert compare.impressions_by_day(tmp_path) == compare.impressions_by_day(place / "samples")
    assert len(compare.impressions_by_day(tmp_path)) == len(DAYS)


def test_figures_by_log_and_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best epoch is that of the validation days."""
    curve = [{"gauc": gauc, "left_out_gauc": other} for gauc, other in ((0.6, 0.7), (0.8, 0.5), (0.7, 0.9))]
    assert compare.of_goal(curve, "best", compare.METRIC) == 0.5
    assert compare.of_goal(curve, "epoch1", compare.METRIC) == 0.7
    epoch, better = {"gauc": 0.6, "left_out_gauc": 0.7}, {"gauc": 0.5, "left_out_gauc": 0.8}
    found = {side: [[epoch] * 4] for side in itertools.product("ab", ("dnn", "din"), compare.SIDES)}
    found["a", "dnn", "ours"] = [[better] * 4]
    monkeypatch.setattr(compare, "curves", lambda *_, **__: found)
    sections = compare.logs_section(Bench([], tmp_path, ["dnn", "din"], range(1), 4, True, Progress()))
    figures = {name: value for section in sections for name, value in section.flat().items()}
    for goal in ("epoch1", "epoch2", "epoch4", "best"):
        assert figures[f"gauc_left_out_{goal}_a"] == pytest.approx(0.05)
        assert figures[f"gauc_left_out_{goal}_worst"] == figures[f"gauc_left_out_{goal}_b"] == 0
        assert figures[f"gauc_left_out_{goal}"] == figures[f"gauc_left_out_tuned_{goal}"] == pytest.approx(0.025)
        assert figures[f"left_out_a_dnn_{goal}"] == pytest.approx(0.1)
    assert figures["left_out_a_dnn_ours_best"] == 0.8


def test_a_log_has_the_schema_of_its_samples(place: Path, tmp_path: Path) -> None:
    samples = shutil.copytree(place / "samples", tmp_path / "log" / "logs" / "samples")
    (samples / "summary.json").write_text(json.dumps({"options": {"window_days": compare.WINDOW_DAYS}}))
    assert (compare.real_log(samples.parent, 32).name, compare.real_log(samples.parent, 32).schema) == ("log", None)
    shutil.copy(DEFAULT_SCHEMA, samples / "schema.yaml")
    assert compare.real_log(samples.parent, 32).schema == str(samples / "schema.yaml")


@pytest.mark.slow
@needs_fuxictr
def test_both_sides_are_measured_on_the_days_left_out(place: Path, tmp_path: Path) -> None:
    """Of a log with a schema of its own, which is what tools/real_logs.py and its job leave; logs/ is a demo's."""
    samples = shutil.copytree(place / "samples", tmp_path / "log" / "logs" / "samples")
    shutil.copy(DEFAULT_SCHEMA, samples / "schema.yaml")
    (samples / "summary.json").write_text(json.dumps({"options": {"window_days": compare.WINDOW_DAYS}}))
    words = ["--net", "dnn", "--seeds", 1, "--epochs", 2, "--batch-size", 32, "--set", "optim.lr=0.01"]
    figures = figures_of(app, tmp_path, "--logs", samples.parent, "--dir", tmp_path / "bench", *words)
    assert figures["left_out_log_dnn_ours_best"] > 0.6, "people click on even items"
    assert figures["left_out_tuned_log_dnn_ours_best"] > 0.6
    kept = [json.loads(file.read_text()) for file in (tmp_path / "bench" / "figures").iterdir()]
    assert [each["spec"]["left_out_days"] for each in kept] == [DAYS[3:]] * len(kept)
    shown = {(each["curve"][0]["impressions"], each["curve"][0]["left_out_impressions"]) for each in kept}
    assert len(shown) == 1, "both sides have the same rows"


def test_rows_are_those_of_the_samples(place: Path) -> None:
    schema = load_schema(None)
    layout = Layout.of(schema)
    assert [ad.name for _, ad in layout.items] == ["ad_item", "ad_category", "ad_image_id"]
    assert [field.name for field in layout.rest] == ["user", "ad_scene"]
    batch = read(str(place / "samples"), "train", schema, None)
    known = vocabularies(batch, [field for pair in layout.items for field in pair] + list(layout.rest))
    rows = Rows.of(batch, layout, known)
    table = pa.concat_tables([pq.read_table(file) for file in sorted((place / "samples/train").iterdir())])
    item_N = table.column("ad_item").combine_chunks().flatten().to_numpy()
    assert (known["item"].known_V[rows.ad_B["ad_item"] - 1] == item_N).all()
    assert (rows.label_B == table.column("label").combine_chunks().flatten().to_numpy()).all()
    history = table.column("behavior_item").to_pylist()
    for items_L, history_L in zip(history, rows.history_GL["ad_item"], strict=True):
        assert known["item"].known_V[history_L[: len(items_L)] - 1].tolist() == items_L
        assert (history_L[len(items_L) :] == 0).all()
    assert rows.group_B[[0, -1]].tolist() == [0, len(history) - 1]


def test_ids_that_training_lacks_share_a_number_as_their_pretrained_features_do(tmp_path: Path) -> None:
    known = Vocabulary.of([np.array([7, 3]), np.array([3])])
    assert known.numbers(np.array([3, 7, 5, 9])).tolist() == [1, 2, 3, 3]
    assert known.size == 4
    keys = np.array([-3, 7])
    write_pretrained(tmp_path, "ad_image", keys, np.eye(2, dtype=np.float32))
    numbers = json.loads((tmp_path / "feature_vocab.json").read_text())["ad_image"]
    assert [numbers[str(key)] for key in keys] == Vocabulary(keys).numbers(keys).tolist()
    with np.load(tmp_path / "features.npz") as file:
        assert file["key"].tolist() == keys.tolist() and file["value"].tolist() == [[1, 0], [0, 1]]


def test_different_rows_and_wrong_data_sets_are_refused() -> None:
    epoch = {"impressions": 3, "clicks": 1, "gauc_impressions": 3}
    with pytest.raises(AssertionError, match="measured different rows"):
        compare.check_same_rows({("a", "dnn", "ours"): [[epoch]], ("a", "dnn", "fuxictr"): [[{**epoch, "clicks": 2}]]})
    for text in ("samples", "=samples", "a=", "a b=samples"):
        with pytest.raises(ValueError, match=told(Problem.NOT_NAMED_SAMPLES, value=text)):
            parse(text, 1)


def test_a_run_is_known_by_the_defaults_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(side="ours", net="dnn", samples=str(place / "samples"), batch_size=64, epochs=1, seed=0)
    before = spec.digest()
    assert replace(spec, seed=1).digest() != before
    assert replace(spec, threads=2).digest() == before
    other = load_config(settings=["optim.lr=0.5"])
    monkeypatch.setattr("benchmarks.quality.runs.load_config", lambda *_: other)
    assert spec.digest() != before


def test_key_and_seed_decide_what_is_sampled() -> None:
    keys = np.arange(20_000)
    masks = [sampled(keys, share, seed=3) for share in (0.0, 0.1, 0.5, 1.0)]
    assert [mask.mean() for mask in masks] == pytest.approx([0, 0.1, 0.5, 1], abs=0.01)
    assert (sampled(keys[::-1], 0.3, seed=1)[::-1] == sampled(keys, 0.3, seed=1)).all()
    # Of two seeds: chosen by both are 0.3 x 0.3.
    assert (sampled(keys, 0.3, seed=1) & sampled(keys, 0.3, seed=2)).mean() == pytest.approx(0.09, abs=0.01)


def test_held_out_items_are_nowhere_in_training(place: Path, tmp_path: Path) -> None:
    hold_out(place / "samples", tmp_path / "out", 0.3)
    gone = set(np.arange(ITEMS)[sampled(np.arange(ITEMS), 0.3, 0)].tolist())
    assert 3 < len(gone) < 18
    before = pq.read_table(place / "samples/train").to_pylist()
    after = {(row["user"], n): row for n, row in enumerate(pq.read_table(tmp_path / "out/train").to_pylist())}
    names, expected = ["ad_item", "ad_image", "ad_category", "ad_scene", "label"], []
    for row in before:
        ads = [n for n, item in enumerate(row["ad_item"]) if item not in gone]
        seen = [n for n, item in enumerate(row["behavior_item"]) if item not in gone]
        if ads:
            own = {name: [row[name][n] for n in ads] for name in names}
            own |= {name: [row[name][n] for n in seen] for name in row if name.startswith("behavior_")}
            expected.append({**row, **own})
    assert list(after.values()) == expected
    of_test, asked, judged = (
        Counter(pc.list_flatten(pq.read_table(each / "test", columns=["ad_item"])["ad_item"]).to_pylist())
        for each in (place / "samples", tmp_path / "out", tmp_path / "out" / JUDGED)
    )
    assert asked & judged == Counter({item: n for item, n in of_test.items() if item not in gone})
    assert asked | judged == of_test
    assert gone & set(asked) and gone & set(judged)


@pytest.mark.slow
def test_the_section_of_held_out_items(place: Path, tmp_path: Path) -> None:
    found = figures_at(place, "--only", "cold", "--seeds", 2, "--dir", tmp_path)
    gain = found["cold_auc_tiny_images"] - found["cold_auc_tiny_ids"]
    assert found["cold_auc_images_minus_ids"] == pytest.approx(gain)
    assert len(list((tmp_path / "figures").iterdir())) == 4


def test_other_samples_of_the_same_name_are_held_out_anew(place: Path, tmp_path: Path) -> None:
    shorter = shutil.copytree(place / "samples", tmp_path / "samples")
    next(iter(sorted((shorter / "train").iterdir()))).unlink()
    bench = Bench([], tmp_path / "kept", ["dnn"], range(1), 1, False, Progress())
    made = [
        heldout.specs(bench, DataSet("small", str(samples), None, 64))["ids"].samples
        for samples in (place / "samples", shorter, place / "samples")
    ]
    assert made[0] == made[2] != made[1]
    assert [len(list((Path(each) / "train").iterdir())) for each in made[:2]] == [3, 2]
