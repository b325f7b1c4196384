"""Experiments: statistics against scipy, every variant's settings, and a grid that goes on where it was."""

import json
from pathlib import Path

import pytest
from scipy import stats
from typer.testing import CliRunner

from trainer.config import load_config
from trainer.experiments.__main__ import app, settings_of
from trainer.experiments.grid import Experiment, Variant, chosen, experiments
from trainer.experiments.tables import as_markdown, rows_of, seed_mean

TABLE = Experiment("t", "T", (Variant("base", (), 0.6), Variant("a", (), 0.61), Variant("b")), "Why.")


def figures(*gaucs: list[float]) -> dict[str, list[dict[str, float]]]:
    names = [variant.name for variant in TABLE.variants]
    return {name: [{"gauc": g} for g in values] for name, values in zip(names, gaucs, strict=False)}


def test_gains_are_paired_by_seed_and_corrected_for_the_number_of_rows() -> None:
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


def test_a_grid_is_run_once(places, tmp_path: Path) -> None:
    words = ["images", "warmup", "--seeds", "2", "--out", str(tmp_path)]
    for setting in places.settings(train__max_steps=4):
        words += ["--set", setting]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    reports = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/report.json")}
    assert len(reports) == 2 * 4 + 2 * (1 + 3)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["images"]["rows"][0]["name"] == "ids only"
    assert len(results["warmup"]["runs"]["partial"]) == 2
    assert all((tmp_path / "plots" / f"{name}.png").stat().st_size > 5000 for name in ("images", "warmup"))
    assert "### Table 5: warm-up" in (tmp_path / "RESULTS.md").read_text()
    tested = [load_config(path.with_name("config.yaml")).data.test_days for path in reports]
    days = {each[0] for each in tested if each}
    assert len(days) == 2  # the run before is tested a day earlier
    again = CliRunner().invoke(app, words, catch_exceptions=False)
    assert again.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/report.json")} == reports


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["images", "--set", "model.bass=lr", "--out", str(tmp_path)])
    assert done.exit_code == 2 and "model.bass is unknown" in done.output
    done = CliRunner().invoke(app, ["images", "--semantic-config", str(tmp_path / "none.yaml")])
    assert done.exit_code == 2 and "none.yaml" in done.output
