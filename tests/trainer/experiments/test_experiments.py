"""Experiments: statistics against scipy, every variant's settings, and a grid that goes on where it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from typer.testing import CliRunner

from featurestore.format.rows import FeatureRows
from featurestore.published.paths import RunPath, run_path
from featurestore.store import FeatureStore
from tests.pages import check_page
from tests.ranks import StandingRanks
from trainer.comm import SoloComm
from trainer.config.config import load_config
from trainer.engine.engine import Engine, PreparedBatch, StepResult
from trainer.errors import TrainerError
from trainer.experiments.__main__ import app, settings_of
from trainer.experiments.grid import Experiment, Variant, chosen, experiments
from trainer.experiments.runs import Grid
from trainer.experiments.tables import as_markdown, rows_of, seed_mean
from trainer.schema import DEFAULT_SCHEMA

pytestmark = pytest.mark.long  # they train whole runs

WORKER = Path(__file__).parent / "grid.py"
Places = Any
TABLE = Experiment("t", "T", (Variant("base", (), 0.6), Variant("a", (), 0.61), Variant("b")), "Why.")


def figures(*gaucs: list[float]) -> dict[str, list[dict[str, float]]]:
    names = [variant.name for variant in TABLE.variants]
    return {name: [{"gauc": g} for g in values] for name, values in zip(names, gaucs, strict=False)}


def test_gains_are_paired_by_seed_and_corrected_for_the_number_of_rows() -> None:
    from scipy import stats  # a second's import, of two tests

    base, a, b = [0.60, 0.62, 0.61, 0.65], [0.61, 0.635, 0.62, 0.662], [0.60, 0.63, 0.60, 0.66]
    rows = rows_of(TABLE, figures(base, a, b))
    assert (rows[0].gain, rows[0].p_value, rows[0].baseline) == (None, None, None)
    raw = [float(stats.ttest_rel(each, base).pvalue) for each in (a, b)]
    assert rows[1].p_value == pytest.approx(2 * raw[0])  # the smaller of two
    assert rows[2].p_value == pytest.approx(max(raw[1], 2 * raw[0]))
    assert rows[1].gain is not None and rows[1].gain.mean == pytest.approx(0.01175)
    assert rows[1].paper_gain == pytest.approx(0.01) and rows[2].paper_gain is None
    text = as_markdown(TABLE, rows, 4)
    assert "| a | 0.6318 ± " in text and "+0.0118 ± " in text and "Why." in text
    assert text.count("baseline |") == 1


def test_an_interval_is_students() -> None:
    from scipy import stats

    values = [1.0, 2.0, 4.0]
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem(values))
    found = seed_mean(values)
    assert found.half_width == pytest.approx((high - low) / 2) and found.mean == pytest.approx(7 / 3)
    assert seed_mean([1.0]).half_width is None


def test_one_seed_and_equal_runs_have_no_p_value() -> None:
    assert [row.p_value for row in rows_of(TABLE, figures([0.6], [0.7]))] == [None, None]
    assert rows_of(TABLE, figures([0.6, 0.6], [0.7, 0.7]))[1].p_value is None


def test_every_variant_is_a_valid_configuration_and_has_a_baseline() -> None:
    for experiment in experiments().values():
        names = [variant.name for variant in experiment.variants]
        assert len(set(names)) == len(names)
        for variant in experiment.variants:
            load_config(settings=variant.settings)
            assert experiment.baseline_of(variant.name) in names
    assert [each.name for each in chosen(["prerank", "images"])] == ["images", "prerank"]
    assert len(chosen(["all"])) == len(experiments())


def test_settings_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("data: {samples: x/y}\nmodel: {tables: {item: 5, sid0: 256}}\n")
    found = load_config(settings=settings_of(tmp_path / "s.yaml"))
    assert (found.data.samples, found.model.tables["sid0"], found.model.tables["item"]) == ("x/y", 256, 5)


def call(*words: str, out: RunPath, settings: list[str]) -> Result:
    """The command with these settings."""
    options = [word for setting in settings for word in ("--set", setting)]
    return CliRunner().invoke(app, [*words, "--out", str(out), *options])


def reports(folder: Path) -> dict[str, int]:
    """The finished runs, and when each of them ended."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("runs/*/report.json")}


def test_a_grid_resumes_from_nothing(tmp_path: Path) -> None:
    done = call("images", out=tmp_path, settings=[f"run.resume={tmp_path}/step-00000050"])
    assert (done.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert "leave it out" in done.stderr


@pytest.mark.long
def test_a_grid_is_run_once(places: Places, tmp_path: Path) -> None:
    settings = places.settings(train__max_steps=3)
    done = call("prerank", "warmup", "--seeds", "2", out=tmp_path, settings=settings)
    assert done.exit_code == 0, done.output
    made = reports(tmp_path)
    assert len(made) == 2 * 2 + 2 * (1 + 3)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["prerank"]["rows"][0]["name"] == "ids only"
    assert len(results["warmup"]["runs"]["partial"]) == 2
    assert all((tmp_path / "plots" / f"{name}.png").stat().st_size > 5000 for name in ("prerank", "warmup"))
    assert "### Table 5: warm-up" in (tmp_path / "RESULTS.md").read_text()
    tested = [load_config(path / "config.yaml").data.test_days for path in (tmp_path / "runs").iterdir()]
    days = {each[0] for each in tested if each}
    assert len(days) == 2  # the run before is tested a day earlier
    slower = [*settings, "train.checkpoint_every=2", "data.prefetch_batches=0", "run.deadline_s=99"]
    again = call("prerank", "warmup", "--seeds", "2", out=tmp_path, settings=slower)
    assert again.exit_code == 0 and reports(tmp_path) == made


@pytest.mark.long
def test_compact_features_are_made_once_and_trained_on(places: Places, tmp_path: Path) -> None:
    settings = places.settings(train__max_steps=2)
    grid = Grid(tmp_path, None, tuple(settings), None, SoloComm())
    wide, small = Variant("4", reduced=(4, "float32")), Variant("3", reduced=(3, "bfloat16"))
    table = Experiment("compact", "", (Variant("full width"), Variant("16", reduced=(16, "float32")), wide, small))
    assert [each.name for each in grid.variants_of(table)] == ["full width", "4", "3"], (
        "16 numbers have no 16 components"
    )
    for variant, dims in ((wide, 4), (small, 3)):
        planned = grid.plan(variant, 0)
        store = FeatureStore.open(planned.config.data.store)
        assert store.info.dim == dims and store.info.full_dim == 16 and store.storage.url.startswith(str(tmp_path))
        assert 0 < grid.figures(planned)["gauc"] < 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stores").rglob("*.parquet")}
    again = Grid(tmp_path, None, tuple(settings), None, SoloComm())
    assert again.plan(wide, 0).folder == grid.plan(wide, 0).folder != grid.plan(small, 0).folder
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "stores").rglob("*.parquet")}


def test_a_call_leaves_the_tables_of_earlier_calls_in_the_order_of_the_paper(places: Places, tmp_path: Path) -> None:
    settings = places.settings(train__max_steps=2)
    for words in (["prerank", "--seeds", "2"], ["images", "--seeds", "1"]):
        assert call(*words, out=tmp_path, settings=settings).exit_code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["images", "prerank"]
    assert [len(results["prerank"]["runs"]["ids only"]), len(results["images"]["runs"]["ids only"])] == [2, 1]
    first, second = (tmp_path / "RESULTS.md").read_text().split("### ")[1:]
    assert "(`images`)" in first and "Mean of 1 seed " in first
    assert "(`prerank`)" in second and "Mean of 2 seeds " in second
    before = reports(tmp_path)
    (tmp_path / "results.json").write_text("{")
    damaged = call("aggregators", "--seeds", "1", out=tmp_path, settings=settings)
    assert damaged.exit_code == 1 and "results.json cannot be read" in damaged.output
    assert reports(tmp_path) == before


def test_another_name_for_other_samples_and_another_snapshot(
    make_places: Callable[[Path], Places], tmp_path: Path
) -> None:
    places = make_places(tmp_path)

    def names(**changes: Any) -> list[str]:
        """Of a run without images and of one with them."""
        grid = Grid(tmp_path / "out", None, tuple(places.settings(**changes)), None, SoloComm())
        return [grid.plan(variant, 0).folder.name for variant in experiments()["prerank"].variants]

    before = names()
    assert names() == before
    assert names(train__seed=5) == before  # --seeds sets it
    for change in ({"data__global_batch_size": 64}, {"run__warm_start": "elsewhere"}):
        assert set(names(**change)).isdisjoint(before)
    store = FeatureStore.open(tmp_path / "features")
    store.put(FeatureRows.of(["new"], np.zeros((1, 16), np.float32), keys=np.array([2_000])))
    new = names()
    assert new[0] == before[0] and new[1] != before[1]
    assert names(data__store_version=1)[1] == before[1]
    shutil.rmtree(tmp_path / "features")
    again = FeatureStore.create(tmp_path / "features", store.info)
    again.put(FeatureRows.of(["new"], np.ones((1, 16), np.float32), keys=np.array([2_000])))
    assert names(data__store_version=1)[1] != before[1]  # another store in its place
    new = names()
    file = tmp_path / "samples" / "test" / "day=2026-01-01.parquet"
    table = pq.read_table(file, partitioning=None)
    users = pa.array(np.arange(len(table)) * 10**9)
    pq.write_table(table.set_column(table.schema.get_field_index("user"), "user", users), file, row_group_size=7)
    other = names()
    assert other[0] != new[0] and other[1] != new[1]  # as many samples, other bytes
    schema = DEFAULT_SCHEMA.read_text()
    (tmp_path / "schema.yaml").write_text(schema)
    assert names(data__schema_file=tmp_path / "schema.yaml") == other
    (tmp_path / "schema.yaml").write_text(schema.replace("new_ad_field: ad_item", "new_ad_field: ad_category"))
    assert names(data__schema_file=tmp_path / "schema.yaml")[0] != other[0]


def test_a_store_put_back_from_a_backup_that_goes_another_way_is_another(
    make_places: Callable[[Path], Places], tmp_path: Path
) -> None:
    """The same store_id and the same number of a snapshot, of other rows."""
    places, features = make_places(tmp_path), tmp_path / "features"

    def names_with(value: float) -> list[str]:
        """Of a run without images and of one with them, after one more commit."""
        rows = FeatureRows.of(["new"], np.full((1, 16), value, np.float32), keys=np.array([2_000]))
        assert FeatureStore.open(features).put(rows).version == 2
        grid = Grid(tmp_path / "out", None, tuple(places.settings()), None, SoloComm())
        return [grid.plan(variant, 0).folder.name for variant in experiments()["prerank"].variants]

    shutil.copytree(features, tmp_path / "backup")
    before = names_with(0)
    shutil.rmtree(features)
    shutil.copytree(tmp_path / "backup", features)
    after = names_with(1)
    assert after[0] == before[0] and after[1] != before[1]


def test_all_runs_of_a_call_learn_from_one_snapshot(make_places: Callable[[Path], Places], tmp_path: Path) -> None:
    places = make_places(tmp_path)
    grid = Grid(tmp_path / "out", None, tuple(places.settings(train__max_steps=1)), None, SoloComm())
    runs = [grid.plan(experiments()["prerank"].variants[1], seed) for seed in (0, 1)]
    store = FeatureStore.open(tmp_path / "features")
    store.put(FeatureRows.of(["new"], np.zeros((1, 16), np.float32), keys=np.array([2_000])))
    for run in runs:
        grid.figures(run)
    assert [json.loads((run.folder / "report.json").read_text())["store_version"] for run in runs] == [1, 1]


def test_an_interrupted_run_goes_on_from_its_checkpoint(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def figures(out: Path) -> dict[str, list[dict[str, float]]]:
        return json.loads((out / "results.json").read_text())["prerank"]["runs"]

    settings = places.settings(train__max_steps=6, train__checkpoint_every=2)
    words, cut, whole = ("prerank", "--seeds", "1"), tmp_path / "cut", tmp_path / "whole"
    train_step = Engine.train_step

    def failing(engine: Engine, prepared: PreparedBatch) -> StepResult:
        if engine.num_steps == 4:
            raise TrainerError("killed")
        return train_step(engine, prepared)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train_step", failing)
        assert call(*words, out=cut, settings=settings).exit_code == 1
    assert call(*words, out=cut, settings=settings).exit_code == 0
    steps = {path.parent.name: json.loads(path.read_text())["steps"] for path in cut.glob("runs/*/report.json")}
    assert sorted(steps.values()) == [2, 6]
    assert call(*words, out=whole, settings=settings).exit_code == 0
    assert figures(cut) == figures(whole)
    log = cut / "logs" / f"{min(steps, key=lambda name: steps[name])}.txt"
    assert "step 0 of 6" in log.read_text() and "step 4 of 6" in log.read_text()


def test_the_page_has_the_tables_and_nothing_that_the_runs_print(places: Places, tmp_path: Path) -> None:
    page, settings = tmp_path / "page.html", places.settings(train__max_steps=2)
    assert call("prerank", "--seeds", "2", "--html", page, out=tmp_path / "out", settings=settings).exit_code == 0
    read = check_page(page.read_text(encoding="utf-8"))
    found = json.loads((tmp_path / "out" / "results.json").read_text())["prerank"]
    for row in found["rows"]:
        gauc = row["metrics"]["gauc"]
        assert read.value(row["name"])[0] == f"{gauc['mean']:.4f} ± {gauc['half_width']:.4f}"
    assert read.texts.count(f"{found['title']} (prerank)") == len(read.plots) == 1
    runs = [f"prerank: {row['name']}, seed {seed}: GAUC" for row in found["rows"] for seed in (0, 1)]
    assert all(any(each.startswith(run) for each in read.texts) for run in runs)


def test_results_on_s3_are_those_of_a_disk(places: Places, tmp_path: Path, s3_url: str) -> None:
    settings, words = places.settings(train__max_steps=2), ("prerank", "--seeds", "1")
    out = run_path(f"{s3_url}/tables")
    for each in (out, tmp_path, out):
        assert call(*words, out=each, settings=settings).exit_code == 0
    found, expected = (json.loads((each / "results.json").read_bytes()) for each in (out, tmp_path))
    assert found == expected
    assert (out / "plots" / "prerank.png").read_bytes()[1:4] == b"PNG"
    assert {each.name for each in (out / "logs").iterdir()} == {each.name for each in (tmp_path / "logs").iterdir()}


class TestWhatAVariantLacks:
    """Told in one line, before the first run where it can be known by then."""

    def test_days(self, make_places: Callable[[Path], Places], tmp_path: Path) -> None:
        places = make_places(tmp_path)
        (tmp_path / "samples" / "train" / "day=2026-01-03.parquet").unlink()
        done = call("all", "--seeds", "1", out=tmp_path / "out", settings=places.settings(train__max_steps=1))
        assert done.exit_code == 1 and "has 2 days of samples; warm-up" in done.output
        assert not (tmp_path / "out").exists()

    def test_test_samples(self, places: Places, tmp_path: Path) -> None:
        done = call("images", out=tmp_path / "out", settings=places.settings(data__test_days=[]))
        assert done.exit_code == 2 and "data.test_days=[] names no test samples" in done.output
        assert not (tmp_path / "out").exists()

    def test_store(self, places: Places, tmp_path: Path) -> None:
        done = call("images", out=tmp_path / "out", settings=places.settings(data__store=tmp_path / "nothing"))
        assert done.exit_code == 2 and "is no feature store; make it with" in done.output
        assert not (tmp_path / "out").exists()

    def test_clicks(self, make_places: Callable[[Path], Places], tmp_path: Path) -> None:
        places = make_places(tmp_path)
        file = tmp_path / "samples" / "test" / "day=2026-01-01.parquet"
        table = pq.read_table(file, partitioning=None)
        labels = pa.array([[0] * len(each) for each in table.column("label").to_pylist()], pa.list_(pa.int8()))
        table = table.set_column(table.schema.get_field_index("label"), "label", labels)
        pq.write_table(table, file, row_group_size=7)
        settings = places.settings(train__max_steps=1)
        for _ in range(2):  # also of a run that is found again
            done = call("images", "--seeds", "1", out=tmp_path / "out", settings=settings)
            assert done.exit_code == 1 and "has no GAUC, which the tables compare" in done.output
        assert len(reports(tmp_path / "out")) == 1


def test_two_ranks_where_one_sees_the_reports_late(places: Places, tmp_path: Path, two_ranks: StandingRanks) -> None:
    settings = places.settings(train__max_steps=3, run__deadline_s=30)
    two_ranks.run(WORKER, tmp_path / "out", tmp_path / "seen.json", *settings)
    first, second = json.loads((tmp_path / "seen.json").read_text())
    assert len(first) == 2 and second == first
    assert (tmp_path / "out" / "RESULTS.md").read_text().count("| bfloat16 on the wire |") == 1
    assert len(list((tmp_path / "out" / "logs").iterdir())) == 2
    # One rank gets the same figures, but for numbers that are rounded on the wire between two.
    assert call("exactness", "--seeds", "1", out=tmp_path / "out", settings=settings).exit_code == 0
    assert len(reports(tmp_path / "out").keys() - first.keys()) == 1


def test_help_and_guide_name_every_table() -> None:
    text, guide = CliRunner().invoke(app, ["--help"]).output, (Path(__file__).parents[3] / "docs/GUIDE.md").read_text()
    for name, each in experiments().items():
        assert f"{name}: {each.title}" in text and f"\n| `{name}` | " in guide


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["images", "--set", "model.bass=lr", "--out", str(tmp_path)])
    assert done.exit_code == 2 and "model.bass is unknown" in done.output
    done = CliRunner().invoke(app, ["images", "--semantic-config", str(tmp_path / "none.yaml")])
    assert done.exit_code == 2 and "none.yaml" in done.output
