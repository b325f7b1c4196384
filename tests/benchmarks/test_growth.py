"""The benchmark of growth: every stage's command works on drawn data, and the drawn data are what they say."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.growth.__main__ import app
from benchmarks.process import RunFailedError, run_to_end

STAGES = ["samples", "store", "train", "evaluate", "export_vectors", "export_model"]


@pytest.mark.slow
@pytest.mark.services
def test_figures_are_written(tmp_path: Path) -> None:
    out = tmp_path / "growth.json"
    sizes = ["--impressions", "2000", "--impressions", "4000", "--samples-alone", "6000", "--dims", "8"]
    done = CliRunner().invoke(app, [*sizes, "--dir", str(tmp_path / "growth"), "--json", str(out)])
    assert done.exit_code == 0, done.output
    figures = json.loads(out.read_text())
    for stage in STAGES:
        assert all(figures[f"{cost}_{stage}_{size}"] > 0 for cost in ("seconds", "written_mb") for size in (2000, 4000))
    grown = math.log(figures["written_mb_samples_6000"] / figures["written_mb_samples_4000"]) / math.log(1.5)
    assert figures["written_mb_exponent_samples"] == pytest.approx(grown)
    assert "seconds_store_6000" not in figures
    of_all = [figures[f"seconds_exponent_{stage}"] for stage in STAGES]
    assert figures["seconds_exponent"] == max(of_all)


def test_a_program_that_fails_is_told_with_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match=r"(?s)ended with 3:.*out of paper"):
        run_to_end(["sh", "-c", "echo out of paper; exit 3"], tmp_path / "log")
