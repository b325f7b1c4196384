"""Impressions, clicks, categories and prices of images in test samples, against plain loops over the files."""

import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from explorer.data import ads
from explorer.data.ads import ad_figures, begin, count_ads, nothing_known
from explorer.data.background import Background, Task
from explorer.data.impressions.impression_list import _firsts
from explorer.places import Places
from explorer.problems import Problem
from tests.explorer.world import World
from trainer.comm import SoloComm
from trainer.runs.saved import read_run
from trainer.samples.columns import ColumnRows
from trainer.samples.index import open_index
from trainer.samples.survey import write_part
from trainer.schema.fields import Field, Schema, load_schema

SCHEMA = load_schema()


def test_figures_are_those_of_a_loop_over_the_samples(world: World) -> None:
    found = count_ads(open_index(SoloComm(), str(world.samples), "test", SCHEMA), SCHEMA)
    shown, clicked = Counter[int](), Counter[int]()
    category: dict[int, str] = {}
    for group in pq.read_table(world.samples / "test", partitioning=None).to_pylist():
        for image, label, of in zip(group["ad_image"], group["label"], group["ad_category"], strict=True):
            shown[image] += 1
            clicked[image] += label
            category[image] = str(of)
    keys = found.keys_I.tolist()
    assert keys == sorted(shown)
    assert found.impressions_I.tolist() == [shown[key] for key in keys]
    assert found.clicks_I.tolist() == [clicked[key] for key in keys]
    assert found.category_I.tolist() == [category[key] for key in keys]
    assert np.isnan(found.price_I).all() and found.note == ""
    key = keys[3]
    some = found.of(np.array([key, 5, key, 2**62]))
    assert some.impressions_I.tolist() == [shown[key], 0, shown[key], 0]
    assert some.category_I.tolist() == [category[key], "", category[key], ""]
    assert some.ctrs[0] == pytest.approx(clicked[key] / shown[key]) and np.isnan(some.ctrs[1])


@pytest.mark.parametrize("name", ["ad_price", "ad_Preis"])
def test_prices_are_means_and_nulls_do_not_count(world: World, tmp_path: Path, name: str) -> None:
    table = pq.read_table(world.samples / "test", partitioning=None)
    lists, drawn, of = table["ad_image"].to_pylist(), np.random.default_rng(0), defaultdict(list)
    prices = [[None if drawn.random() < 0.3 else float(drawn.integers(1, 9)) for _ in each] for each in lists]
    for images, each in zip(lists, prices, strict=True):
        for image, price in zip(images, each, strict=True):
            of[image] += [] if price is None else [price]
    (tmp_path / "test").mkdir()
    table = table.append_column(name, pa.array(prices, pa.list_(pa.float64())))
    pq.write_table(table, tmp_path / "test" / "day=2026-01-05.parquet", row_group_size=20)
    priced = Schema(**dict(SCHEMA) | {"fields": (*SCHEMA.fields, Field(name=name, side="ad", kind="dense"))})
    found = count_ads(open_index(SoloComm(), str(tmp_path), "test", SCHEMA), priced)
    expected = [np.mean(of[key]) if of[key] else np.nan for key in found.keys_I.tolist()]
    assert found.price_I.tolist() == pytest.approx(expected, nan_ok=True)


def test_beyond_the_bound_samples_are_thinned(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_index(SoloComm(), str(world.samples), "test", SCHEMA)
    assert count_ads(index, SCHEMA).impressions_I.sum() == index.num_samples
    monkeypatch.setattr(ads, "MOST_IMPRESSIONS", index.num_samples // 2)
    part = count_ads(index, SCHEMA)
    assert "of about" in part.note
    assert 0.3 < part.impressions_I.sum() / index.num_samples < 0.7


def test_figures_are_counted_once_for_the_same_files(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = read_run(world.runs / "both", None, str(world.samples))
    first = ad_figures(saved, str(world.samples), Task())
    monkeypatch.setattr(ads, "count_ads", None)  # they are not read again
    again = ad_figures(saved, str(world.samples), Task())
    for name in ("keys_I", "impressions_I", "clicks_I", "category_I"):
        assert getattr(again, name).tolist() == getattr(first, name).tolist()


def test_categories_are_named_as_the_logs_name_them(world: World, tmp_path: Path) -> None:
    saved = read_run(world.runs / "both", None, str(world.samples))
    plain = ad_figures(saved, str(world.samples), Task())
    samples = shutil.copytree(world.samples, tmp_path / "samples")
    known = {int(text): f"shelf {text}" for text in sorted(set(plain.category_I))[1:]}
    write_part(samples / "ids.parquet", known)
    found = ad_figures(saved, str(samples), Task()).category_I.tolist()
    assert found == [known.get(int(text), text) for text in plain.category_I] and len(known) > 1


def test_without_runs_or_samples_nothing_is_known_and_it_says_why(world: World, tmp_path: Path) -> None:
    with closing(Background()) as background:
        assert begin(Places(store=str(world.store)), background).result().note == Problem.NEEDS_RUNS
        (tmp_path / "empty").mkdir()
        found = begin(world.places(samples=tmp_path / "empty"), background).result()
        assert found.note.startswith("CTR cannot be shown: ")
        assert found.of(np.array([1, 2])).impressions_I.tolist() == [0, 0]
        assert nothing_known("").of(np.array([3])).category_I.tolist() == [""]
        whole = begin(world.places(), background)
        assert whole is begin(world.places(), background)
        assert whole.result().impressions_I.sum() > 0


def test_a_page_waits_for_no_torch(world: World) -> None:
    program = f"""
import sys
from explorer.data.ads import begin
from explorer.places import Places

class Waiting:
    def task(self, name, work):
        return name

begin(Places(store={str(world.store)!r}, runs={str(world.runs)!r}), Waiting())
assert "trainer.config" in sys.modules
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_first_value_of_each_row_and_0_of_an_empty_one() -> None:
    values, offsets = np.array([7, 8, 9]), np.array([0, 2, 2, 3, 3])
    assert _firsts(ColumnRows(values, offsets)).tolist() == [7, 0, 9, 0]
    assert _firsts(ColumnRows(values, None)).tolist() == [7, 8, 9]
