"""Tables of variants and seeds: the files that come with them, runs that are made once, and their figures."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from benchmarks.problems import Problem
from benchmarks.tables.__main__ import app
from benchmarks.tables.runs import Runner, section_of
from benchmarks.tables.variants import Table, Variant, load_tables
from featurestore.format.datafile import FeatureRows
from featurestore.store import FeatureStore
from tests.cli import invoke
from tests.pages import check_page
from tests.raised import told
from tests.trainer.conftest import change_column, make_places
from tests.trainer.whole_runs import report_of
from trainer.comm import SoloComm
from trainer.config import load_config
from trainer.errors import ConfigError
from trainer.problems import Problem as TrainerProblem

FOLDER = Path(__file__).parents[2] / "benchmarks" / "tables"
PAPER = FOLDER / "paper.yaml"
TWO = {"ids only": Variant(settings={"model.images": "none"}), "with images": Variant(paper_gauc=0.6225)}
TOWERS = Table(title="towers", settings={"model.base": "two_tower"}, variants=TWO)


def call(*words: object, out: Path, settings: list[str]) -> Result:
    options = [word for setting in settings for word in ("--set", setting)]
    return invoke(app, *words, "--dir", out, *options)


def reports(folder: Path) -> dict[str, int]:
    """The finished runs, and when each of them ended."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("runs/*/report.json")}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_variant_that_comes_with_it_is_a_valid_configuration(file: Path) -> None:
    for table in load_tables(file).values():
        for name, variant in table.variants.items():
            both = {**table.settings, **variant.settings}
            load_config(settings=[f"{setting}={value}" for setting, value in both.items()])
            assert table.baseline_of(name) in table.variants


def test_gains_are_paired_by_seed() -> None:
    variants = {"base": Variant(paper_gauc=0.6), "a": Variant(), "b": Variant(against="a")}
    gaucs = {"base": [0.60, 0.62, 0.61], "a": [0.61, 0.635, 0.62], "b": [0.60, 0.64, 0.62]}
    metrics = {name: [{"gauc": each, "auc": 2 * each} for each in values] for name, values in gaucs.items()}
    grid = section_of("t", Table(title="T", variants=variants), metrics).grid
    assert "gain" not in grid["base"] and grid["base"]["paper_gauc"] == 0.6
    assert grid["a"]["gain"] == pytest.approx(0.035 / 3) and grid["b"]["gain"] == pytest.approx(-0.005 / 3)
    assert grid["a"]["auc"] == pytest.approx(2 * np.mean(gaucs["a"])) and "logloss" not in grid["a"]
    assert all(0 < float(grid[name]["p"] or 0) <= 1 and float(grid[name]["gain_95"] or 0) > 0 for name in "ab")


def test_a_wrong_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    no_such = told(Problem.NO_SUCH_VARIANT, where=file, table="a", value="y")
    for text, says in [
        ("tables: {a: {title: t, variants: {x: {setings: {}}}}}", "setings"),
        ("tables: {a: {title: t, variants: {x: {against: y}}}}", no_such),
        ("[]", told(TrainerProblem.SETTINGS_NOT_A_MAPPING, where=file)),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=says):
            load_tables(file)


@pytest.mark.long
def test_runs_are_made_once(tmp_path: Path) -> None:
    settings = make_places(tmp_path / "places").settings(train__max_steps=3)
    page, file = tmp_path / "page.html", tmp_path / "file.json"
    words = (PAPER, "--table", "prerank", "--table", "warmup", "--seeds", 2, "--json", file)
    done = call(*words, "--html", page, out=tmp_path, settings=settings)
    assert done.exit_code == 0, done.output
    made, found = reports(tmp_path), json.loads(file.read_text())
    assert len(made) == 2 * 2 + 2 * (1 + 2)
    assert found["prerank_with images_paper_gauc"] == 0.6225 and found["warmup_partial_gauc_95"] is not None
    gain = found["prerank_with images_gauc"] - found["prerank_ids only_gauc"]
    assert found["prerank_with images_gain"] == pytest.approx(gain)
    tested = [load_config(path / "config.yaml").data.test_days for path in (tmp_path / "runs").iterdir()]
    assert len({each[0] for each in tested if each}) == 2  # the run before is tested a day earlier
    read = check_page(page.read_text(encoding="utf-8"))
    assert read.value("with images")[0] == f"{found['prerank_with images_gauc']:.4g}"
    assert not any("step 0 of 3" in each for each in read.texts), "what the runs print is in their logs"
    slower = [*settings, "train.checkpoint_every=2", "run.deadline_s=99"]
    again = call(*words, out=tmp_path, settings=slower)
    assert again.exit_code == 0 and reports(tmp_path) == made
    assert json.loads(file.read_text()) == found


def put_another(store: FeatureStore) -> None:
    store.put(FeatureRows.of(["new"], np.zeros((1, 16), np.float32), keys=np.array([2_000])))


@pytest.mark.long
def test_names_are_of_samples_snapshot_and_settings(tmp_path: Path) -> None:
    places = make_places(tmp_path)

    def names(**changes: Any) -> list[str]:
        """Of a run without images and of one with them."""
        runner = Runner(tmp_path / "out", None, tuple(places.settings(**changes)), SoloComm())
        return [runner.plan(TOWERS, each, 0).folder.name for each in TWO.values()]

    before = names()
    assert names() == before
    assert names(train__seed=5) == before  # --seeds sets it
    for change in ({"data__global_batch_size": 64}, {"run__warm_start": "elsewhere"}):
        assert set(names(**change)).isdisjoint(before)
    store = FeatureStore.open(tmp_path / "features")
    put_another(store)
    new = names()
    assert new[0] == before[0] and new[1] != before[1]
    assert names(data__store_version=1)[1] == before[1]
    shutil.rmtree(tmp_path / "features")
    put_another(FeatureStore.create(tmp_path / "features", store.info))
    assert names(data__store_version=1)[1] != before[1]  # another store in its place
    new = names()
    file = tmp_path / "samples" / "test" / "day=2026-01-01.parquet"
    change_column(file, "user", lambda users: [at * 10**9 for at, _ in enumerate(users)])
    other = names()
    assert other[0] != new[0] and other[1] != new[1]  # as many samples, other bytes


@pytest.mark.long
def test_all_runs_of_a_call_learn_from_one_snapshot(tmp_path: Path) -> None:
    places = make_places(tmp_path)
    runner = Runner(tmp_path / "out", None, tuple(places.settings(train__max_steps=1)), SoloComm())
    runs = [runner.plan(TOWERS, TWO["with images"], seed) for seed in (0, 1)]
    put_another(FeatureStore.open(tmp_path / "features"))
    for run in runs:
        runner.metrics(run)
    assert [report_of(run.folder)["store_version"] for run in runs] == [1, 1]


@pytest.mark.long
def test_days_and_clicks_that_a_variant_lacks_are_told(tmp_path: Path) -> None:
    """In one line, before the first run where it can be known by then."""
    places, out = make_places(tmp_path), tmp_path / "out"
    settings = places.settings(train__max_steps=1)
    file = tmp_path / "samples" / "test" / "day=2026-01-01.parquet"
    change_column(file, "label", lambda rows: [[0] * len(row) for row in rows])
    for _ in range(2):  # also of a run that is found again
        done = call(PAPER, "--table", "images", "--seeds", 1, out=out, settings=settings)
        assert done.exit_code == 1 and re.search(told(Problem.NO_GAUC), done.output)
    assert len(reports(out)) == 1
    (tmp_path / "samples" / "train" / "day=2026-01-03.parquet").unlink()
    done = call(PAPER, "--seeds", 1, out=tmp_path / "none", settings=settings)
    assert done.exit_code == 1 and re.search(told(Problem.TOO_FEW_TO_WARM_UP, value=2), done.output)
    assert not (tmp_path / "none").exists()
